"""Work in processes of its own: what it takes of memory is its own then, and nothing of it stays behind."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context

from dovetail.training.stopping import sigterm_awaited

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def processes(count: int = 1) -> ProcessPoolExecutor:
    """A pool of `count` processes, begun afresh for every task: no state of this one, and none of the task before.

    On Linux they get a SIGTERM where this one dies, whatever it dies of.
    """
    fresh = get_context("spawn")
    return ProcessPoolExecutor(
        count, mp_context=fresh, max_tasks_per_child=1, initializer=_fall_with, initargs=(os.getpid(),)
    )


@contextmanager
def sigterm_handed_on() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM does not end this process. What is yielded says whether there was one, and hands it on to the
    processes that were begun inside: once to each, so it is to be asked until they have ended, as some begin later."""
    told = {child.pid for child in active_children()}  # others, or told before
    with sigterm_awaited() as come:

        def handed_on() -> bool:
            for child in active_children() if come() else ():
                if child.pid not in told:
                    told.add(child.pid)
                    child.terminate()
            return come()

        yield handed_on


def _fall_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before that was said
            os.kill(os.getpid(), signal.SIGTERM)
