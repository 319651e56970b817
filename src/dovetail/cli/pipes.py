"""Output whose reader may go before the command is done (`dovetail list | head -1`), or whose disk may be full."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dovetail.errors import RunError


class Piped:
    """A text stream that is not read any more ends the command well (`ends`), or is given up while that goes on. One that
    cannot be written is given up too, and with `ends` raises RunError."""

    def __init__(self, stream: Any, *, ends: bool):
        self._stream, self._ends = stream, ends

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._watched():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._watched():
            self._stream.flush()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self._give_up()
            if self._ends:
                raise SystemExit(0) from None
        except OSError as error:
            self._give_up()
            if self._ends:
                raise RunError(
                    f"the output cannot be written: {error.strerror or error}",
                    remedy="make room, or write it elsewhere",
                ) from None

    def _give_up(self) -> None:
        """What is left, and what comes, goes nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def piped() -> Iterator[None]:
    """Inside, a command ends well where nobody reads what it prints, and goes on where nobody reads what it says beside
    that (a training, above all). What the terminal's encoding has no character for is written as its number."""
    with contextlib.ExitStack() as held:
        streams = []
        for stream in (sys.stdout, sys.stderr):
            if stream is None:  # closed by who began it: `>&-`
                stream = held.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
            streams.append(stream)
        held.enter_context(contextlib.redirect_stdout(Piped(streams[0], ends=True)))  # type: ignore[type-var]
        held.enter_context(contextlib.redirect_stderr(Piped(streams[1], ends=False)))  # type: ignore[type-var]
        yield
