"""Own attention kernels: flash attention from first principles, with a score that depends on the distance, and with spans.

What scaled_dot_product_attention has no kernel for, or builds (T,S) numbers for: tables of distances (T5, ALiBi, KERPLE,
Sandwich) in O(T) memory, with their gradients, terms of content and distance (Shaw, DeBERTa, Transformer-XL) in
O(T · reach), and windows at the cost of the tiles that they show. Read `forward`, then `backward`, `diagonals` and `by_row`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.kernels.attention.coords import BoundMask, Span
from dovetail.kernels.attention.score import Score
from dovetail.kernels.attention.triton import content, few_queries, operator, two_forms
from dovetail.kernels.attention.triton.sizes import WIDEST

# What these kernels get on CUDA, of what `kind` names, "decode" and "regions": docs/results/attention_triton.json, sparse.json.
# Windows and dilated masks won forward and backward; tables hold O(T) numbers at the speed of a dense mask or above, but for
# ALiBi's backward (0.95x); rows and regions had no kernel but tiles of plain products. Documents lost to FlexAttention.
# Few queries over a state (decode): docs/results/decode_gpu.json.
OWN: tuple[str, ...] = ("decode", "table", "rows", "window", "dilated", "regions")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BoundMask | None, score: Score | None, scale: float) -> Tensor:
    """(B,H,T,Dv), for what `kind` names."""
    if mask is not None and _dilates(mask):
        return _dilated(q, k.to(q.dtype), v.to(q.dtype), mask, scale)
    span = _span(mask)
    assert span is not None
    relative = None if score is None else score.relative
    if relative is not None:
        k, v, places = k.to(q.dtype), v.to(q.dtype), _places(mask, span, True)
        of_query, of_key = relative
        more = (of_query.values, None if of_key is None else of_key.values, of_query.back, of_query.inside_scale)
        return content.attend(q, k, v, *more, span, scale, places)[0]
    table = None
    if score is not None and score.terms:
        table = score.along(max(q.shape[2], k.shape[2]), scale, q.device)
    k, v = k.to(q.dtype), v.to(q.dtype)
    return operator.attend(q, k, v, table, span, scale, _places(mask, span, table is not None))[0]


def decode(q: Tensor, k: Tensor, v: Tensor, mask: BoundMask | None, score: Score | None, scale: float) -> Tensor:
    """(B,H,T,Dv) of a few queries, where `decodes`: the keys of a row are split among programs (`split_keys`)."""
    span = _span(mask)
    assert span is not None
    cap = None if score is None else score.cap
    return few_queries.attend(q, k.to(q.dtype), v.to(q.dtype), mask, span, scale, cap)[0]


def decodes(mask: BoundMask | None, score: Score | None, queries: int, width: int, dtype: torch.dtype) -> bool:
    """Whether `decode` serves this: few queries, a mask that is a span (of any coordinates), no score but a cap, no gradients."""
    widest = few_queries.WIDEST_FP32 if dtype == torch.float32 else few_queries.WIDEST
    fits = queries <= few_queries.QUERIES and width <= widest and dtype != torch.float64
    plain = score is None or (not score.terms and score.value_terms is None)
    return fits and plain and _span(mask) is not None and not torch.is_grad_enabled()


def region(q: Tensor, k: Tensor, v: Tensor, mask: BoundMask | None, scale: float) -> tuple[Tensor, Tensor]:
    """out (B,H,T,Dv) and lse (B,H,T) in fp32 of one of several sets of keys, where `kind` is not None."""
    span = _span(mask)
    assert span is not None
    return operator.attend(q, k.to(q.dtype), v.to(q.dtype), None, span, scale, _places(mask, span, False))


def pair(
    q: Tensor, k: Tensor, q2: Tensor, k2: Tensor, v: Tensor, masks: tuple[BoundMask, BoundMask], scale: float
) -> tuple[Tensor, Tensor]:
    """`region` of two sets at once, where they `pairs`."""
    spans, places = _both(masks)
    k, q2, k2, v = (t.to(q.dtype) for t in (k, q2, k2, v))
    return two_forms.attend(q, k, q2, k2, v, spans, scale, places)


def pair_backward(
    d_out: Tensor, q: Tensor, k: Tensor, q2: Tensor, k2: Tensor, v: Tensor, masks: tuple[BoundMask, BoundMask],
    out: Tensor, lse: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, q2, k2 and v from the out and lse of all sets together."""
    spans, places = _both(masks)
    k, q2, k2, v = (t.to(q.dtype) for t in (k, q2, k2, v))
    return two_forms.backward(d_out, q, k, q2, k2, v, out.to(q.dtype), lse, spans, scale, places)


