"""The kernels as two operations, and how autograd and compilers see them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dovetail.kernels.operation import operation
from dovetail.kernels.rotary import reference
from dovetail.kernels.rotary.layout import Heads, Turning


def turned(x: Tensor, heads: Heads, turning: Turning) -> tuple[Tensor, Tensor, Tensor]:
    """kernels.rotary.turned of x (B,T,Σ) in fp32, bf16 or fp16.

    To a compiler forward is plain torch, fused with what is around; backward is one operation, which it leaves alone.
    """
    cos, sin, layout = turning
    known, (queries, keys, width, value_width) = x.detach(), heads
    if torch.compiler.is_compiling():
        parts = reference.turned(known, queries, keys, width, value_width, cos, sin, layout)
    else:
        with torch.no_grad():
            q, k = _forward(known, cos, sin, layout == "half", queries, keys, width)
        parts = q, k, known[..., -keys * value_width :].unflatten(-1, (keys, value_width))
    if not (torch.is_grad_enabled() and x.requires_grad):
        return parts
    return _Turned.apply(x, *parts, cos, sin, layout == "half")  # type: ignore[no-any-return]


class _Turned(torch.autograd.Function):
    """The parts, whose gradients go to x. They are made outside: what torch 2.11 finds made in a function, it keeps, and
    does not make again in a checkpointed block."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, half: bool
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.half = half
        return q.view_as(q), k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _backward(*gradients, cos, sin, ctx.half), None, None, None, None, None, None


@operation("rotary")
def _forward(
    x: Tensor, cos: Tensor, sin: Tensor, half: bool, queries: int, keys: int, width: int
) -> tuple[Tensor, Tensor]:
    from dovetail.kernels.rotary import triton

    return triton.forward(x, cos, sin, half, queries, keys, width)


@operation("rotary_backward")
def _backward(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    from dovetail.kernels.rotary import triton

    return triton.backward(d_q, d_k, d_v, cos, sin, half)


@_forward.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, half: bool, queries: int, keys: int, width: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:2], queries, width)), x.new_empty((*x.shape[:2], keys, width))


@_backward.register_fake
def _(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    return d_q.new_empty((*d_q.shape[:2], sum(d.shape[2] * d.shape[3] for d in (d_q, d_k, d_v))))
