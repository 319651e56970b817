"""Which of Triton's assemblers makes machine code for Hopper.

ptxas 12.8, Triton's own up to 3.7, loses the place of a product's factor in shared memory in some kernels for Hopper,
which then read anywhere: results are wrong, or the launch fails. Whether it does depends on everything around the
product, so that one width is right and the next is wrong; `bench/descriptors.py` tells by the machine code. Triton has
a later one beside it, for Blackwell, which later Tritons take for Hopper, too (triton-lang/triton#11781).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
import warnings
from pathlib import Path

ASKED = "TRITON_PTXAS_PATH"  # what Triton, and torch.compile with it, go by
RIGHT = (12, 9)  # the first release that keeps the place
Release = tuple[int, int]


def take_later() -> None:
    """Makes the later of Triton's assemblers that of all kernels that this process, and those that it begins, compile.

    Nothing changes where one is asked for already, where Triton's own is right or alone, or without an NVIDIA driver.
    Warns where the later one cannot be taken: it does not run here, or the driver is too old for what it makes."""
    driver = 0 if os.environ.get(ASKED) else _driver()
    tools = _tools() if driver else None
    if tools is None:
        return
    own = _release(tools / "ptxas")
    if own is None or own >= RIGHT or not (tools / "ptxas-blackwell").exists():
        return
    later = _release(tools / "ptxas-blackwell")
    if later is not None and later >= RIGHT and later[0] <= driver:
        os.environ[ASKED] = str(tools / "ptxas-blackwell")
        return
    found = "does not run" if later is None else f"is of CUDA {later[0]}.{later[1]}, the driver of {driver}"
    warnings.warn(
        f"Triton's ptxas {own[0]}.{own[1]} makes wrong kernels of some widths on Hopper, and its later one {found}. "
        f"Update the driver, or set {ASKED} to a ptxas of {RIGHT[0]}.{RIGHT[1]} or later that the driver knows",
        stacklevel=2,
    )


def _driver() -> int:
    """The CUDA release that the driver knows, 0 without one."""
    version = ctypes.c_int()
    try:  # not by torch, which would initialise CUDA: devices are chosen then, and no fork is possible any more
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return 0 if failed else version.value // 1000


def _tools() -> Path | None:
    try:
        found = importlib.util.find_spec("triton")
    except ValueError:  # a module that stands in for it
        return None
    return None if found is None or found.origin is None else Path(found.origin).parent / "backends/nvidia/bin"


def _release(ptxas: Path) -> Release | None:
    try:
        said = subprocess.run([ptxas, "--version"], capture_output=True, check=False, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(rb"release (\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else None
