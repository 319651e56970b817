"""Output whose reader may go before the command is done: `dovetail list | head -1`."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class Piped:
    """A text stream that is not read any more ends the command well (`ends`), or is given up while that goes on."""

    def __init__(self, stream: Any, *, ends: bool):
        self._stream, self._ends = stream, ends

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._unread()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._unread()

    def _unread(self) -> None:
        """What is left, and what comes, goes nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if self._ends:
            raise SystemExit(0)


@contextlib.contextmanager
def piped() -> Iterator[None]:
    """Inside, a command ends well where nobody reads what it prints, and goes on where nobody reads what it says beside
    that (a training, above all). What the terminal's encoding has no character for is written as its number."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with (
        contextlib.redirect_stdout(Piped(sys.stdout, ends=True)),  # type: ignore[type-var]
        contextlib.redirect_stderr(Piped(sys.stderr, ends=False)),  # type: ignore[type-var]
    ):
        yield
