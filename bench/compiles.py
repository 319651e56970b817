"""Whether every Triton kernel compiles for an H100, where there is none: the cases of races.py up to the launch.

    python bench/compiles.py [CASE...]     those of CASES; all if none is given

The interpreter runs what no compiler would take (a loop that changes the shape of what it carries) and knows nothing of
registers. One line a kernel and launch: registers and stack of a thread, and shared memory of a program, as ptxas says;
exits with 1 where one does not compile.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import races_cases
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NoDevice:
    """What Triton asks its driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> str:
    """Registers and stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=False).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    return f"{found[1]:>3} registers, {found[2]:>4} B of stack" if found else "resources unknown"


def main(cases: list[str]) -> int:
    races_cases.NARROW, races_cases.SHORT = torch.bfloat16, 1
    driver.set_active(NoDevice())  # type: ignore[arg-type]
    run, seen, failed = JITFunction.run, set(), 0

    def compiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal failed
        name = f"{self.fn.__module__.removeprefix('dovetail.kernels.')}.{self.fn.__name__}"
        try:
            made = run(self, *args, **{**kwargs, "warmup": True})
        except Exception as error:
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {str(error)[:500]}", flush=True)
            return None
        if made.hash not in seen:
            seen.add(made.hash)
            print(f"{name:44} {resources(made.asm['cubin'])}, {made.metadata.shared:>6} B shared", flush=True)
        return made

    JITFunction.run = compiled  # type: ignore[method-assign]
    for case in cases:
        print(f"-- {case}", flush=True)
        races_cases.CASES[case]()()
    print(f"{len(seen)} launches compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(races_cases.CASES)))
