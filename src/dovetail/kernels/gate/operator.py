"""The kernels as two operations, and how autograd and compilers see them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.kernels.gate import reference
from dovetail.kernels.linear import fp8
from dovetail.kernels.operation import operation


def gated(both: Tensor, activation: str) -> Tensor:
    """act(gate) · up (..., h) of both = gate|up (..., 2h) in fp32, bf16 or fp16; it alone is kept for the backward.

    To a compiler forward is plain torch, fused with what is around or made again where that is cheaper than keeping it;
    backward is one operation, which it leaves alone.
    """
    if torch.compiler.is_compiling():
        if not (torch.is_grad_enabled() and both.requires_grad):
            return reference.gated(both, activation)
        return _Backwards.apply(both, reference.gated(both.detach(), activation), activation)  # type: ignore[no-any-return]
    return _forward(both, activation)


def projected(both: Tensor, activation: str, weight: Tensor, in_fp8: bool = False) -> Tensor:
    """gated(both) Wᵀ (..., O), W (O,h) of the same type (but in_fp8), which keeps what `gated` does: the output of the gate, which the
    weight's gradient is made of, comes out of the gate's backward once more. in_fp8: products by `linear.fp8`."""
    known = both.detach()
    out = reference.gated(known, activation) if torch.compiler.is_compiling() else _forward(known, activation)
    if not in_fp8:
        return _Projects.apply(both, weight, F.linear(out, weight.detach()), activation)  # type: ignore[no-any-return]
    left, right = fp8.rounded(fp8.filled(out)), fp8.rounded(weight.detach())
    y = fp8.emptied(fp8.product(left, right, fp8.narrow(out), fast=True), out.shape)
    return _ProjectsInFp8.apply(both, weight, y, left.scale, right.scale, activation)  # type: ignore[no-any-return]


class _Projects(torch.autograd.Function):
    """`y`, whose gradient goes to `both` and `weight`; made outside, as below."""

    @staticmethod
    def forward(ctx: Any, both: Tensor, weight: Tensor, y: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(both, weight)
        ctx.activation = activation
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        both, weight = ctx.saved_tensors
        d_both, out = _backward_again(d_y @ weight, both, ctx.activation)
        return d_both, d_y.flatten(0, -2).t() @ out.flatten(0, -2), None, None


class _ProjectsInFp8(torch.autograd.Function):
    """The same, by products in 8 bits. scales: of the gate's output and of the weight."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, both: Tensor, weight: Tensor, y: Tensor, scale: Tensor, weight_scale: Tensor, activation: str
    ) -> Tensor:
        ctx.save_for_backward(both, weight, scale, weight_scale)
        ctx.activation = activation
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        both, weight, scale, weight_scale = ctx.saved_tensors
        d = fp8.rounded(fp8.filled(d_y), fp8.GRADIENT)
        d_out = fp8.emptied(fp8.input_gradient(d, weight, weight_scale, both.dtype), d_y.shape)
        d_both, out = _backward_again(d_out, both, ctx.activation)
        d_weight = fp8.weight_gradient(d, fp8.rounded(fp8.filled(out), scale=scale), weight.dtype)
        return d_both, d_weight, None, None, None, None


class _Backwards(torch.autograd.Function):
    """`out`, whose gradient goes to `both`. It is made outside: what torch 2.11 finds made in a function, it keeps, and
    does not make again in a checkpointed block."""

    @staticmethod
    def forward(ctx: Any, both: Tensor, out: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(both)
        ctx.activation = activation
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (both,) = ctx.saved_tensors
        return _backward(d_out, both, ctx.activation), None, None


@operation("gate")
def _forward(both: Tensor, activation: str) -> Tensor:
    from dovetail.kernels.gate import triton

    return triton.forward(both, activation)


@operation("gate_backward")
def _backward(d_out: Tensor, both: Tensor, activation: str) -> Tensor:
    from dovetail.kernels.gate import triton

    return triton.backward(d_out, both, activation)


@operation("gate_backward_again")
def _backward_again(d_out: Tensor, both: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    from dovetail.kernels.gate import triton

    return triton.backward_again(d_out, both, activation)


@_forward.register_fake
def _(both: Tensor, activation: str) -> Tensor:
    return both.new_empty((*both.shape[:-1], both.shape[-1] // 2))


@_backward.register_fake
def _(d_out: Tensor, both: Tensor, activation: str) -> Tensor:
    return both.new_empty(both.shape)


@_backward_again.register_fake
def _(d_out: Tensor, both: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return both.new_empty(both.shape), both.new_empty((*both.shape[:-1], both.shape[-1] // 2))


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    both, ctx.activation = inputs
    ctx.save_for_backward(both)


def _differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
    (both,) = ctx.saved_tensors
    return _backward(d_out, both, ctx.activation), None


_forward.register_autograd(_differentiate, setup_context=_keep)
