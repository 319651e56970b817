"""Attention of few queries, of which `split_keys` has the kernels, as operations that compilers see whole. No gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.kernels.attention.coords import BoundMask, Span
from dovetail.kernels.attention.triton.shapes import BLOCK
from dovetail.kernels.operation import operation

QUERIES = 16  # at most: a step of decoding, or the tokens that a draft has guessed
WIDEST = 576  # of a head's queries, keys and values: a latent of 512 and its turned part
WIDEST_FP32 = 256  # where these are fp32: of more no tile fits
_VALUES = 512  # widest values at a time


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BoundMask | None, span: Span, scale: float, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """out (B,H,T,E) in q's type and lse (B,H,T) in fp32, natural, -inf for a query that sees no key.

    q (B,H,T,D) with T at most QUERIES, k (B,G,S,D), v (B,G,S,E) in one type with any strides: views of the buffers of a
    decoding state. span: that of the mask. cap: a soft cap on scores (Gemma 2). Which keys are seen at all is asked
    once for all that share the mask.
    """
    assert q.shape[2] <= QUERIES and max(q.shape[3], v.shape[3]) <= WIDEST
    if v.shape[3] > _VALUES:
        outs, lses = zip(*(attend(q, k, some, mask, span, scale, cap) for some in v.split(_VALUES, 3)), strict=True)
        return torch.cat(outs, 3), lses[0]
    if mask is None or mask.full:
        return _attend(q, k, v, None, None, None, None, None, None, None, 0, scale, cap)
    a, b = mask.at.q, mask.at.k
    apart = span.apart and a.segments is not None and b.segments is not None
    sides = (a.order, b.order, a.segments if apart else None, b.segments if apart else None)
    if "shown" not in mask.memo:
        mask.memo["shown"] = _shown(*sides, *span[:3])
    return _attend(q, k, v, *sides, mask.memo["shown"], *span[:3], scale, cap)


@operation("split_keys")
def _attend(
    q: Tensor, k: Tensor, v: Tensor, q_order: Tensor | None, k_order: Tensor | None, q_segments: Tensor | None,
    k_segments: Tensor | None, shown: Tensor | None, before: int | None, after: int | None, sinks: int, scale: float,
    cap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from dovetail.kernels.attention.triton import split_keys

    sides = None
    if q_order is not None and k_order is not None:
        sides = split_keys.Sides(q_order, k_order, q_segments, k_segments)
    return split_keys.forward(q, k, v, sides, shown, Span(before, after, sinks), scale, cap)


@operation("split_keys_shown")
def _shown(
    q_order: Tensor, k_order: Tensor, q_segments: Tensor | None, k_segments: Tensor | None, before: int | None,
    after: int | None, sinks: int,
) -> Tensor:  # fmt: skip
    from dovetail.kernels.attention.triton import split_keys

    return split_keys.shown(split_keys.Sides(q_order, k_order, q_segments, k_segments), Span(before, after, sinks))


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, q_order: Tensor | None, k_order: Tensor | None, q_segments: Tensor | None,
    k_segments: Tensor | None, shown: Tensor | None, before: int | None, after: int | None, sinks: int, scale: float,
    cap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, H, T, _ = q.shape
    return q.new_empty(B, T, H, v.shape[3]).transpose(1, 2), q.new_empty(B, T, H, dtype=torch.float32).transpose(1, 2)


@_shown.register_fake
def _(
    q_order: Tensor, k_order: Tensor, q_segments: Tensor | None, k_segments: Tensor | None, before: int | None,
    after: int | None, sinks: int,
) -> Tensor:  # fmt: skip
    sides = [t for t in (q_order, k_order, q_segments, k_segments) if t is not None]
    rows = max(t.shape[0] for t in sides)
    return k_order.new_empty(rows, -(-k_order.shape[1] // BLOCK), 2, dtype=torch.int32)
