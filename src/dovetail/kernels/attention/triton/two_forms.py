"""Two forms of the same tokens' queries and keys in one kernel, as ReRoPE has them: near pairs see one, far pairs the other.

A program walks the near tiles with one form and the far ones with the other, under one maximum and one sum; in the
backward dv of both is summed where it arises. So two regions cost their tiles, and a second pass over queries and keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.kernels.attention.coords import Span
from dovetail.kernels.attention.triton.operator import cut, even
from dovetail.kernels.attention.triton.shapes import like
from dovetail.kernels.operation import operation

Places = tuple[Tensor, Tensor] | None


def attend(
    q: Tensor, k: Tensor, q2: Tensor, k2: Tensor, v: Tensor, spans: tuple[Span, Span], scale: float, places: Places
) -> tuple[Tensor, Tensor]:
    """out (B,H,T,E) in q's type and lse (B,H,T) in fp32 of one softmax over both forms, whose spans share no pair.

    q, q2 (B,H,T,D), k, k2 (B,G,T,D), v (B,G,T,E) in one type. places: as `operator.attend` has them. No gradient:
    `backward` gives it.
    """
    E = v.shape[3]
    q, k, q2, k2, v = (even(t) for t in (q, k, q2, k2, v))
    out, lse = _forward(q, k, q2, k2, v, *(places or (None, None)), *spans[0][:3], *spans[1][:3], scale)
    return cut(out, E), lse


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, q2: Tensor, k2: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    spans: tuple[Span, Span], scale: float, places: Places,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, q2, k2 and v from the out and lse of all keys together, of which these may be a part."""
    D, E = q.shape[3], v.shape[3]
    given = [even(t) for t in (d_out.to(q.dtype), q, k, q2, k2, v, out)]
    *found, d_v = _backward(*given, lse, *(places or (None, None)), *spans[0][:3], *spans[1][:3], scale)
    d_q, d_k, d_q2, d_k2 = (cut(t, D) for t in found)
    return d_q, d_k, d_q2, d_k2, cut(d_v, E)


@operation("triton_attention_pair")
def _forward(
    q: Tensor, k: Tensor, q2: Tensor, k2: Tensor, v: Tensor, q_places: Tensor | None, k_places: Tensor | None,
    before: int | None, after: int | None, sinks: int, before2: int | None, after2: int | None, sinks2: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from dovetail.kernels.attention.triton import launch

    places = None if q_places is None or k_places is None else (q_places, k_places)
    second = launch.Second(q2, k2, Span(before2, after2, sinks2))
    return launch.forward(q, k, v, None, places, Span(before, after, sinks), scale, second)


@operation("triton_attention_pair_backward")
def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, q2: Tensor, k2: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    q_places: Tensor | None, k_places: Tensor | None, before: int | None, after: int | None, sinks: int,
    before2: int | None, after2: int | None, sinks2: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from dovetail.kernels.attention.triton import launch

    places = None if q_places is None or k_places is None else (q_places, k_places)
    second = launch.Second(q2, k2, Span(before2, after2, sinks2))
    d_q, d_k, d_v, _, d_q2, d_k2 = launch.backward(
        d_out, None, q, k, v, None, places, out, lse, Span(before, after, sinks), scale, second
    )
    return d_q, d_k, d_q2, d_k2, d_v


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, q2: Tensor, k2: Tensor, v: Tensor, q_places: Tensor | None, k_places: Tensor | None,
    before: int | None, after: int | None, sinks: int, before2: int | None, after2: int | None, sinks2: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return like(q, q.shape[1], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, q2: Tensor, k2: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    q_places: Tensor | None, k_places: Tensor | None, before: int | None, after: int | None, sinks: int,
    before2: int | None, after2: int | None, sinks2: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_q, d_k, d_q2, d_k2, d_v = (like(t, *t.shape[1::2]) for t in (q, k, q2, k2, v))
    return d_q, d_k, d_q2, d_k2, d_v
