"""Which kernel dequantises packed codes, and why."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Plan:
    """The path taken ("plain" or "triton") and the reason, for people."""

    path: str
    why: str


def plan(device: str) -> Plan:
    """Chooses the path on a device of this type."""
    if device != "cuda":
        return Plan("plain", "not on CUDA: a lookup in plain torch, a piece at a time")
    if torch.compiler.is_compiling():
        return Plan("plain", "compiled: Inductor fuses the lookup in plain torch")
    if not _triton():
        return Plan("plain", "Triton is not installed: a lookup in plain torch, a piece at a time")
    return Plan("triton", "on CUDA: one Triton kernel from codes to weights")


@cache
def _triton() -> bool:
    return importlib.util.find_spec("triton") is not None
