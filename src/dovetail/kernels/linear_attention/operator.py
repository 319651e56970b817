"""Causal linear attention as one operation, which autograd and compilers see whole; `triton` has what it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dovetail.kernels.linear_attention.chunked import Rows
from dovetail.kernels.linear_attention.spans import Sizes, like, sizes
from dovetail.kernels.operation import operation


def causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    rows: Rows,
    start: Tensor | None,
    least: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(B,H,T,E) in the inputs' type, and the last state, in fp32: (B,G,D,E), or (B,G,D,E+1) where `least` is given.

    decay (B|1,G|1,T), without a gradient. start: as the last state is. least: what the sum of a query's weights counts
    for at least, by which the output is divided then, and whose sum of keys is the state's last column.
    """
    narrow = dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if least is not None and dtype == torch.float16:
        dtype = torch.float32  # sums of weights leave fp16's range
    queries = keys = None
    if rows.document is not None:
        assert rows.real is not None
        queries = rows.document.expand(q.shape[0], -1).to(torch.int32).contiguous()
        keys = queries.where(rows.real, -1).contiguous()  # a mask may lie token by token, and `where` follows it
    if decay is not None:
        decay = decay.detach().to(torch.float32)
        decay = (decay if rows.real is None else decay.where(rows.real[:, None], 0.0)).contiguous()
    start = None if start is None else start.to(torch.float32)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    out, end, _, _ = _forward(q, k, v, decay, queries, keys, start, least)
    return out.to(narrow), end


@operation("causal_linear_attention")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    queries: Tensor | None,
    keys: Tensor | None,
    start: Tensor | None,
    least: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from dovetail.kernels.linear_attention import triton

    gates = triton.Gates(decay, queries, keys)
    return triton.forward(_dense(q), _dense(k), _dense(v), gates, start, least, _sizes(q, v))


@operation("causal_linear_attention_backward")
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    queries: Tensor | None,
    keys: Tensor | None,
    states: Tensor,
    begins: bool,
    out: Tensor,
    total: Tensor,
    least: float | None,
    d_out: Tensor,
    d_end: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from dovetail.kernels.linear_attention import triton

    gates = triton.Gates(decay, queries, keys)
    q, k, v, d_out = (_dense(t) for t in (q, k, v, d_out))
    return triton.backward(q, k, v, gates, states, begins, out, total, least, d_out, d_end, _sizes(q, v))


def _dense(x: Tensor) -> Tensor:
    """x (B,H,T,D) whose entries of one token lie side by side, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(q: Tensor, v: Tensor) -> Sizes:
    found = sizes(q.shape[0] * q.shape[1], q.shape[2], max(q.shape[3], v.shape[3]), q.dtype)
    # Of 16 columns two groups of four warps would have 8 each, of which Triton 3.6 reads more (triton-lang/triton#10629).
    return found if min(q.shape[3], v.shape[3]) > 16 else found._replace(warps=4)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    queries: Tensor | None,
    keys: Tensor | None,
    start: Tensor | None,
    least: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, H, T, D), G, E = q.shape, k.shape[1], v.shape[3]
    column, N = int(least is not None), -(-T // _sizes(q, v).span)
    shapes = (B, G, D, E + column), (B, G, N, D, E + column), (B, H, T) if column else (0,)
    end, states, total = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return like(q, H, E), end, states, total


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    queries: Tensor | None,
    keys: Tensor | None,
    states: Tensor,
    begins: bool,
    out: Tensor,
    total: Tensor,
    least: float | None,
    d_out: Tensor,
    d_end: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, G, _, D, width), H, E = states.shape, q.shape[1], v.shape[3]
    d_start = q.new_empty((B, G, D, width) if begins else (0, 0), dtype=torch.float32)
    return like(q, H, D), like(k, G, D), like(v, G, E), d_start


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, decay, queries, keys, start, ctx.least = inputs
    out, _, states, total = output
    ctx.begins = start is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, decay, queries, keys, states, out if ctx.least is not None else total, total)


def _differentiate(ctx: Any, d_out: Tensor | None, d_end: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, decay, queries, keys, states, out, total = ctx.saved_tensors
    if d_out is None:
        d_out = like(q, q.shape[1], v.shape[3]).zero_()
    *found, d_start = _backward(q, k, v, decay, queries, keys, states, ctx.begins, out, total, ctx.least, d_out, d_end)
    return *found, None, None, None, (d_start if ctx.begins else None), None


_forward.register_autograd(_differentiate, setup_context=_keep)
