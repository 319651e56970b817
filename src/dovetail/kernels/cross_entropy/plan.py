"""Which form of the softmax loss runs, and why: decided from static facts."""

from __future__ import annotations

import torch

from dovetail.kernels import twins
from dovetail.kernels.installed import TRITON
from dovetail.kernels.plan import Plan


def plan(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Plan:
    """dtype: of the logits."""
    if twins.asked():
        return Plan("reference", twins.WHY)
    if device == "cuda" and TRITON and dtype != torch.float64:
        return Plan("triton", "a row of logits is read twice, the second time from the cache, and written over once")
    why = "fp64" if device == "cuda" and TRITON else "Triton is not installed" if device == "cuda" else "not on CUDA"
    return Plan("plain", f"{why}: passes over all logits in plain torch")
