"""Block-wise quantised weights: codes and absolute maxima from a weight, and the weight back from them.

A weight is read row by row as one line of n numbers, cut into blocks of `block`; each block is divided by its absolute
maximum. The last block is filled up with zeros. Quantising runs once, dequantising in every forward and backward.

int4 instead has groups along a row, each with a scale and a zero. Where groups lie in rows (`Rows`) a few vectors are
multiplied with the codes themselves, which is what decoding is: `linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.kernels.quantise import reference
from dovetail.kernels.quantise.levels import DYNAMIC, NF4
from dovetail.kernels.quantise.plan import plan, plan_linear
from dovetail.kernels.quantise.reference import (
    dequantise_int8,
    dequantise_levels,
    dequantise_rows,
    pack,
    quantise_int4,
    quantise_int8,
    quantise_levels,
)
from dovetail.kernels.quantise.rows import Rows


def dequantise_packed(codes: Tensor, absmax: Tensor, levels: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """level · absmax, (N,) in `dtype`, of packed codes (N/2,), by the path that `plan` names; all give the same bits."""
    if plan(codes.device.type).path == "triton":
        from dovetail.kernels.quantise import triton

        return triton.dequantise_packed(codes, absmax, levels, block, dtype)
    return reference.dequantise_packed(codes, absmax, levels, block, dtype)


def linear(x: Tensor, rows: Rows, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, (..., K) -> (..., N) in x's dtype; no gradients. x: bf16, fp16 or fp32.

    Raises nothing of its own: `plan_linear` says whether it is for this device and so many rows.
    """
    from dovetail.kernels.quantise import triton_linear

    return triton_linear.linear(x, rows, bias)


__all__ = [
    "DYNAMIC", "NF4", "Rows", "dequantise_int8", "dequantise_levels", "dequantise_packed", "dequantise_rows",
    "linear", "pack", "plan", "plan_linear", "quantise_int4", "quantise_int8", "quantise_levels",
]  # fmt: skip
