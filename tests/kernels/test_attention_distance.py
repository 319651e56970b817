"""A bias computed from the distance: every path gives what a table of the same numbers gives, with gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dovetail.kernels.attention import (
    BoundMask,
    Coords,
    Distance,
    Region,
    RelativeLogits,
    Score,
    Side,
    Toeplitz,
    attend,
    plan,
    reference,
    sdpa,
)
from dovetail.kernels.attention.regions import attend_regions
from dovetail.parts.context import Context
from dovetail.parts.mask import Causal, Full, Window

T, H = 9, 4


def coords() -> Coords:
    """Two rows, the second beginning at position 5."""
    order = torch.arange(T)[None].expand(2, -1)
    side = Side(order, None, (order + torch.tensor([[0], [5]]))[..., None])
    return Coords(side, side)


def pair(weights: Tensor, inside: bool, cap: float | None) -> list[Score]:
    """The term -w·d² (H,) as a function, and as a table."""
    squares = (torch.arange(2 * T - 1) - T + 1).double() ** 2
    table = -weights[:, None] * squares
    return [
        Score((Distance(lambda d: -weights[:, None, None] * d.double() ** 2, inside_scale=inside),), cap=cap),
        Score((Toeplitz(table, lambda d: d + T - 1, inside_scale=inside),), cap=cap),
    ]


@pytest.mark.parametrize("rule", [Full(), Causal(), Window(size=3)], ids=lambda r: r.kind)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("cap", [None, 4.0])
def test_a_function_is_its_table(rule: Causal, inside: bool, cap: float | None) -> None:
    q, k, v = (torch.randn(2, n, T, 6, dtype=torch.float64, requires_grad=True) for n in (H, 2, 2))
    weights = torch.rand(H, dtype=torch.float64, requires_grad=True)
    mask, scale = BoundMask(rule, coords()), 0.4
    ours, theirs = pair(weights, inside, cap)
    wanted = reference.attend(q, k, v, mask, theirs, scale)[0]
    pull = torch.randn_like(wanted)
    gradients = torch.autograd.grad((wanted * pull).sum(), (q, k, v, weights), retain_graph=True)
    for found in (
        attend(q, k, v, mask=mask, score=ours, scale=scale),
        reference.attend(q, k, v, mask, ours, scale)[0],
        reference.attend_tiled(q, k, v, mask, ours, scale, tile=4),
        attend_regions([Region(k, v, mask, ours)], q, scale),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        for a, b in zip(torch.autograd.grad((found * pull).sum(), (q, k, v, weights)), gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan_is_that_of_a_table(device: str) -> None:
    for scores in zip(pair(torch.ones(H), False, None), pair(torch.ones(H), False, 4.0), strict=True):
        for score in scores:
            chosen = plan(
                device=device, dtype=torch.bfloat16, queries=512, mask=BoundMask(Causal(), coords()), score=score
            )
            assert chosen.path == ("tiled" if score.cap else "sdpa")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("inside", [True, False])
def test_rows_and_columns_widen_queries_and_keys(masked: bool, inside: bool) -> None:
    """fp64, grouped heads, a grid of 3 x 4, tables that end before it does; in windows, some of whose tokens are hidden."""
    height, width, back = 3, 4, 2
    ctx = Context.on_grid(height, width, torch.device("cpu"), segments=torch.arange(12)[None] // 9 if masked else None)
    q, k, v = (torch.randn(2, n, 12, 6, dtype=torch.float64, requires_grad=True) for n in (H, 2, 2))
    values = [torch.randn(2, H, 12, 2 * back + 1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    score = Score(tuple(
        RelativeLogits(t, back, axis, inside, places=places) for t, axis, places in zip(values, (0, 1), (height, width))
    ))  # fmt: skip
    mask, leaves = ctx.bind(Full()), [q, k, v, *values]
    wanted = reference.attend(q, k, v, mask, score, 0.3)[0]
    pull = torch.randn_like(wanted)
    gradients = torch.autograd.grad((wanted * pull).sum(), leaves, retain_graph=True)
    for found in (attend(q, k, v, mask=mask, score=score, scale=0.3), sdpa.attend(q, k, v, mask, score, 0.3, 0.0)):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        for a, b in zip(torch.autograd.grad((found * pull).sum(), leaves), gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert "rows and columns" in plan(device="cuda", dtype=torch.bfloat16, queries=12, mask=mask, score=score).why
    assert (
        not Score(score.terms, cap=2.0).gridded
        and not Score(score.terms[:1] + pair(torch.ones(H), inside, None)[0].terms).gridded
    )
