"""Block-wise quantised weights: codes and absolute maxima from a weight, and the weight back from them.

A weight is read row by row as one line of n numbers, cut into blocks of `block`; each block is divided by its absolute
maximum. The last block is filled up with zeros. Quantising runs once, dequantising in every forward and backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.kernels.quantise import reference
from dovetail.kernels.quantise.levels import DYNAMIC, NF4
from dovetail.kernels.quantise.plan import Plan, plan
from dovetail.kernels.quantise.reference import (
    dequantise_int8,
    dequantise_levels,
    pack,
    quantise_int8,
    quantise_levels,
)


def dequantise_packed(codes: Tensor, absmax: Tensor, levels: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """level · absmax, (N,) in `dtype`, of packed codes (N/2,), by the path that `plan` names; all give the same bits."""
    if plan(codes.device.type).path == "triton":
        from dovetail.kernels.quantise import triton

        return triton.dequantise_packed(codes, absmax, levels, block, dtype)
    return reference.dequantise_packed(codes, absmax, levels, block, dtype)


__all__ = [
    "DYNAMIC", "NF4", "Plan", "dequantise_int8", "dequantise_levels", "dequantise_packed", "pack", "plan",
    "quantise_int8", "quantise_levels",
]  # fmt: skip
