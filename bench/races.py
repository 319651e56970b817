"""Whether any Triton kernel races with itself: all of them, at small sizes with the tiles that are shipped.

    python bench/races.py [CASE...]     those of CASES; all if none is given

Each case runs four times (interpreted: twice) on the same inputs, with memory that no one has written yet full of NaN: every kernel must leave
the same bits each time (but those that add atomically, which only say how far apart their runs are), and what comes out
must be finite. On CUDA each case then runs once more under compute-sanitizer's racecheck, which sees hazards in shared
memory, and its memcheck, which first has to find a kernel that is wrong. One line a kernel; exits with 1 where anything was found, or a kernel of the source was not run.
Without a GPU kernels are interpreted, which tells of this script and of unwritten memory rather than of races.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import triton
import triton.language as tl
from races_cases import CASES
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import dovetail

KERNELS = Path(dovetail.__file__).parent / "kernels"
TOOLS = {"racecheck": r"RACECHECK SUMMARY: (\d+) hazard", "memcheck": r"ERROR SUMMARY: (\d+) error"}
REPEAT, LIMIT = 4 if torch.cuda.is_available() else 2, 240
AT_ONCE = max(2, min(16, (os.cpu_count() or 2) // 2))
EACH = ("--racecheck-report", "all")  # hazard by hazard, without the analysis over all of them
CONTROL = "a kernel that is wrong"
Launch = tuple[str, list[torch.Tensor]]


@contextmanager
def recorded(launches: list[Launch]) -> Any:
    """Which kernel each launch was, and what its tensors held after it."""
    sorts: tuple[Any, ...] = (JITFunction, InterpretedFunction)
    kept = [(sort, sort.run) for sort in sorts]

    def watched(run: Callable[..., Any]) -> Callable[..., Any]:
        def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
            done = run(self, *args, **kwargs)
            given = [getattr(x, "base", x) for x in (*args, *kwargs.values())]
            launches.append((named(self.fn), [x.detach().clone() for x in given if isinstance(x, torch.Tensor)]))
            return done

        return launched

    for sort, run in kept:
        sort.run = watched(run)
    try:
        yield
    finally:
        for sort, run in kept:
            sort.run = run


def named(fn: Any) -> str:
    """As `kernels` has it."""
    return f"{fn.__module__.removeprefix('dovetail.kernels.')}.{fn.__name__}"


def kernels() -> dict[str, bool]:
    """Every kernel of the source, and whether it adds atomically: functions for Triton that no other of its folder uses."""
    found: dict[str, bool] = {}
    used: set[str] = set()
    for folder in {file.parent for file in KERNELS.rglob("*.py")}:
        jitted: dict[str, ast.FunctionDef] = {}
        for file in sorted(folder.glob("*.py")):
            module = ".".join(file.relative_to(KERNELS).with_suffix("").parts)
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef) and any(
                    "triton.jit" in ast.unparse(d) for d in node.decorator_list
                ):
                    jitted[f"{module}.{node.name}"] = node
        calls = [c for node in jitted.values() for c in ast.walk(node) if isinstance(c, ast.Call)]
        scans = [c for c in calls if ast.unparse(c.func) in ("tl.associative_scan", "tl.reduce")]
        names = {ast.unparse(c.func).rpartition(".")[2] for c in calls}
        names |= {x.id for c in scans for x in c.args if isinstance(x, ast.Name)}
        used |= {f"{folder.relative_to(KERNELS)}/{name}" for name in names}
        used |= {f"./{name}" for name in names if folder != KERNELS}  # what all folders share
        found |= {n: "atomic_" in ast.unparse(node) for n, node in jitted.items()}
    return {n: atomic for n, atomic in found.items() if "/".join(_place(n)) not in used}


def _place(name: str) -> tuple[str, str]:
    """Folder and function of folder.module.function."""
    *folders, _, function = name.split(".")
    return "/".join(folders) or ".", function


def repeated(case: str) -> tuple[list[Launch], dict[str, str]]:
    """The launches of one run, and by kernel what was found in several."""
    run, found, first = CASES[case](), {}, []
    for turn in range(REPEAT):
        launches: list[Launch] = []
        with recorded(launches):
            results = run()
        for result in results:
            if not result.isfinite().all():
                found[case] = "not finite: something is read that nobody wrote"
        if not turn:
            first = launches
            continue
        if [name for name, _ in launches] != [name for name, _ in first]:
            found[case] = "other kernels at another time"
            continue
        for (name, once), (_, again) in zip(first, launches, strict=True):
            far = [apart(a, b) for a, b in zip(once, again, strict=True)]
            if max(far, default=0.0) > 0:
                found[name] = f"repeated: {max(far):.1e} apart"
    return first, found


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """0 for the same bits, else the largest difference, at least a little."""
    if torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b))):
        return 0.0
    return max((a.double() - b.double()).abs().nan_to_num(1e30).max().item(), 1e-30)


@triton.jit
def _beyond(x):  # type: ignore[no-untyped-def]
    """Writes where nothing is, which memcheck must see."""
    tl.store(x + 2**28, 1.0)


def once(case: str) -> None:
    """What runs under the sanitizer."""
    if case == CONTROL:
        _beyond[(1,)](torch.zeros(16, device="cuda"))
    else:
        CASES[case]()()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sanitized(sanitizer: str, tool: str, case: str, names: set[str]) -> dict[str, str]:
    """What was found, by kernel; by the case where it is of no kernel in particular."""
    help_text = subprocess.run([sanitizer, "--help"], capture_output=True, text=True, check=False).stdout
    short = {name.rsplit(".", 1)[1]: name for name in names}
    ours = ["--kernel-name", ",".join(f"kne={name}" for name in short)] if "--kernel-name" in help_text else []
    caching = (
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    )  # so that each tensor has its bounds
    said, tries = "", [ours, []] if ours else [[]]  # without a filter if it is not understood
    while tries:
        wanted = tries.pop(0)
        command = [sanitizer, "--tool", tool, "--print-limit", "20", *wanted, sys.executable, __file__, "--once", case]
        try:
            ran = subprocess.run(
                command, capture_output=True, text=True, timeout=LIMIT, check=False, env=os.environ | caching
            )
        except subprocess.TimeoutExpired:
            return {case: f"{tool}: not done in {LIMIT} s"}
        said = ran.stdout + ran.stderr
        if "Internal Sanitizer Error" in said and tool == "racecheck" and EACH[0] not in wanted:
            tries = [[*wanted, *EACH]]  # its own fault, which it counts as a hazard
            continue
        summary = re.search(TOOLS[tool], said)
        if summary is not None:
            break
    else:
        return {case: f"{tool} did not run: {' | '.join(said.splitlines()[-4:])[:400]}"}
    if summary[1] == "0" and ran.returncode == 0:
        return {}
    count: dict[str, int] = defaultdict(int)
    for line in said.splitlines():
        for name in short:
            if re.search(rf"\b{re.escape(name)}(\+0x|\(|:)", line):
                count[short[name]] += 1
    lines = [line for line in said.splitlines() if line.startswith("=========") and "SANITIZER" not in line]
    print(*lines[:30], sep="\n", flush=True)
    return {n: f"{tool}: {k} lines" for n, k in count.items()} or {case: f"{tool}: {summary[0]}"}


def main(cases: list[str]) -> int:
    cuda, known = torch.cuda.is_available(), kernels()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore
    ran: dict[str, set[str]] = {}
    findings: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        try:
            launches, found = repeated(case)
        except Exception as error:
            launches, found = [], {case: f"{type(error).__name__}: {str(error)[:300]}"}
        ran[case] = {name for name, _ in launches}
        for name, what in found.items():
            findings[name].append(what)
    tools: list[str] = []
    if cuda:
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(sanitizer).exists():
            findings["compute-sanitizer"].append("not found: it comes with CUDA's toolkit")
        else:
            tools = list(TOOLS)
            seen = sanitized(sanitizer, "memcheck", CONTROL, {"races._beyond"})
            if "races._beyond" not in seen:
                findings["compute-sanitizer"].append(f"does not see a write beyond memory: {seen}")
            with ThreadPoolExecutor(AT_ONCE) as pool:
                asked = [(case, tool) for case in cases for tool in tools]
                jobs = [pool.submit(sanitized, sanitizer, tool, case, ran[case]) for case, tool in asked]
                for (case, tool), job in zip(asked, jobs, strict=True):
                    print(f"{tool} {case}: {job.result() or 'clean'}", flush=True)
                    for name, what in job.result().items():
                        findings[name].append(what)
    everything = set().union(*ran.values())
    for name in sorted(everything):
        atomic = known.get(name, False)
        whats = findings.pop(name, [])
        bad = [what for what in whats if not (atomic and what.startswith("repeated"))]
        clean = [*(["the same bits"] if not any(w.startswith("repeated") for w in whats) else []), *tools]
        how = ", ".join(whats) or f"clean: {', '.join(clean)}"
        print(f"{'FOUND ' if bad else 'ok    '}{name}: {how}{' (adds atomically)' if atomic else ''}", flush=True)
        findings |= {name: bad} if bad else {}
    for name in sorted(set(known) - everything) if set(cases) == set(CASES) else []:
        findings[name].append("no case runs it")
    for name, whats in findings.items():
        if name not in everything:
            print(f"FOUND {name}: {', '.join(whats)}", flush=True)
    print(f"{len(everything)} of {len(known)} kernels, {len(findings)} findings", flush=True)
    return 1 if findings else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        once(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1:] or list(CASES)))
