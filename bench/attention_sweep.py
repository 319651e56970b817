"""Which tiles are best for each own attention kernel on this GPU.

    python bench/attention_sweep.py [KERNEL...]     those whose names begin so: attend, queries, keys, diagonals; or all

What it finds is written into src/dovetail/kernels/attention/triton/sizes.py by hand. A kernel of the backward is timed
with the whole of it, of which it alone gets other tiles.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from attention_triton import BF16, REPEAT, Case, inputs, learned, scored
from common import interleaved, replayed
from torch import Tensor
from tuning import compiled_choices, ranked

from dovetail.kernels.attention import Span
from dovetail.kernels.attention.triton import launch, sizes

Choice = tuple[int, int, int, int]
# What compiles for an H100 without, or almost without, a stack: bench/compiles.py says so
CHOICES: dict[str, dict[int, list[Choice]]] = {
    "attend": {
        64: [(128, 128, 8, 2), (128, 128, 4, 2), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 2), (64, 64, 4, 2)],
        128: [(128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3)],
    },
    "queries": {
        64: [(128, 64, 8, 3), (128, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (128, 32, 4, 2)],
        128: [
            (128, 64, 8, 2),
            (64, 64, 4, 2),
            (64, 64, 4, 3),
            (64, 64, 8, 2),
            (128, 32, 4, 2),
            (64, 32, 4, 3),
            (64, 32, 4, 2),
        ],
    },
    "keys": {
        64: [
            (128, 64, 8, 3),
            (128, 64, 8, 2),
            (64, 64, 4, 2),
            (64, 64, 4, 3),
            (64, 64, 8, 2),
            (64, 32, 4, 3),
            (64, 32, 4, 2),
        ],
        128: [
            (128, 64, 8, 2),
            (128, 64, 8, 3),
            (64, 64, 8, 2),
            (64, 64, 4, 3),
            (64, 32, 4, 3),
            (64, 64, 8, 3),
            (64, 32, 4, 2),
        ],
    },
    "diagonals": {n: [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (128, 128, 8, 2)] for n in (64, 128)},
}
NEAR = 512  # of the pair: one form up to here, the other beyond
SHAPES: dict[str, dict[int, list[Case]]] = {
    "": {64: [Case(4, 32, 4096, 64)], 128: [Case(1, 16, 16384, 128)]},
    "band": {n: [Case(1, 16, 32768, n, window=512), Case(1, 16, 32768, n, window=4096)] for n in (64, 128)},
    "pair": {n: [Case(4, 16, 4096, n)] for n in (64, 128)},
    "table": {n: [Case(4, 16, 4096, n, False, "t5"), Case(4, 16, 4096, n, False, "alibi")] for n in (64, 128)},
    "rows": {n: [Case(4, 16, 4096, n, False, "rows 16"), Case(4, 16, 4096, n, False, "rows 512")] for n in (64, 128)},
}
Job = tuple[str, int, Choice]


def shapes(name: str, width: int) -> list[Case]:
    kernel, _, asked = name.partition(" ")
    found = SHAPES[asked][width]
    return [Case(4, 16, 4096, width, True, "t5")] if kernel == "diagonals" else found


def one(job: Job, case: Case) -> Callable[[], Any]:
    """The forward, or the backward with only this kernel's tiles changed."""
    name, width, choice = job
    kernel, _, asked = name.partition(" ")
    sizes.NARROW[name][width] = sizes.Tiles(*choice)
    q, k, v = (t.detach() for t in inputs(case.B, case.T, (case.H, case.H, case.H), (case.D, case.D), BF16))
    span, made = case.rule.span(), scored(case.score, learned(case.score, case.H, case.B, case.T), case.H)
    rows = None if made is None else made.relative
    content = None if rows is None else launch.Content(rows[0].values, None, rows[0].back, 1.0)
    table = None if made is None or content is not None else made.along(case.T, 1.0, q.device).detach()
    assert span is not None
    second: launch.Second | None = None
    if asked == "pair":
        other: list[Tensor] = [
            t.detach() for t in inputs(case.B, case.T, (case.H, case.H, case.H), (case.D, case.D), BF16)
        ]
        span, second = Span(NEAR - 1, 0), launch.Second(other[0], other[1], Span(None, -NEAR))
    if kernel == "attend":
        return lambda: launch.forward(q, k, v, table, None, span, case.D**-0.5, second, content)
    out, lse = launch.forward(q, k, v, table, None, span, case.D**-0.5, second, content)
    up = torch.randn_like(out)
    return lambda: launch.backward(up, None, q, k, v, table, None, out, lse, span, case.D**-0.5, second, content)


def compiled(job: Job) -> str:
    """Compiles into the cache on disk; empty where it could, else why not."""
    try:
        for case in shapes(*job[:2]):
            one(job, case)()
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
        for choice in CHOICES[name.split()[0]][width]
    ]
    failed = compiled_choices(compiled, jobs)
    for name, width in dict.fromkeys(job[:2] for job in jobs):
        kept = sizes.NARROW[name][width]
        for case in shapes(name, width):
            times: dict[Choice, float] = {}
            for job in [j for j in jobs if j[:2] == (name, width)]:
                if failed[job]:
                    print(f"{name} {width} {job[2]}: {failed[job]}")
                else:
                    found = interleaved(replayed({"": one(job, case)}, REPEAT), rounds=3, warmup=1)[""][0]
                    times[job[2]] = found / REPEAT
            sizes.NARROW[name][width] = kept
            ranked(f"{name}: {case.name}", times, kept)


if __name__ == "__main__":
    torch.manual_seed(0)
    sweep(sys.argv[1:])
