"""Attention whose scores get a term by query and distance, as one operation; `launch` has what it runs, `by_row` how."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dovetail.kernels.attention.coords import Span
from dovetail.kernels.attention.triton.operator import cut, even
from dovetail.kernels.attention.triton.shapes import like
from dovetail.kernels.operation import operation


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    values: Tensor,
    keyed: Tensor | None,
    back: int,
    inside: bool,
    span: Span,
    scale: float,
    places: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B,H,T,E) in q's type and lse (B,H,T) in fp32, natural, -inf for an empty row; both have gradients.

    q, k, v, span, scale, places: as `operator.attend` has them. values (B,H,T,W), W > 1, in any type up to fp32: what is
    added to the score of query i and a key at distance d = j - i is values[..., i, d + back], times `scale` where `inside`;
    beyond the ends, what stands there. keyed (B,H,S,W), or None: of the key's instead, keyed[..., j, d + back], added too.
    """
    assert scale > 0, "the largest score is that of the largest product"
    assert values.shape[:3] == q.shape[:3] and 0 <= back < values.shape[3] > 1 and values.dtype != torch.float64
    assert keyed is None or keyed.shape == (*q.shape[:2], k.shape[2], values.shape[3])
    E = v.shape[3]
    q, k, v = even(q), even(k), even(v)
    factor = scale if inside else 1.0
    out, lse = _forward(q, k, v, values, keyed, *(places or (None, None)), *span[:3], scale, back, factor)
    return cut(out, E), lse


@operation("triton_attention_rows")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, values: Tensor, keyed: Tensor | None,
    q_places: Tensor | None, k_places: Tensor | None,
    before: int | None, after: int | None, sinks: int, scale: float, back: int, factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from dovetail.kernels.attention.triton import launch

    places = None if q_places is None or k_places is None else (q_places, k_places)
    content = launch.Rows(values, keyed, back, factor)
    return launch.forward(q, k, v, None, places, Span(before, after, sinks), scale, content=content)


@operation("triton_attention_rows_backward")
def _backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, values: Tensor, keyed: Tensor | None,
    q_places: Tensor | None, k_places: Tensor | None, out: Tensor, lse: Tensor,
    before: int | None, after: int | None, sinks: int, scale: float, back: int, factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from dovetail.kernels.attention.triton import launch

    places = None if q_places is None or k_places is None else (q_places, k_places)
    content = launch.Rows(values, keyed, back, factor)
    d_q, d_k, d_v, d_values, *more = launch.backward(
        d_out, d_lse, q, k, v, None, places, out, lse, Span(before, after, sinks), scale, content=content
    )
    return d_q, d_k, d_v, d_values, more[0] if more else values.new_empty(0)


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, values: Tensor, keyed: Tensor | None,
    q_places: Tensor | None, k_places: Tensor | None,
    before: int | None, after: int | None, sinks: int, scale: float, back: int, factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return like(q, q.shape[1], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, values: Tensor, keyed: Tensor | None,
    q_places: Tensor | None, k_places: Tensor | None, out: Tensor, lse: Tensor,
    before: int | None, after: int | None, sinks: int, scale: float, back: int, factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_q, d_k, d_v = (like(t, *t.shape[1::2]) for t in (q, k, v))
    d_keyed = values.new_empty((0,) if keyed is None else keyed.shape, dtype=None if keyed is None else keyed.dtype)
    return d_q, d_k, d_v, values.new_empty(values.shape), d_keyed


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, values, keyed, q_places, k_places, *ctx.asked = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, values, keyed, q_places, k_places, *output)


def _differentiate(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, values, keyed, *places, out, lse = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    *found, d_keyed = _backward(d_out, d_lse, q, k, v, values, keyed, *places, out, lse, *ctx.asked)
    return *found, None if keyed is None else d_keyed, *(None,) * 8


_forward.register_autograd(_differentiate, setup_context=_keep)
