"""Which tiles are best for each own attention kernel on this GPU.

    python bench/attention_sweep.py [KERNEL...]     those whose names begin so: attend, queries, keys, diagonals; or all

What it finds is written into src/dovetail/kernels/attention/triton/sizes.py by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from attention_triton import BF16, REPEAT, Case, inputs, learned, scored
from common import interleaved, often
from tuning import workers

from dovetail.kernels.attention.triton import launch, sizes

CHOICES: dict[str, list[tuple[int, int, int, int]]] = {
    "attend": [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 4), (64, 128, 4, 2), (64, 64, 4, 2)],
    "queries": [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2), (64, 64, 4, 2)],
    "keys": [(128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 4), (64, 64, 8, 3), (64, 64, 4, 2), (64, 128, 8, 2)],
    "diagonals": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (128, 128, 8, 2)],
}  # fmt: skip
SHAPES = {
    "": {64: Case(4, 32, 4096, 64), 128: Case(1, 16, 16384, 128)},
    " band": {64: Case(1, 16, 32768, 64, window=512), 128: Case(1, 16, 32768, 128, window=512)},
    " table": {64: Case(4, 16, 4096, 64, False, "t5"), 128: Case(4, 16, 4096, 128, False, "t5")},
}
Job = tuple[str, int, tuple[int, int, int, int]]


def one(job: Job, score: str | None = None) -> Callable[[], Any]:
    """The forward, or the backward with only this kernel's tiles changed. score: another than the shape's own."""
    name, width, choice = job
    kernel, _, more = name.partition(" ")
    case = SHAPES[" table" if kernel == "diagonals" else f" {more}" if more else ""][width]
    sizes.NARROW[name][width] = sizes.Tiles(*choice)
    q, k, v = (t.detach() for t in inputs(case.B, case.T, (case.H, case.H, case.H), (case.D, case.D), BF16))
    span, made = case.rule.span(), scored(score or case.score, learned(case.score, case.H), case.H)
    table = None if made is None else made.along(case.T, 1.0, q.device).detach()
    assert span is not None
    if kernel == "attend":
        return lambda: launch.forward(q, k, v, table, None, span, case.D**-0.5)
    out, lse = launch.forward(q, k, v, table, None, span, case.D**-0.5)
    up = torch.randn_like(out)
    return lambda: launch.backward(up, None, q, k, v, table, None, out, lse, span, case.D**-0.5)


def compiled(job: Job) -> str:
    """Compiles into the cache on disk; empty where it could, else why not."""
    try:
        for score in [None, "alibi"] if job[0] == "attend table" else [None]:
            one(job, score)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return ""


def sweep(kernels: list[str]) -> None:
    """kernels: those whose names begin so; all if none is given."""
    jobs: list[Job] = [
        (name, width, choice)
        for name in sizes.NARROW
        if not kernels or any(name.startswith(k) for k in kernels)
        for width in (64, 128)
        for choice in CHOICES[name.split()[0]]
    ]
    with workers() as pool:
        failed = dict(zip(jobs, pool.map(compiled, jobs), strict=True))
    for name, width in dict.fromkeys(job[:2] for job in jobs):
        kept, times = sizes.NARROW[name][width], {}
        for job in [j for j in jobs if j[:2] == (name, width)]:
            if failed[job]:
                print(f"{name} {width} {job[2]}: {failed[job]}")
                continue
            for score in [None, "alibi"] if name == "attend table" else [None]:
                seconds = interleaved({"": often(one(job, score), REPEAT)}, rounds=3, warmup=1)[""][0] / REPEAT
                times[job[2], score or ""] = seconds
        sizes.NARROW[name][width] = kept
        for (choice, score), seconds in sorted(times.items(), key=lambda item: item[1]):
            note = " (as it stands)" if choice == kept else ""
            print(f"{name} {width} {score} {1e3 * seconds:.3f} ms {sizes.Tiles(*choice)}{note}", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    sweep(sys.argv[1:])
