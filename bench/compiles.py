"""Whether every Triton kernel compiles for an H100, where there is none: the cases of races.py up to the launch.

    python bench/compiles.py [CASE...]                     those of CASES; all if none is given
    python bench/compiles.py --widths 24,64 40,200 [CASE...]    those of WIDTHS, for each pair of keys' and values' widths

The interpreter runs what no compiler would take (a loop that changes the shape of what it carries) and knows nothing of
registers. One line a kernel and launch: registers and stack of a thread, and shared memory of a program, as ptxas says,
and what descriptors.py finds wrong in the machine code; exits with 1 where one does not compile or is wrong.
TRITON_PTXAS_PATH (TRITON_PTXAS_BLACKWELL_PATH from Triton 3.9 on) names another assembler than the one that Triton takes.
"""

from __future__ import annotations

import os
import re
import sys
from functools import partial
from itertools import product
from typing import Any

import torch

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import descriptors
import races_cases
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)


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
    found = re.search(r"REG:(\d+) STACK:(\d+)", descriptors.dumped(cubin, "-res-usage"))
    return f"{found[1]:>3} registers, {found[2]:>4} B of stack" if found else "resources unknown"


def faults(cubin: bytes) -> str:
    code = descriptors.lines(descriptors.dumped(cubin, "-sass"))
    astray, reused = descriptors.wrong(code), descriptors.reused(code)
    said = [f"{len(astray)} products go astray, as at 0x{astray[0].at:x}"] if astray else []
    said += [f"{len(reused)} factors written over, as at 0x{reused[0].at:x}"] if reused else []
    return "; ".join(said)


def main(given: list[str]) -> int:
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
            wrong = faults(made.asm["cubin"]) if "wgmma" in made.asm["ptx"] else ""
            failed += bool(wrong)
            used = f"{resources(made.asm['cubin'])}, {made.metadata.shared:>6} B shared"
            print(f"{name:44} {used}{'  WRONG: ' * bool(wrong)}{wrong}", flush=True)
        return made

    JITFunction.run = compiled  # type: ignore[method-assign]
    if given[:1] == ["--widths"]:
        if len(given) < 3:
            sys.exit("--widths takes two lists, keys' and values', as in --widths 24,64 40,200")
        keys, values = ([int(n) for n in widths.split(",")] for widths in given[1:3])
        runs = {
            f"{case} {D} {E}": partial(races_cases.WIDTHS[case], D, E)
            for case in given[3:] or races_cases.WIDTHS
            for D, E in product(keys, values)
        }
    else:
        runs = {case: races_cases.CASES[case] for case in given or races_cases.CASES}
    for case, make in runs.items():
        print(f"-- {case}", flush=True)
        make()()
    print(f"{len(seen)} launches compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
