"""A training that is told to stop saves first: schedulers send SIGTERM before they take a machine back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_awaited() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM does nothing but turn the answer of what is yielded to True. Threads other than the main one, in
    which Python handles no signals, leave everything as it is."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
