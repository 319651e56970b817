"""Positions whose terms are of content and distance (Shaw's keys, DeBERTa, Transformer-XL, XLNet), through the own
attention kernels as through the plain path. Without a GPU they run in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import dovetail as dt
from dovetail.kernels.attention import attend, triton
from dovetail.kernels.attention.triton import sizes
from dovetail.kernels.plan import Plan
from dovetail.parts.context import Context
from dovetail.parts.init import Normal
from dovetail.parts.mask import Causal, Full
from dovetail.parts.position.base import PositionModule
from dovetail.parts.position.relative import Deberta
from dovetail.parts.position.shaw import Shaw
from dovetail.parts.position.transformer_xl import TransformerXL
from dovetail.parts.position.xlnet import XLNet
from dovetail.spec import Slot, Spec

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, H, SCALE = torch.float32, 2, 0.3


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short rows have several, near and far."""
    monkeypatch.setattr(sizes, "tiles", lambda *_: sizes.Tiles(16, 16, 4, 2))


KEYS = Shaw(clip=4, terms=("key",))
PARTS = [
    (KEYS, True), (KEYS, False), (Deberta(buckets=4, max_distance=8), False), (TransformerXL(), True), (XLNet(), False)
]  # fmt: skip


@pytest.mark.parametrize(("part", "causal"), PARTS)
def test_content_and_distance_are_served(part: Spec, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the module: its terms go to the kernels, with gradients to its vectors, the queries and the keys."""
    T, slot = 40, Slot(dim=16, heads=H, head_dim=8, causal=causal, init=Normal())
    module = part.build(slot).to(DEVICE)
    assert isinstance(module, PositionModule)
    for p in module.parameters():
        torch.nn.init.normal_(p)
    widths, ctx = (8, 8, 16), Context.of(1, T, torch.device(DEVICE))
    inputs = [torch.randn(1, T, H, D, device=DEVICE).transpose(1, 2).requires_grad_() for D in widths]
    mask, found = ctx.bind(Causal() if causal else Full()), []
    for path in ("triton", "sdpa"):
        monkeypatch.setattr("dovetail.kernels.attention.plan", lambda path=path, **_: Plan(path, "asked for"))
        q, k = (t.transpose(1, 2) for t in inputs[:2])
        score = module.score(q, k, ctx.coords, ctx, lambda rows, _: rows.unflatten(-1, (H, 8)))
        assert triton.kind(mask, score, 16, FP32) == "rows"
        assert triton.kind(mask, replace(score, value_terms=torch.add), 16, FP32) is None
        q, k = (t.transpose(1, 2) for t in module.rotate(q, k, ctx.coords, ctx))
        out, learned = attend(q, k, inputs[2], mask=mask, score=score, scale=SCALE), [*inputs, *module.parameters()]
        gradients = torch.autograd.grad(
            out.square().sum(), learned, materialize_grads=True
        )  # none for XLNet's segments
        found.append([out, *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["transformer_xl", "xlnet"])
def test_a_model_with_it_is_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases of the query, W_r and all else, over two documents and padding."""
    mixer = {"kind": "attention", "heads": H, "kv_heads": 1, "position": kind}
    spec = {"kind": "decoder", "vocab": 7, "dim": 32, "depth": 1, "blocks": {"mixer": mixer}}
    model = dt.build(spec | {"init": {"kind": "normal", "std": 0.3}}).to(DEVICE)
    x, number = torch.randint(0, 7, (1, 36), device=DEVICE), torch.arange(36, device=DEVICE)[None]
    packed = {"segments": number // 20, "attention_mask": number != 30}
    calls, found, own = [], [], triton.attend
    monkeypatch.setattr(triton, "attend", lambda *a: calls.append(a) or own(*a))
    for path in ("triton", "sdpa"):
        monkeypatch.setattr("dovetail.kernels.attention.plan", lambda path=path, **_: Plan(path, "asked for"))
        logits, learned = model(x, **packed).logits[:, :30], dict(model.named_parameters())
        gradients = torch.autograd.grad(logits.square().sum(), list(learned.values()), materialize_grads=True)
        assert all(g.abs().max() > 0 or n.endswith((".s", ".e")) for n, g in zip(learned, gradients, strict=True))
        found.append([logits, *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    ((*_, mask, score, _),) = calls
    assert triton.kind(mask, score, 16, FP32) == "rows"


def test_what_is_not_in_step_is_not_served() -> None:
    """Positions that somebody gave, which may be as far apart as they like; among them XLNet's, with segments."""
    slot, q, where = Slot(dim=16, heads=H, head_dim=8, init=Normal()), torch.zeros(1, 9, H, 8), torch.arange(9)[None]
    for part, positions in (
        (TransformerXL(), where * 5),
        (XLNet(), where),
        (XLNet(), torch.stack([where, where // 4], -1)),
    ):
        module, ctx = part.build(slot), Context.of(1, 9, torch.device("cpu"), positions=positions)
        assert isinstance(module, PositionModule)
        score = module.score(q, q, ctx.coords, ctx, lambda rows, _: rows)
        assert score.relative is None and triton.kind(ctx.bind(Full()), score, 16, FP32) is None


@pytest.mark.parametrize(
    "position", ["t5_buckets", "alibi", "deberta", "transformer_xl", "xlnet", KEYS.to_dict()], ids=str
)
def test_plans_say_so(position: Any) -> None:
    mixer = {"kind": "attention", "heads": 2, "position": position}
    spec = {"kind": "decoder", "vocab": 7, "dim": 16, "depth": 1, "blocks": {"mixer": mixer}}
    plans = dt.build(spec).blocks[0].mixer.plans("cuda", 64)
    assert [plan.path for plan in plans.values()] == ["triton", "triton", "sdpa"]


def test_a_prefill_is_in_step_and_what_follows_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan's word on prompts that begin a state; a prompt that goes on from one has other distances."""
    blocks = {"mixer": {"kind": "attention", "heads": 2, "position": "t5_buckets"}}
    model = dt.build({"kind": "decoder", "vocab": 7, "dim": 16, "depth": 1, "blocks": blocks}).eval()
    seen: list[bool] = []

    def asked(mask: Any, **_: Any) -> Plan:
        seen.append(mask.at.in_step)
        return Plan("sdpa", "asked for")

    monkeypatch.setattr("dovetail.kernels.attention.plan", asked)
    state, tokens = model.new_state(1, 16), torch.randint(0, 7, (1, 5))
    with torch.no_grad():
        for _ in range(2):
            model(tokens, state=state)
        model(tokens, state=model.new_state(1, 16), positions=3 * torch.arange(5)[None])
    assert seen == [True, False, False]
