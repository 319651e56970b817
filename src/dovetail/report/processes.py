"""Work in processes of its own: what it takes of memory is its own then, and nothing of it stays behind."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


def processes(count: int = 1) -> ProcessPoolExecutor:
    """A pool of `count` processes, begun afresh for every task: no state of this one, and none of the task before."""
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"), max_tasks_per_child=1)
