"""Which of Triton's assemblers makes machine code for Hopper.

ptxas 12.8, Triton's own for Hopper up to 3.7, loses the place of a product's factor in shared memory in some kernels,
which then read anywhere: results are wrong, or the launch fails. Whether it does depends on everything around the
product, so that one width is right and the next is wrong; `bench/descriptors.py` tells by the machine code. Triton has
a later one beside it, for Blackwell, which is right with the same PTX, and which later Tritons take for Hopper, too
(triton-lang/triton#11781).
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import warnings
from pathlib import Path

import torch

ASKED = "TRITON_PTXAS_PATH"  # what Triton, and torch.compile with it, go by


def take_later() -> None:
    """Makes the later of Triton's assemblers that of all kernels that this process, and those that it begins, compile.

    Nothing changes where one is asked for already, where Triton has one alone, or without an NVIDIA driver. Warns where
    the driver is too old for what the later one makes."""
    driver = getattr(torch._C, "_cuda_getDriverVersion", int)()
    found = importlib.util.find_spec("triton") if driver and ASKED not in os.environ else None
    if found is None or found.origin is None:
        return
    later = Path(found.origin).parent / "backends/nvidia/bin/ptxas-blackwell"
    if not later.exists():
        return
    said = subprocess.run([later, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        return
    if int(release[1]) > driver // 1000:
        warnings.warn(
            f"the driver is of CUDA {driver // 1000}, and Triton's later assembler of {release[1]}.{release[2]}: the "
            "earlier one makes wrong kernels of some widths on Hopper. Update the driver, or set "
            f"{ASKED} to ptxas 12.9 or later of CUDA {driver // 1000}",
            stacklevel=2,
        )
        return
    os.environ[ASKED] = str(later)
