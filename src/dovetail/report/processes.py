"""Work in processes of its own: what it takes of memory is its own then, and nothing of it stays behind."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess

from dovetail.training.stopping import sigterm_awaited

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Seconds that processes have to save and end once they are told: what Slurm and Kubernetes leave between SIGTERM and
# SIGKILL unless told otherwise. Some never end: where the whole process group got the signal, as from `timeout`, a step
# can be waiting for a compiler's process that it ended.
GRACE = 30.0


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
    processes that were begun inside: once to each, so it is to be asked until they have ended, as some begin later.
    After a SIGTERM the end waits for all of them; those that are still there GRACE seconds after it was handed on are
    killed, which is said on stderr."""
    others = {child.pid for child in active_children()}
    told: set[int | None] = set()
    killed: set[int | None] = set()
    end = 0.0

    def left() -> list[BaseProcess]:
        return [child for child in active_children() if child.pid not in others]

    with sigterm_awaited() as come:

        def handed_on() -> bool:
            nonlocal end
            if not come():
                return False
            end = end or time.monotonic() + GRACE
            for child in left():
                if child.pid not in told:
                    told.add(child.pid)
                    child.terminate()
                elif time.monotonic() > end and child.pid not in killed:
                    killed.add(child.pid)
                    child.kill()
                    said = f"process {child.pid} had not ended {GRACE:g} s after it was told to stop, and was killed"
                    print(f"{said}: what it had saved before is kept", file=sys.stderr, flush=True)
            return True

        try:
            yield handed_on
        finally:  # a pool that is broken calls all its work done, and then waits for its processes, for ever if need be
            while handed_on() and left():
                time.sleep(0.05)


def _fall_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before that was said
            os.kill(os.getpid(), signal.SIGTERM)
