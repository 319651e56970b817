"""Kernels that start while the one before them is ending (programmatic dependent launch, from Hopper on).

One that is launched so begins with what nothing before it writes, then waits for all that is before it, and only then
lets the next one begin: who waits for the last kernel has waited for every one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def overlaps() -> bool:
    """Whether the GPU at hand can."""
    if not torch.cuda.is_available() or knobs.runtime.interpret or torch.version.hip is not None:
        return False
    return _from_hopper_on(torch.cuda.current_device())


@cache
def _from_hopper_on(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9


def launched(early: bool = True) -> dict[str, Any]:
    """What a kernel with `EARLY`, which calls `pass_on`, is launched with."""
    return {"EARLY": True, "launch_pdl": True} if early and overlaps() else {"EARLY": False}


@triton.jit
def pass_on():  # type: ignore[no-untyped-def]
    """Waits for all that is before, then lets the next kernel begin."""
    gdc_wait()
    gdc_launch_dependents()
