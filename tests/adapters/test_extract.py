"""A full fine-tune as a LoRA: nearest of its rank, exact at full rank, nothing that differs left unsaid."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import dovetail as dt
from dovetail import adapters as ad
from dovetail.adapters.base import roles
from dovetail.adapters.extract import extract
from dovetail.errors import BuildError, UserError
from dovetail.parts.storage.nf4 import Nf4
from dovetail.parts.weights import Linear

LLAMA = {
    "kind": "decoder", "vocab": 53, "dim": 24, "depth": 2, "context": 32,
    "blocks": {"mixer": {"kind": "attention", "heads": 4, "kv_heads": 2}},
}  # fmt: skip
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pair(changed: str = ".mixer.|.feedforward.", rank: int | None = None, spec: dict[str, Any] | None = None) -> Any:
    """(base, tuned): the weights whose names hold one of `changed` moved, by a change of `rank` (full unless given)."""
    base = dt.build(spec or LLAMA)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if any(word in name for word in changed.split("|")):
                if rank is None or p.dim() < 2:
                    p.add_(torch.randn_like(p) * 0.1)
                else:
                    p.add_(torch.randn(p.shape[0], rank) @ torch.randn(rank, p.shape[1]) * 0.05)
    return base, tuned


def test_full_rank_reproduces_the_tune() -> None:
    base, tuned = pair(".mixer.|.feedforward.|embedding|head")
    x = torch.randint(0, 53, (2, 9))
    start = base(x).logits
    model, account = extract(base, tuned, energy=1.0, targets=(*PARTS, "embed_tokens", "lm_head"))
    want = tuned(x).logits
    assert (model(x).logits - want).abs().max() <= 1e-5 * want.abs().max()
    ad.merge(model)
    assert (model(x).logits - want).abs().max() <= 1e-5 * want.abs().max()
    assert not account.uncovered and not account.settings and max(s.error for s in account.segments) < 1e-5
    ad.unmerge(model)
    ad.remove(model, "extracted")
    assert torch.equal(model(x).logits, start)


def test_energy_gives_the_least_rank_and_rank_the_nearest() -> None:
    base, tuned = pair()
    old = {n: p.detach().double().clone() for n, p in base.named_parameters()}
    new = {n: p.detach().double() for n, p in tuned.named_parameters()}
    model, account = extract(base, tuned, energy=0.9)
    assert [s.segment.rsplit(".", 1)[-1] for s in account.segments] == [*PARTS] * 2
    at = 0
    for site in ad.sites(model, None):  # fused maps apart, each of a rank of its own
        delta = new[f"{site.path}.weight"] - old[f"{site.path}.weight"]
        module: Any = site.place.attached()["extracted"]
        for segment, (a, b), scale in zip(site.segments, module.pairs(), module.scales, strict=True):
            line, part = account.segments[at], delta[segment.start : segment.stop]
            squares = torch.linalg.svdvals(part).square()
            kept = squares.cumsum(0) / squares.sum()
            assert kept[line.rank - 1] >= 0.9 > kept[line.rank - 2] and a.shape[0] == line.rank
            assert line.energy == pytest.approx(kept[line.rank - 1].item(), abs=1e-5)
            u, s, vh = torch.linalg.svd(part)
            near = (u[:, : line.rank] * s[: line.rank]) @ vh[: line.rank]
            assert (scale * b.double() @ a.double() - near).norm() <= 1e-5 * part.norm()
            assert line.error == pytest.approx(float((part - near).norm() / part.norm()), abs=1e-5)
            assert line.change == pytest.approx(
                float(part.norm() / old[f"{site.path}.weight"][segment.start : segment.stop].norm()), rel=1e-5
            )
            at += 1
    assert at == len(account.segments) == 14 and len({s.rank for s in account.segments}) > 1
    assert account.parameters == sum(p.numel() for n, p in model.named_parameters() if "adapters" in n)
    layer = [s for s in account.segments if s.segment.startswith("model.layers.1.")]
    whole = sum((s.error * s.norm) ** 2 for s in layer) / sum(s.norm**2 for s in layer)
    assert account.layers["model.layers.1"] == pytest.approx(whole**0.5) and len(account.layers) == 2


def test_a_tune_of_low_rank_is_found_again(tmp_path: Path) -> None:
    base, tuned = pair("blocks.1.mixer.|blocks.1.feedforward.", rank=3)
    x = torch.randint(0, 53, (1, 7))
    model, account = extract(copy.deepcopy(base), tuned, energy=0.999999)
    ranks = {s.segment: s.rank for s in account.segments}
    assert all(r == 0 for n, r in ranks.items() if ".layers.0." in n)  # untouched: not adapted, yet in the account
    assert {r for n, r in ranks.items() if ".layers.1.mlp" in n} == {3}
    assert all(p.dim() == 2 and p.shape[0] for n, p in model.named_parameters() if "adapters" in n)
    want = tuned(x).logits
    assert (model(x).logits - want).abs().max() <= 2e-3 * want.abs().max()
    ad.save_adapter(model, tmp_path / "it")
    again = ad.load_adapter(base, tmp_path / "it")
    assert (again(x).logits - model(x).logits).abs().max() <= 1e-6 * want.abs().max()


def test_what_differs_and_is_not_covered_is_named() -> None:
    base, tuned = pair("blocks.0.mixer.|norm|embedding")
    _, account = extract(base, tuned, rank=2, targets=("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"))
    named = {u.name: u for u in account.uncovered}
    different = {n for n, p in tuned.named_parameters() if not torch.equal(p, dict(base.named_parameters())[n])}
    assert set(named) == different  # of q, k, v in one weight, v is left
    fused = next(n for n in named if "qkv" in n)
    assert named[fused].rows == 12 and all(u.change > 0 for u in account.uncovered)
    assert [s.segment for s in account.segments] == [f"model.layers.0.self_attn.{n}_proj" for n in "qk"]


def test_settings_that_differ_are_named() -> None:
    base, tuned = pair(spec=LLAMA)
    position = {"kind": "rope", "theta": 500.0}
    other = dt.build(LLAMA | {"blocks": {"mixer": LLAMA["blocks"]["mixer"] | {"position": position}}})
    other.load_state_dict(tuned.state_dict())
    _, account = extract(base, other, rank=1)
    assert [(p.rsplit(".", 1)[-1], b) for p, _, b in account.settings] == [("theta", "500.0")]


def test_biases_and_tied_tables() -> None:
    gpt2 = {
        "kind": "decoder", "vocab": 31, "dim": 16, "depth": 1, "context": 16, "position": {"kind": "learned"},
        "norm": "layer", "head": {"kind": "ref", "path": "embedding"},
        "blocks": {"mixer": {"kind": "attention", "heads": 2, "bias": "all", "position": "none"}, "norm": "layer",
                   "feedforward": {"kind": "mlp", "bias": True, "activation": "gelu_tanh"}},
    }  # fmt: skip
    base, tuned = pair(".mixer.|embedding", spec=gpt2)
    x = torch.randint(0, 31, (2, 5))
    model, account = extract(base, tuned, energy=1.0, targets=("*.mixer.*", "embedding.*"))
    assert {u.name.rsplit(".", 1)[-1] for u in account.uncovered} == {"bias"}
    parameters = dict(tuned.named_parameters())
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.copy_(parameters[name])
    want = tuned(x).logits  # the tied head follows its table
    assert (model(x).logits - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_base_in_codes_counts_as_it_is_dequantised() -> None:
    base, tuned = pair()
    for module in base.modules():
        if isinstance(module, Linear) and "head" not in roles(module):
            module.keep(Nf4())
    x = torch.randint(0, 53, (1, 6))
    model, account = extract(base, tuned, energy=1.0)
    want = tuned(x).logits
    assert (model(x).logits - want).abs().max() <= 1e-5 * want.abs().max() and not account.uncovered


@pytest.mark.parametrize(
    ("said", "says"),
    [({}, "one of the two"), ({"rank": 2, "energy": 0.5}, "one of the two"), ({"rank": 0}, "rank 0"), ({"energy": 1.5}, "energy 1.5")],
)  # fmt: skip
def test_refused_asks(said: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        extract(*pair(), **said)


def test_refused_models() -> None:
    base, tuned = pair()
    with pytest.raises(BuildError, match=r"embedding.table.weight is \(53, 24\) in the base and \(54, 24\)"):
        extract(base, dt.build(LLAMA | {"vocab": 54}), rank=2)
    with pytest.raises(BuildError, match="in the tuned model alone"):
        extract(base, dt.build(LLAMA | {"depth": 3}), rank=2)
    with pytest.raises(UserError, match="do not differ"):
        extract(base, copy.deepcopy(base), rank=2)
    with pytest.raises(BuildError, match="tuned model has adapters: default"):
        extract(base, ad.adapt(copy.deepcopy(tuned), "lora"), rank=2)
    next(p for n, p in tuned.named_parameters() if "mixer" in n).data[0, 0] = float("nan")
    with pytest.raises(BuildError, match="NaN"):
        extract(base, tuned, rank=2)
    assert not ad.adapters(base)
