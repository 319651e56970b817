"""Which kernel dequantises packed codes, which one multiplies with codes, and why."""

from __future__ import annotations

import torch

from dovetail.kernels import twins
from dovetail.kernels.installed import TRITON
from dovetail.kernels.plan import Plan

MOST_ROWS = 32  # beyond them a weight's dequantising is small beside its product
LEAST_BLOCK = 32  # products of tiles take 16 at least, and with so few Triton 3.6 multiplies int4 wrongly on an H200


def plan(device: str) -> Plan:
    """Chooses the path on a device of this type."""
    if twins.asked():
        return Plan("plain", twins.WHY)
    if device != "cuda":
        return Plan("plain", "not on CUDA: a lookup in plain torch, a piece at a time")
    if torch.compiler.is_compiling():
        return Plan("plain", "compiled: Inductor fuses the lookup in plain torch")
    if not TRITON:
        return Plan("plain", "Triton is not installed: a lookup in plain torch, a piece at a time")
    return Plan("triton", "on CUDA: one Triton kernel from codes to weights")


def plan_linear(device: str, rows: int, dtype: torch.dtype, block: int | None, width: int) -> Plan:
    """Chooses the path ("triton" or "dense") of x Wᵀ for `rows` vectors x of `dtype` without gradients; W has groups of
    `block` weights in rows of `width`, or (None) blocks that do not lie in rows."""
    if twins.asked():
        return Plan("dense", twins.WHY)
    if device != "cuda":
        return Plan("dense", "not on CUDA: the dense weight for the length of the product")
    if block is None:
        return Plan("dense", "blocks reach over the ends of rows: the dense weight for the length of the product")
    if not 0 < rows <= MOST_ROWS or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return Plan(
            "dense", f"more than {MOST_ROWS} rows, or none, or fp64: the dense weight, read once for all of them"
        )
    if not (block >= LEAST_BLOCK and (block & (block - 1) == 0 or (block == width and width % 8 == 0))):
        return Plan("dense", f"groups neither whole rows nor powers of two of at least {LEAST_BLOCK}: the dense weight")
    if not TRITON:
        return Plan("dense", "Triton is not installed: the dense weight for the length of the product")
    return Plan("triton", f"at most {MOST_ROWS} rows on CUDA: codes are read once and become weights in registers")
