"""Which form of the delta rule runs, and why: decided from static facts."""

from __future__ import annotations

import torch

from dovetail.kernels import twins
from dovetail.kernels.installed import TRITON
from dovetail.kernels.plan import Plan

WIDEST = {2: 256, 4: 128}  # of keys, by the bytes of a number: wider ones fill a multiprocessor's shared memory


def plan(queries: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32, width: int = 0) -> Plan:
    """The path for `queries` tokens a row, and why. dtype: of the queries; width: D, of a key."""
    if twins.asked():
        return Plan("step", twins.WHY)
    if queries == 1:
        return Plan("step", "one token: one update of the state")
    if device == "cuda" and TRITON and dtype != torch.float64:
        widest = WIDEST[dtype.itemsize]
        if width <= widest:
            return Plan("triton", "on CUDA: chunks inverted side by side (WY), then walked with the state in registers")
        return Plan("chunked", f"keys wider than {widest}, of which a program cannot hold whole ones: in plain torch")
    return Plan("chunked", "the delta rule over a row: products inside chunks (WY), the state across")
