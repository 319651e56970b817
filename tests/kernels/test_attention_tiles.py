"""Attention by tiles on a CPU: what a mask leaves empty is never computed, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.kernels.attention import BoundMask, Coords, Side, attend, bands, plan, reference
from dovetail.kernels.attention.plan import visited
from dovetail.parts.mask import Band, Causal, Dilated, Document, Fixed, Globals, Mask, Strided, Window
from dovetail.parts.random_blocks import RandomBlocks

T = 700  # neither a whole number of tiles nor of bands
BIGBIRD = Band(before=100, after=100) | Globals(length=60) | RandomBlocks(size=64, count=1, among=11)
RULES: dict[str, Mask] = {
    "window": Window(size=90),
    "band": Band(before=30, after=70),
    "dilated window": Window(size=180) & Dilated(step=4),
    "longformer": Band(before=64, after=64) | Globals(length=3),
    "bigbird": BIGBIRD,
    "causal bigbird": Causal() & BIGBIRD,
    "fixed": Causal() & Fixed(stride=128, summary=4),
    "strided": Causal() & Strided(stride=200),
    "blocks that jump": RandomBlocks(size=128, count=1, seed=3),
    "nothing for the first": Causal() & Band(before=900, after=-300),
}
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}


def tensors(dtype: torch.dtype, queries: int = T) -> list[Tensor]:
    shapes = ((4, queries, 8), (2, T, 8), (2, T, 5))
    return [torch.randn(2, *shape).to(dtype).requires_grad_() for shape in shapes]


def same(ours: Tensor, theirs: Tensor, inputs: list[Tensor], dtype: torch.dtype) -> None:
    weights = torch.randn_like(theirs)
    a = torch.autograd.grad((ours.to(theirs.dtype) * weights).sum(), inputs)
    b = torch.autograd.grad((theirs * weights).sum(), inputs)
    for x, y in zip([ours, *a], [theirs, *b], strict=True):
        assert torch.isfinite(x).all()
        assert (x - y).abs().max() <= BOUND[dtype] * y.abs().max().clamp_min(1.0)


def sides(packed: bool) -> Side:
    order = torch.arange(T)[None].expand(2, -1)
    if not packed:
        return Side(order[:1])
    segments = torch.stack([(torch.arange(T) > 300).long(), torch.where(torch.arange(T) < 600, 0, -1)])
    return Side(order, segments)


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_tiles_equal_the_dense_mask(rule: Mask, packed: bool) -> None:
    """Outputs and gradients, grouped heads, values of another width, rows of the batch that see different tiles."""
    side, given = sides(packed), [t.detach() for t in tensors(torch.bfloat16)]  # which every type holds
    mask = BoundMask(rule & Document() if packed else rule, Coords(side, side))
    wide = [t.double().requires_grad_() for t in given]
    theirs, _ = reference.attend(*wide, mask, None, 0.3)
    weights = torch.randn_like(theirs)
    theirs = [theirs, *torch.autograd.grad((theirs * weights).sum(), wide)]
    for dtype in BOUND:
        qkv = [t.to(dtype).requires_grad_() for t in given]
        out = bands.attend(*qkv, mask, 0.3)
        ours = [out, *torch.autograd.grad((out.double() * weights).sum(), qkv)]
        for x, y in zip(ours, theirs, strict=True):
            assert torch.isfinite(x).all()
            assert (x.double() - y).abs().max() <= BOUND[dtype] * y.abs().max().clamp_min(1.0), dtype


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many scores every band computes for one head of one row, in tiles of 128 x 128."""
    found: list[int] = []
    plain = bands._Band.probabilities

    def counted(band: Any) -> Tensor:
        p = plain(band)
        rows = -(-(band.rows.stop - band.rows.start) // bands.TILE)
        found.append(rows * -(-p.shape[2] // bands.TILE))
        return p

    monkeypatch.setattr(bands._Band, "probabilities", counted)
    return found


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_cost_is_that_of_the_tiles_which_hold_anything(rule: Mask, scores: list[int]) -> None:
    """Forward and backward compute as many tiles as the mask's own map has (a band that sees nothing counts as one)."""
    mask = BoundMask(rule, Coords(sides(False), sides(False)))
    qkv = tensors(torch.float32)
    out = bands.attend(*qkv, mask, 0.3)
    wanted = int(mask.tiles(bands.TILE)[0].sum(1).clamp_min(1).sum())
    assert sum(scores) == wanted < 36
    torch.autograd.grad(out.sum(), qkv)
    assert sum(scores) == 2 * wanted


@pytest.mark.parametrize("rule", [Window(size=128), Window(size=512) & Dilated(step=4), BIGBIRD], ids=lambda r: r.kind)
def test_twice_the_length_is_twice_the_cost(rule: Mask, scores: list[int]) -> None:
    """Within 15%, by a mask whose tiles grow with the length: the window's and the seen blocks' of each query."""
    costs = []
    for length in (2048, 4096):
        scores.clear()
        side = Side(torch.arange(length)[None])
        q = torch.randn(1, 1, length, 4)
        mask = BoundMask(Causal() & rule, Coords(side, side))
        bands.attend(q, q, q, mask, 0.3)
        costs.append(sum(scores))
        assert costs[-1] == int(mask.tiles(bands.TILE).sum())
    assert 2 * 0.85 < costs[1] / costs[0] < 2 * 1.15


def test_the_map_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plain = bands.tiles
    monkeypatch.setattr(bands, "tiles", lambda seen: made.append(1) or plain(seen))
    mask = BoundMask(Window(size=90), Coords(sides(False), sides(False)))
    for _ in range(3):
        bands.attend(*tensors(torch.float32), mask, 0.3)
    assert len(made) == 1
    assert torch.equal(mask.memo["tiles"], mask.tiles(bands.TILE))


def test_the_plan_takes_tiles_where_they_win() -> None:
    """A sparse rule over enough queries, in fp32 too; the share of tiles is the rule's and the lengths', never the data's."""
    side = Side(torch.arange(2048)[None])
    for rule, path in [(Window(size=128), "bands"), (Causal() & Dilated(step=2), "sdpa"), (Document(), "sdpa")]:
        mask = BoundMask(rule, Coords(side, side))
        chosen = plan(device="cpu", dtype=torch.float32, queries=2048, mask=mask, score=None)
        assert chosen.path == path
        share = mask.tiles(128).float().mean().item()
        assert visited(rule, 2048, 2048) == pytest.approx(share)
        assert path == "sdpa" or f"{share:.0%}" in chosen.why
        short = plan(device="cpu", dtype=torch.float32, queries=200, mask=mask, score=None)
        assert short.path == "sdpa"
    assert visited(Window(size=128), 256, 2048) == pytest.approx(4 / 32)  # the last queries of a longer past
    qkv = tensors(torch.float32)
    mask = BoundMask(Window(size=90), Coords(sides(False), sides(False)))
    chosen = plan(device="cpu", dtype=torch.float32, queries=T, mask=mask, score=None)
    expected = reference.attend(*[t.double() for t in qkv], mask, None, 0.3)[0]
    assert chosen.path == ("bands" if visited(mask.rule, T, T) <= 0.35 else "sdpa")
    same(attend(*qkv, mask=mask, scale=0.3), expected.float(), qkv, torch.float32)


def test_compiled_attention_under_a_sparse_mask_is_the_same() -> None:
    mask = BoundMask(Window(size=90), Coords(sides(False), sides(False)))
    qkv = tensors(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        given = [t.detach().to(dtype) for t in qkv]

        def run(*t: Tensor) -> Tensor:
            return attend(*t, mask=BoundMask(mask.rule, mask.at), scale=0.3)

        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(*given)
        assert (compiled - run(*given)).abs().max() <= BOUND[dtype]
