"""The kernels as one operation, which autograd and compilers see whole; `launch` has what it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dovetail.kernels.attention.coords import Span
from dovetail.kernels.attention.triton.shapes import like
from dovetail.kernels.operation import operation


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    span: Span,
    scale: float,
    places: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B,H,T,E) in q's type and lse (B,H,T) in fp32, natural, -inf for an empty row; both have gradients.

    q (B,H,T,D), k (B,G,S,D), v (B,G,S,E) in one type; D and E at most `sizes.WIDEST`. table (H,2·reach+1), or None: what
    is added to a score whose key is `d` behind its query stands at d + reach, and beyond at the ends. scale > 0.
    places: order and segment of queries (B|1,2,T) and keys (B|1,2,S), int32, by which `span` and `table` go and outside
    of whose segment, or with a negative one, no key is seen; None: rows are 0, 1, ... in one segment.
    """
    assert scale > 0, "the largest score is that of the largest product"
    E = v.shape[3]
    q, k, v = even(q), even(k), even(v)
    out, lse = _forward(q, k, v, table, *(places or (None, None)), *span[:3], scale)
    return cut(out, E), lse


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    span: Span,
    scale: float,
    places: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v where they are a part of a softmax over more keys, whose out and lse these are."""
    given = [even(t) for t in (q, k, v)]
    known = (None, *(places or (None, None)), even(out), lse, *span[:3], scale)
    d_q, d_k, d_v, _ = _backward(even(d_out.to(q.dtype)), None, *given, *known)
    return cut(d_q, q.shape[3]), cut(d_k, k.shape[3]), cut(d_v, v.shape[3])


def even(x: Tensor) -> Tensor:
    """x with vectors of whole 16 bytes, which is what the copy engine moves."""
    unit = 16 // x.element_size()
    return x if x.shape[3] % unit == 0 else torch.nn.functional.pad(x, (0, -x.shape[3] % unit))


def cut(x: Tensor, width: int) -> Tensor:
    """x without what `even` has added; itself where that is nothing."""
    return x if x.shape[3] == width else x[..., :width]


def _places(queries: Tensor | None, keys: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if queries is None or keys is None else (queries, keys)


@operation("triton_attention")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    q_places: Tensor | None,
    k_places: Tensor | None,
    before: int | None,
    after: int | None,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from dovetail.kernels.attention.triton import launch

    return launch.forward(q, k, v, table, _places(q_places, k_places), Span(before, after, sinks), scale)


@operation("triton_attention_backward")
def _backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None,
    q_places: Tensor | None, k_places: Tensor | None, out: Tensor, lse: Tensor,
    before: int | None, after: int | None, sinks: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from dovetail.kernels.attention.triton import launch

    places = _places(q_places, k_places)
    found = launch.backward(d_out, d_lse, q, k, v, table, places, out, lse, Span(before, after, sinks), scale)
    d_q, d_k, d_v, d_table = found
    return d_q, d_k, d_v, d_table


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    q_places: Tensor | None,
    k_places: Tensor | None,
    before: int | None,
    after: int | None,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return like(q, q.shape[1], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None,
    q_places: Tensor | None, k_places: Tensor | None, out: Tensor, lse: Tensor,
    before: int | None, after: int | None, sinks: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_table = q.new_empty((0,) if table is None else table.shape, dtype=torch.float32)
    return like(q, *q.shape[1::2]), like(k, *k.shape[1::2]), like(v, *v.shape[1::2]), d_table


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, table, q_places, k_places, *ctx.asked = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, table, q_places, k_places, *output)


def _differentiate(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, table, *places, out, lse = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    *found, d_table = _backward(d_out, d_lse, q, k, v, table, *places, out, lse, *ctx.asked)
    return *found, None if table is None else d_table.to(table.dtype), None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