def pairs(a: BoundMask | None, b: BoundMask | None) -> bool:
    """Whether two sets, both where `kind` is not None, are over the same tokens."""
    if a is None or b is None or a.at is not b.at:
        return False
    spans = _span(a), _span(b)
    return spans[0] is not None and spans[1] is not None and spans[0].apart == spans[1].apart


def _both(masks: tuple[BoundMask, BoundMask]) -> tuple[tuple[Span, Span], tuple[Tensor, Tensor] | None]:
    a, b = (_span(mask) for mask in masks)
    assert a is not None and b is not None
    return (a, b), _places(masks[0], a, True)


def region_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: BoundMask | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the out and lse of all sets together."""
    span = _span(mask)
    assert span is not None
    given, places = (q, k.to(q.dtype), v.to(q.dtype)), _places(mask, span, False)
    return operator.backward(d_out, *given, out.to(q.dtype), lse, span, scale, places)


def kind(mask: BoundMask | None, score: Score | None, width: int, dtype: torch.dtype) -> str | None:
    """Which of "table", "rows", "documents", "dilated", "window" and "plain" this is, where the kernels serve it, or None. Static facts alone.

    Padded and packed rows are served where queries and keys are the same tokens.
    """
    if width > WIDEST or dtype == torch.float64 or (score is not None and not (score.tabled or score.relative)):
        return None
    if mask is not None and _dilates(mask) and (score is None or not score.terms):
        return "dilated"
    span = _span(mask)
    there = mask is not None and (mask.at.aligned or mask.at.q is mask.at.k)
    if span is None or not (there or span == Span()):
        return None
    if score is not None and score.terms:
        found = "rows" if score.relative else "table"
        return found if mask is not None and there and mask.at.in_step else None
    if mask is not None and not mask.at.aligned and span != Span():
        return "documents"
    return "plain" if span[:3] in ((None, None, 0), (None, 0, 0)) else "window"


def _span(mask: BoundMask | None) -> Span | None:
    """As a band of all distances in it."""
    span = Span() if mask is None or mask.full else mask.rule.span()
    return span if span is not None and span.step == 1 else None


def _dilates(mask: BoundMask) -> bool:
    """Whether it is a band of every n-th distance over tokens that lie in step, or can be filled up to where they do."""
    span, T = mask.rule.span(), mask.at.q.order.shape[1]
    if mask.full or span is None or span.step == 1 or span.sinks or not mask.at.aligned:
        return False
    return T % span.step == 0 or (span.after is not None and span.after <= 0)


def _dilated(q: Tensor, k: Tensor, v: Tensor, mask: BoundMask, scale: float) -> Tensor:
    """Tokens see others of their own residue alone: each residue is a row, with heads of its own, a view of (B,T,H,D)."""
    span = mask.rule.span()
    assert span is not None
    (B, H, T, _), step = q.shape, span.step
    before, after = (None if bound is None else bound // step for bound in span[:2])
    q, k, v = (_residues(t, step) for t in (q, k, v))
    out = operator.attend(q, k, v, None, Span(before, after), scale)[0]
    return out.transpose(1, 2).reshape(B, -1, H, v.shape[3])[:, :T].transpose(1, 2)


def _residues(x: Tensor, step: int) -> Tensor:
    """(B,H,T,D) as (B,step·H,ceil(T/step),D), the heads of a residue side by side."""
    x = x.transpose(1, 2)
    if x.shape[1] % step:  # a padding of nothing would be a copy
        x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % step))
    return x.unflatten(1, (-1, step)).flatten(2, 3).transpose(1, 2)


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
