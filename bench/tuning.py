"""Kernels compiled by many processes at once: those of peers that tune themselves at their first call, and our sweeps'.

One after another they take minutes. What is compiled lies in Triton's cache on disk, where a peer's tuning, which is its
own and whole, finds it, and so does a sweep.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from common import main

WORKERS = max(2, min(24, (os.cpu_count() or 2) - 4))
Work = Callable[[], Any]


def workers() -> ProcessPoolExecutor:
    """Processes of their own, for what compiles: they share Triton's cache on disk."""
    return ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn"))


def compiled_choices(compiled: Callable[[Any], str], jobs: Sequence[Any]) -> dict[Any, str]:
    """compiled(job), a function of a module's top level, of each job: empty where it could be compiled, else why not."""
    with workers() as pool:
        return dict(zip(jobs, pool.map(compiled, jobs), strict=True))


def ranked(what: str, seconds: Mapping[Any, float], kept: Any) -> None:
    """Prints every choice and its time, the best first; kept: the one as it stands."""
    for choice, each in sorted(seconds.items(), key=lambda item: item[1]):
        print(f"{what} {1e3 * each:.3f} ms {choice}{' (as it stands)' if choice == kept else ''}", flush=True)


def main_or_sweep(file: str, sweep: Callable[[], None]) -> None:
    """What the file of a benchmark does when it is run: with `--sweep` its search for sizes, else `common.main`."""
    if "--sweep" in sys.argv:
        torch.manual_seed(0)
        sweep()
    else:
        main(file)


def compiled_at_once(*work: Work) -> None:
    """Compiles every configuration of each kernel that the calls of `work` start; functions of a module's top level."""
    start = time.perf_counter()
    with workers() as pool:
        failed = {error for error in pool.map(_share, [(work, i) for i in range(WORKERS)]) if error}
    print(f"peers' kernels compiled in {time.perf_counter() - start:.0f} s", *failed, flush=True)


def _share(job: tuple[tuple[Work, ...], int]) -> str:
    """Compiles every WORKERS-th configuration. What fails here fails in the tuning too, which passes over it."""
    from triton.runtime.autotuner import Autotuner

    work, share = job
    bench, run = Autotuner._bench, Autotuner.run

    def some(self: Any, *args: Any, config: Any, **meta: Any) -> Any:
        if self.configs.index(config) % WORKERS != share:
            return [float("inf")] * 3
        self._do_bench = lambda call, quantiles: (call(), [1.0, 1.0, 1.0])[1]
        return bench(self, *args, config=config, **meta)

    def quiet(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.cache_results = False  # times of a share are not to be found by others
        try:
            return run(self, *args, **kwargs)
        except Exception:  # a share of which nothing fits the device: what comes of the call is not read
            return None

    Autotuner._bench, Autotuner.run = some, quiet  # type: ignore[method-assign]
    try:
        for one in work:
            one()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return ""
