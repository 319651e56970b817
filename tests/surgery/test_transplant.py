"""Weights carried from one arrangement to another."""

from __future__ import annotations

import pytest
import torch

import dovetail as dt
from dovetail.errors import SpecError
from dovetail.surgery import transplant


def model(**attention: object) -> object:
    mixer = {"kind": "attention", "heads": 4, "kv_heads": 4, "bias": "qkv"} | attention
    return dt.build(
        {"kind": "decoder", "vocab": 50, "dim": 32, "depth": 2, "context": 16, "blocks": {"mixer": mixer}}, seed=3
    )


def tokens() -> torch.Tensor:
    return torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))


def test_a_position_swap_carries_every_weight() -> None:
    old = model()
    new = dt.override(old.spec, {"blocks.*.mixer.position": {"kind": "yarn", "factor": 4}})
    result = transplant(old, new)
    assert not result.reinitialised and not result.dropped and not result.approximated
    assert {(m.exactness, m.how.endswith("no bound"), m.count) for m in result.moves} == {("approximate", True, 0)}
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), result.model.parameters(), strict=True))
    assert not torch.equal(old(tokens()).logits, result.model(tokens()).logits)


def test_repeating_heads_is_exact_and_pooling_undoes_it() -> None:
    old = model(kv_heads=2)
    more = transplant(old, dt.override(old.spec, {"blocks.*.mixer.kv_heads": 4}))
    assert {m.exactness for m in more.moves} == {"exact"}
    torch.testing.assert_close(more.model(tokens()).logits, old(tokens()).logits, rtol=0, atol=1e-6)
    back = transplant(more.model, old.spec)
    assert {m.exactness for m in back.moves} == {"approximate"}
    torch.testing.assert_close(back.model(tokens()).logits, old(tokens()).logits, rtol=0, atol=1e-6)


def test_pooled_heads_are_means() -> None:
    old = model()
    new = transplant(old, dt.override(old.spec, {"blocks.*.mixer.kv_heads": 2})).model
    before = old.blocks[0].mixer.qkv.weight.data
    after = new.blocks[0].mixer.qkv.weight.data
    assert torch.equal(before[:32], after[:32])
    keys = before[32:64].unflatten(0, (2, 2, 8)).mean(1).flatten(0, 1)
    torch.testing.assert_close(after[32:48], keys, rtol=0, atol=1e-7)


def test_the_rival_keeps_queries_and_draws_keys_and_values_anew() -> None:
    old = model()
    spec = dt.override(old.spec, {"blocks.*.mixer.kv_heads": 2})
    rival = transplant(old, spec, rival=True, seed=5)
    drawn = dt.build(spec, seed=5)
    weight = rival.model.blocks[1].mixer.qkv.weight.data
    assert torch.equal(weight[:32], old.blocks[1].mixer.qkv.weight.data[:32])
    assert torch.equal(weight[32:], drawn.blocks[1].mixer.qkv.weight.data[32:])
    assert {m.exactness for m in rival.moves} == {"reinitialised"}


def test_another_mixer_starts_anew_and_the_rest_is_carried() -> None:
    old = model()
    result = transplant(old, dt.override(old.spec, {"blocks.1.mixer": {"kind": "lstm"}}), fresh=["blocks.1.mixer"])
    assert all(name.startswith("blocks.1.mixer") for name in result.reinitialised)
    assert all(name.startswith("blocks.1.mixer") for name in result.dropped)
    same = dict(result.model.named_parameters())
    for name, weight in old.named_parameters():
        if not name.startswith("blocks.1.mixer"):
            assert torch.equal(weight, same[name])


def test_fresh_paths_start_anew_and_must_match() -> None:
    old = model()
    result = transplant(old, old.spec, fresh=["blocks.*.feedforward"], seed=9)
    assert sorted(result.reinitialised) == sorted(n for n, _ in old.named_parameters() if ".feedforward." in n)
    with pytest.raises(SpecError, match="matches no parameter"):
        transplant(old, old.spec, fresh=["blocks.*.feedforwards"])


def test_dtypes_and_the_old_model_stay() -> None:
    old = model().to(torch.bfloat16)
    copy = {n: p.clone() for n, p in old.named_parameters()}
    new = transplant(old, dt.override(old.spec, {"blocks.*.mixer.kv_heads": 1})).model
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert all(torch.equal(p, copy[n]) for n, p in old.named_parameters())


def test_a_swap_of_one_side_of_a_tie_is_refused() -> None:
    spec = {"kind": "decoder", "vocab": 50, "dim": 32, "depth": 1, "head": {"kind": "ref", "path": "embedding"}}
    tied = dt.build(spec)
    with pytest.raises(SpecError, match="one side of a ref"):
        dt.override(tied.spec, {"embedding": {"kind": "token", "scale": 2.0}})


def test_heads_of_another_width_share_nothing_even_at_equal_shapes() -> None:
    old = model(heads=4, kv_heads=2)
    changed = dt.override(
        old.spec, {"blocks.*.mixer.heads": 8, "blocks.*.mixer.kv_heads": 4, "blocks.*.mixer.head_dim": 4}
    )
    with pytest.raises(SpecError, match="heads of another number or width"):
        transplant(old, changed)
    result = transplant(old, changed, fresh=["blocks.*.mixer"])
    assert all(".mixer." in name for name in result.reinitialised)
    assert "blocks.0.mixer.qkv.weight" in result.reinitialised
    assert {m.how for m in result.moves} == {"on request"}


@pytest.mark.parametrize(
    ("changes", "path", "how"),
    [
        ({"blocks.1.feedforward": None}, "blocks.1.feedforward", "the feedforward is gone: no bound"),
        ({"norm": None}, "norm", "the norm is gone: no bound"),
        ({"depth": 1}, "blocks.1", "the block is gone: no bound"),
        (
            {"head": {"kind": "ref", "path": "embedding"}},
            "head_part",
            "one table for both, the mean of embedding and head",
        ),
    ],
)
def test_what_is_gone_with_its_weights_is_said(changes: dict[str, object], path: str, how: str) -> None:
    old = model()
    done = transplant(old, dt.override(old.spec, changes))
    assert done.dropped and {m.path: (m.exactness, m.how) for m in done.moves}[path] == ("approximate", how)


@pytest.mark.parametrize(
    ("mixer", "change", "how"),
    [
        ({"kind": "gru"}, {"bias": False}, "bias_ih_l0 dropped"),
        ({"kind": "latent", "rank": 8}, {"scale": 0.5}, "scale 0.5 in place of None"),
        ({"kind": "attention", "position": "kerple"}, {"position.form": "power"}, "position kerple(form=power)"),
    ],
)
def test_other_options_of_parts_without_a_map_of_their_own_are_said(
    mixer: dict[str, object], change: dict[str, object], how: str
) -> None:
    old = dt.build({"kind": "decoder", "vocab": 50, "dim": 32, "depth": 1, "context": 16, "blocks": {"mixer": mixer}})
    done = transplant(old, dt.override(old.spec, {f"blocks.*.mixer.{name}": value for name, value in change.items()}))
    (move,) = done.moves
    assert move.exactness == "approximate" and how in move.how and not done.reinitialised
