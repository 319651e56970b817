"""Which form of the contrastive loss runs, and why: decided from static facts."""

from __future__ import annotations

import torch

from dovetail.kernels import twins
from dovetail.kernels.installed import TRITON
from dovetail.kernels.plan import Plan


def plan(device: str = "cpu", products: torch.dtype = torch.float32) -> Plan:
    """products: the dtype that products are asked in, autocast's where it is on."""
    if twins.asked():
        return Plan("reference", twins.WHY)
    if device == "cuda" and products.itemsize == 2 and TRITON:
        return Plan("triton", "16-bit products on CUDA: scores live in registers, and only their gradient is written")
    if products.itemsize == 2:
        why = "Triton is not installed" if device == "cuda" else "not on CUDA"
        return Plan(
            "blocks", f"{why}: blocks of rows in plain torch, products in fp32, for scores bear no rounding to 16 bits"
        )
    return Plan("blocks", "blocks of rows in plain torch: products are most of the time in fp32")
