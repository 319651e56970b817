"""Own attention kernels: flash attention from first principles, with a score that depends on the distance, and with spans.

What scaled_dot_product_attention has no kernel for, or builds (T,S) numbers for: tables of distances (T5, ALiBi, KERPLE,
Sandwich) in O(T) memory, with their gradients, and windows at the cost of the tiles that they show. Read `forward`, then
`backward` and `diagonals`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.kernels.attention.coords import BoundMask, Span
from dovetail.kernels.attention.score import Score
from dovetail.kernels.attention.triton import operator
from dovetail.kernels.attention.triton.sizes import WIDEST

# What these kernels get on CUDA, of what `kind` names, and "regions": what was measured to win.
OWN: tuple[str, ...] = ()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BoundMask | None, score: Score | None, scale: float) -> Tensor:
    """(B,H,T,Dv), for what `kind` names."""
    span = _span(mask)
    assert span is not None
    table = None
    if score is not None and score.terms:
        table = score.along(max(q.shape[2], k.shape[2]), scale, q.device)
    k, v = k.to(q.dtype), v.to(q.dtype)
    return operator.attend(q, k, v, table, span, scale, _places(mask, span, table is not None))[0]


def region(q: Tensor, k: Tensor, v: Tensor, mask: BoundMask | None, scale: float) -> tuple[Tensor, Tensor]:
    """out (B,H,T,Dv) and lse (B,H,T) in fp32 of one of several sets of keys, where `kind` is not None."""
    span = _span(mask)
    assert span is not None
    return operator.attend(q, k.to(q.dtype), v.to(q.dtype), None, span, scale, _places(mask, span, False))


def region_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: BoundMask | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the out and lse of all sets together."""
    span = _span(mask)
    assert span is not None
    given, places = (q, k.to(q.dtype), v.to(q.dtype)), _places(mask, span, False)
    return operator.backward(d_out, *given, out.to(q.dtype), lse, span, scale, places)


def kind(mask: BoundMask | None, score: Score | None, width: int, dtype: torch.dtype) -> str | None:
    """Which of "table", "documents", "window" and "plain" this is, where the kernels serve it, or None. Static facts alone.

    Padded and packed rows are served where queries and keys are the same tokens.
    """
    if width > WIDEST or dtype == torch.float64 or (score is not None and not score.tabled):
        return None
    span = _span(mask)
    there = mask is not None and (mask.at.aligned or mask.at.q is mask.at.k)
    if span is None or not (there or span == Span()):
        return None
    if score is not None and score.terms:
        return "table" if mask is not None and there and mask.at.in_step else None
    if mask is not None and not mask.at.aligned and span != Span():
        return "documents"
    return "plain" if span[:3] in ((None, None, 0), (None, 0, 0)) else "window"


def _span(mask: BoundMask | None) -> Span | None:
    return Span() if mask is None or mask.full else mask.rule.span()


def _places(mask: BoundMask | None, span: Span, table: bool) -> tuple[Tensor, Tensor] | None:
    """Order and segment of both sides, which are the same tokens, (B|1,2,T) each, once a forward; None where rows are
    0, 1, ... in one segment, or where it does not matter."""
    if mask is None or mask.at.aligned or (span == Span() and not table):
        return None
    at = mask.at
    if "places" not in mask.memo:
        segments = at.q.segments if span.apart and at.q.segments is not None else torch.zeros_like(at.q.order)
        rows = torch.broadcast_tensors(at.q.order, segments)
        mask.memo["places"] = torch.stack(rows, 1).to(torch.int32).contiguous()
    return mask.memo["places"], mask.memo["places"]
