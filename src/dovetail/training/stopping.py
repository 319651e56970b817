"""A training that is told to stop saves first: schedulers send SIGTERM before they take a machine back, people press
Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

SAID = b"\nstopping, and saving first (Ctrl-C again ends it without)\n"


@contextmanager
def sigterm_awaited() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM and a first SIGINT do nothing but turn the answer of what is yielded to True; a second SIGINT does
    what it would do outside. One that is ignored stays so (nohup, a shell's background). Threads other than the main one,
    in which Python handles no signals, leave everything as it is."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told.is_set
        return
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: told.set())}

    def interrupted(*_: Any) -> None:
        told.set()
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        if (
            multiprocessing.parent_process() is None
        ):  # those that it began get the signal too, and need not say it again
            with suppress(OSError):
                os.write(2, SAID)  # print may be at work below this very frame

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupted)
    try:
        yield told.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
