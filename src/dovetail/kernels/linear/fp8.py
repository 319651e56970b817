"""y = x Wᵀ in training with its three products in 8 bits: e4m3 for x and W, e5m2, whose range is wider, for gradients
(Micikevicius et al. 2022, FP8 formats for deep learning).

A tensor has one scale, found anew each time, which takes its largest number to the type's largest; a GPU's sums keep fewer
digits than fp32 has. What is between products, weights and their gradients stay in their own types. For the backward x is
kept in its 8 bits. torch's product takes its second factor column by column, so that the backward's factors are turned, in
8 bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.kernels.chunks import autocasts

FACTOR, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of what each product's axes must be


class Codes(NamedTuple):
    """A matrix as codes (M,K) in fp8 times a scale () in fp32."""

    codes: Tensor
    scale: Tensor

    def turned(self) -> Codes:
        return Codes(self.codes.t().contiguous(), self.scale)


def rounded(x: Tensor, dtype: torch.dtype = FACTOR, scale: Tensor | None = None) -> Codes:
    """x (M,K) in that type. scale: what it was before, of the same x."""
    most = torch.finfo(dtype).max
    if scale is None:
        scale = (x.abs().amax().float() / most).clamp_min(torch.finfo(torch.float32).tiny)
    # Beyond the largest, by a rounding of the scale, a number would become a NaN.
    return Codes((x.float() / scale).clamp(-most, most).to(dtype).contiguous(), scale)


def product(a: Codes, b: Codes, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """a bᵀ (M,N) of a (M,K) and b (N,K). fast: by a GPU's faster sums, which keep still fewer digits."""
    return torch._scaled_mm(
        a.codes, b.codes.t(), scale_a=a.scale, scale_b=b.scale, out_dtype=dtype, use_fast_accum=fast
    )


def narrow(x: Tensor) -> torch.dtype:
    """The type of a product's output: x's, or autocast's."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(..., I), W (O,I) -> (..., O) in x's type, or autocast's. I and O are multiples of 16; of how many vectors there are
    is filled up with zeros. Gradients can be taken once. One vector or none by torch's own product."""
    if x.dim() < 2 or not x.numel():
        return F.linear(x, weight)
    left, right = rounded(filled(x.detach())), rounded(weight.detach())
    y = emptied(product(left, right, narrow(x), fast=True), x.shape)
    return _Follows.apply(x, weight, y, *left, right.scale)  # type: ignore[no-any-return]


def filled(x: Tensor) -> Tensor:
    """(..., K) -> (M,K), zeros behind the last."""
    flat = x.flatten(0, -2)
    missing = -len(flat) % MULTIPLE
    return F.pad(flat, (0, 0, 0, missing)) if missing else flat


def emptied(y: Tensor, shape: torch.Size) -> Tensor:
    """(M,N) -> (...,N) of `shape` (...,K), without what was filled up."""
    return y[: shape[:-1].numel()].view(*shape[:-1], -1)


def input_gradient(d_y: Codes, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(M,I) from ∂L/∂y (M,O); scale: W's."""
    return product(d_y, rounded(weight, scale=scale).turned(), dtype)


def weight_gradient(d_y: Codes, x: Codes, dtype: torch.dtype) -> Tensor:
    """(O,I) from ∂L/∂y (M,O) and x (M,I)."""
    return product(d_y.turned(), x.turned(), dtype)


class _Follows(torch.autograd.Function):
    """`y`, whose gradient goes to x and `weight`. It is made outside: what torch 2.11 finds made in a function, it keeps,
    and does not make again in a checkpointed block."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, y: Tensor, codes: Tensor, scale: Tensor, weight_scale: Tensor
    ) -> Tensor:
        ctx.save_for_backward(weight, codes, scale, weight_scale)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, codes, scale, weight_scale = ctx.saved_tensors
        d, d_x, d_weight = rounded(filled(d_y), GRADIENT), None, None
        if ctx.needs_input_grad[0]:
            d_x = emptied(input_gradient(d, weight, weight_scale, ctx.dtype), ctx.shape)
        if ctx.needs_input_grad[1]:
            d_weight = weight_gradient(d, Codes(codes, scale), weight.dtype)
        return d_x, d_weight, None, None, None, None
