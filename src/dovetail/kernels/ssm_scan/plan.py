"""Which form of the selective scan runs, and why: decided from static facts."""

from __future__ import annotations

import torch

from dovetail.kernels import twins
from dovetail.kernels.installed import TRITON
from dovetail.kernels.plan import Plan

_ENTRIES = 64  # of a channel: more do not fit into the registers of one program


def plan(tokens: int, entries: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Plan:
    """tokens: at once. entries: N, of a channel's state. dtype: the widest given, in which the scan is computed."""
    if twins.asked():
        return Plan("step", twins.WHY)
    if tokens == 1:
        return Plan("step", "one token: one update of the state")
    if device != "cuda" or not TRITON:
        why = "Triton is not installed" if device == "cuda" else "not on CUDA"
        return Plan("chunked", f"{why}: rounds inside chunks, the state across, in plain torch")
    if dtype == torch.float64 or entries > _ENTRIES:
        why = "fp64" if dtype == torch.float64 else f"more than {_ENTRIES} entries a channel"
        return Plan("chunked", f"{why}: rounds inside chunks, the state across, in plain torch")
    return Plan("triton", "on CUDA: token by token with the states in registers, long rows in segments side by side")
