"""Kernels that start while the one before them is ending (programmatic dependent launch, from Hopper on).

One that is launched so begins with what nothing before it writes, then waits for all that is before it, and only then
lets the next one begin: who waits for the last kernel has waited for every one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def overlaps() -> bool:
    """Whether the GPU at hand can."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


def launched(early: bool = True) -> dict[str, Any]:
    """What a kernel with `EARLY`, which calls `all_before`, is launched with."""
    return {"EARLY": True, "launch_pdl": True} if early and overlaps() else {"EARLY": False}


@triton.jit
def all_before():  # type: ignore[no-untyped-def]
    """Waits for it."""
    gdc_wait()
    gdc_launch_dependents()
