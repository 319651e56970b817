"""Every registered mixer in place of softmax attention: the swap runs, trains and decodes, or is refused with a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_models import CONTEXT, EXACT, VOCAB, gap, gpt2, llama, made, tokens
from torch import Tensor

import dovetail as dt
from dovetail.errors import UserError
from dovetail.spec.registry import entry
from dovetail.surgery import transplant
from dovetail.training.flops import flops_per_token

ASSET = Path(__file__).parents[2] / "assets" / "pydoc-llama"
MIXER = "blocks.*.mixer"
NEEDED = {"rank": 8, "length": 64, "size": 4}  # fields without a default, whatever the kind


def needs(kind: str) -> dict[str, Any]:
    """`kind` with the fields that have no default."""
    fields = entry("mixer", kind).cls.model_fields
    return {"kind": kind} | {name: NEEDED[name] for name, info in fields.items() if info.is_required()}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, str]]:
    """Models read from published layouts, and which of their mixers to swap."""
    models = {"bundled": (dt.load(ASSET, dtype="float32"), "blocks.::4.mixer")}
    for name, make in (("llama", llama), ("gpt2", gpt2)):
        folder = tmp_path_factory.mktemp(name)
        dt.save(make().float(), folder, format="hf")
        models[name] = (dt.load(folder), MIXER)
    return models


def runs(model: Any) -> None:
    """Forward, backward, and step by step as at once."""
    ids = torch.randint(0, model.spec.vocab, (2, 13), generator=torch.Generator().manual_seed(1))
    model.eval()
    whole = model(ids).logits
    whole.logsumexp(-1).sum().backward()
    whole = whole.detach()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if any(entry("mixer", block.mixer.kind).decode != "exact" for block in model.spec.blocks):
        return
    state = model.new_state(2, 13)
    with torch.no_grad():
        steps = torch.cat([model(part, state=state).logits for part in ids.split([7, 1, 1, 4], 1)], 1)
    assert float((steps - whole).abs().max()) <= 1e-4 * float(whole.abs().max())


@pytest.mark.parametrize("name", ["bundled", "llama", "gpt2"])
@pytest.mark.parametrize("kind", dt.registry("mixer"))
def test_any_mixer_goes_in_or_is_refused(loaded: dict[str, tuple[Any, str]], name: str, kind: str) -> None:
    base, where = loaded[name]
    known = entry("mixer", kind)
    if kind == "attention":
        base, where = dt.swap(base, {where: "linear"}, rounds=0)[0], where  # and back again
    changes = {where: needs(kind)}
    if not known.capabilities["causal"]:
        with pytest.raises(UserError) as refused:
            dt.swap(base, changes, rounds=0)
        assert refused.value.remedy and "causal" in str(refused.value)
        return
    if "heads" in known.cls.keeps:
        new, report = dt.swap(base, changes, rounds=0)
        moves = [m for m in report.moves if m.path == "blocks.0.mixer"]
        assert moves[0].exactness == "approximate" and "are carried" in moves[0].how and moves[0].count
        assert report.rival.startswith("random re-initialisation")
    else:
        with pytest.raises(UserError, match=r"nothing of the mixer at blocks\.0\.mixer") as refused:
            dt.swap(base, changes, rounds=0)
        assert "linear" in refused.value.remedy and f"fresh=['{MIXER}']" in refused.value.remedy
        fresh = [where] if name != "bundled" else ["blocks.0.mixer", "blocks.4.mixer"]
        new, report = dt.swap(base, changes, rounds=0, fresh=fresh)
        assert {m.how for m in report.moves if m.exactness == "reinitialised"} == {"on request"}
        assert not [n for n in report.carried if n.startswith("blocks.0.mixer")]
    assert new.spec.blocks[0].mixer.kind == kind
    runs(new)


def parts(weight: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    return weight.data.split(sizes)


@pytest.mark.parametrize("kind", ["retention", "gla", "delta_net", "gated_delta_net"])
def test_shared_keys_and_values_are_repeated_for_mixers_that_share_none(kind: str) -> None:
    old = llama()
    new = transplant(old, dt.override(old.spec, {MIXER: kind})).model
    before, after = old.blocks[1].mixer, new.blocks[1].mixer
    q, k, v = parts(before.qkv.weight, 24, 12, 12)
    linear = after.qkvg if kind == "retention" else after.qkv
    wanted = [q, *(x.unflatten(0, (2, 6)).repeat_interleave(2, 0).flatten(0, 1) for x in (k, v))]
    assert torch.equal(linear.weight.data[:72], torch.cat(wanted))
    assert torch.equal(after.out.weight.data, before.out.weight.data)
    if kind == "retention":  # the gate, in the same map, is as it was drawn
        drawn = dt.build(new.spec, seed=0).blocks[1].mixer.qkvg.weight.data
        torch.testing.assert_close(linear.weight.data[72:], drawn[72:].double())


def test_hashed_attention_takes_keys_for_both() -> None:
    old = gpt2()
    done = transplant(old, dt.override(old.spec, {MIXER: {"kind": "lsh", "buckets": 1, "chunk": None}}))
    before, after = old.blocks[0].mixer, done.model.blocks[0].mixer
    assert torch.equal(after.qkv.weight.data, before.qkv.weight.data[24:])
    how = next(m for m in done.moves if m.path == "blocks.0.mixer")
    assert "query is dropped" in how.how and "bias of qkv is dropped" in how.how
    weight = torch.cat([before.qkv.weight, before.qkv.bias[:, None]], 1)
    assert how.errors["qkv.bias"] == pytest.approx(float((before.qkv.bias.norm() / weight.norm()).detach()))


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("kind", ["linear", "cosformer", "performer"])
def test_there_and_back_is_the_same_model(make: Any, kind: str) -> None:
    old = make()
    there = transplant(old, dt.override(old.spec, {MIXER: kind}))
    assert not [m for m in there.moves if m.exactness == "reinitialised"]
    assert gap(old, there.model) > 1e-3
    back = transplant(there.model, old.spec)
    assert gap(old, back.model) < EXACT and not back.reinitialised


def test_small_scores_make_linear_attention_softmax() -> None:
    """With scores of size s, 1 + s + s²/2 is exp(s) to the third order: so heads and groups have found their places."""
    old = llama(blocks={"mixer": {"kind": "attention", "heads": 4, "kv_heads": 2, "position": "none"}})
    gaps = []
    for factor in (0.5, 0.25):
        with torch.no_grad():
            for block in old.blocks:
                block.mixer.qkv.weight[:36] *= factor  # queries and keys: scores by its square
        linear = {"kind": "linear", "feature_map": "taylor"}
        gaps.append(gap(old, transplant(old, dt.override(old.spec, {MIXER: linear})).model))
    assert gaps[1] < gaps[0] / 10 and gaps[1] < 1e-4


def test_a_hybrid_keeps_its_softmax_layers_as_they_are() -> None:
    old = llama()
    done = transplant(old, dt.override(old.spec, {"blocks.::2.mixer": "gla"}))
    assert [block.mixer.kind for block in done.model.spec.blocks] == ["gla", "attention", "gla"]
    assert {m.path.split(".")[1] for m in done.moves} == {"0", "2"}
    assert torch.equal(done.model.blocks[1].mixer.qkv.weight, old.blocks[1].mixer.qkv.weight)


def test_one_linear_mixer_for_another() -> None:
    """What both have by the same name and shape goes with the heads: the strength of writing, the convolution."""
    old = made({"blocks": {"mixer": {"kind": "delta_net", "heads": 2, "value_heads": 4, "gate": "silu"}}})
    done = transplant(old, dt.override(old.spec, {MIXER: "gated_delta_net"}))
    mine, there = (dict(m.blocks[0].mixer.named_parameters()) for m in (done.model, old))
    assert set(there) - set(mine) == set()
    assert all(torch.equal(mine[name], weight) for name, weight in there.items())
    assert {n for n in mine if n not in there} == {"decay.weight", "a_log", "dt_bias"}
    gla = transplant(done.model, dt.override(done.model.spec, {MIXER: {"kind": "gla", "heads": 4, "head_dim": 12}}))
    assert torch.equal(gla.model.blocks[0].mixer.gate.weight, mine["gate.weight"])
    assert any("2 key heads repeated to 4" in m.how for m in gla.moves)


def test_a_rival_draws_all_of_the_mixer_anew() -> None:
    old = llama()
    spec = dt.override(old.spec, {MIXER: "linear"})
    rival, drawn = transplant(old, spec, rival=True, seed=5), dt.build(spec, seed=5)
    for ours, theirs in zip(rival.model.blocks[1].mixer.parameters(), drawn.blocks[1].mixer.parameters(), strict=True):
        torch.testing.assert_close(ours.data, theirs.data.double())
    assert torch.equal(rival.model.blocks[1].feedforward.down.weight, old.blocks[1].feedforward.down.weight)


def test_heads_that_do_not_fit_are_named() -> None:
    old = llama()
    given = dt.parts.LinearAttention(heads=2)  # a whole spec is taken as it is: its heads, not those that were there
    with pytest.raises(UserError) as refused:
        transplant(old, dt.override(old.spec, {MIXER: given}))
    assert "heads=2, head_dim=12" in str(refused.value) and "heads=4, head_dim=6" in str(refused.value)
    done = transplant(old, dt.override(old.spec, {MIXER: {"kind": "linear", "value_dim": 5}}))
    assert any("value starts anew; out starts anew" in m.how for m in done.moves)
    q, k, v = parts(done.model.blocks[0].mixer.qkv.weight, 24, 12, 10)
    assert torch.equal(torch.cat([q, k]), old.blocks[0].mixer.qkv.weight.data[:36])
    drawn = dt.build(done.model.spec, seed=0).blocks[0].mixer.qkv.weight.data[36:]
    torch.testing.assert_close(v, drawn.double())


def test_what_a_token_costs_no_longer_grows() -> None:
    old = llama()
    for kind, grows in (("gau", True), ("linear", False), ("retention", False), ("gla", False), ("delta_net", False)):
        model = transplant(old, dt.override(old.spec, {MIXER: kind}), fresh=[MIXER]).model
        assert (flops_per_token(model, 1000) > flops_per_token(model, 10)) == grows, kind


def test_generation_goes_on_from_a_swap(loaded: dict[str, tuple[Any, str]]) -> None:
    new, _ = dt.swap(loaded["bundled"][0], {"blocks.::2.mixer": "linear"}, rounds=0)
    out = dt.generate(new, None, tokens(6, 2, VOCAB), max_new_tokens=CONTEXT, temperature=0)
    assert out.shape == (2, CONTEXT)
