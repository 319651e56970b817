"""What is said of a command that failed, and its exit code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from dovetail.errors import DovetailError, RunError

INTERRUPTED = 130  # as shells have it: 128 and the number of SIGINT


@dataclass(frozen=True)
class Failure:
    """said: whether the message is on the screen already. unexpected: whether nobody meant to raise it."""

    code: int
    what: str
    where: str | None = None
    remedy: str | None = None
    said: bool = False
    unexpected: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"error": {"what": self.what, "where": self.where, "remedy": self.remedy}}

    def __str__(self) -> str:
        return str(DovetailError(self.what, where=self.where, remedy=self.remedy))


def failure_of(error: BaseException) -> Failure | None:
    """None where the command ended well."""
    if isinstance(error, SystemExit):
        return _ended(error)
    if isinstance(error, KeyboardInterrupt):
        return Failure(INTERRUPTED, "interrupted")
    known = error if isinstance(error, DovetailError) else _out_of_memory(error)
    if known is not None:
        return Failure(known.exit_code, known.what, known.where, known.remedy)
    what = f"{type(error).__name__}: {error}"
    return Failure(1, what, remedy="run again with --debug and report it", unexpected=True)


def _ended(end: SystemExit) -> Failure | None:
    """Typer ends every command by a SystemExit, in place of what it has said itself, or an interrupt."""
    code = end.code if isinstance(end.code, int) else int(end.code is not None)
    if code == 0:
        return None
    if code == INTERRUPTED:
        return Failure(code, "interrupted")
    cause: Any = end.__context__
    if hasattr(cause, "format_message"):
        return Failure(code, cause.format_message(), remedy="see --help", said=True)
    if isinstance(cause, OSError):  # a pipe to another process, which typer takes for that of the output
        return failure_of(cause)
    text = end.code if isinstance(end.code, str) else None
    return Failure(code, text or "the command failed", said=text is None)


def _out_of_memory(error: BaseException) -> RunError | None:
    """torch's words for memory that gave out, for people."""
    text = str(error)
    if not (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text)
    ):
        return None
    asked = re.search(r"tried to allocate ([\d.]+) (\w+)", text, re.IGNORECASE)
    more = ""
    if asked is not None:
        amount = f"{float(asked[1]) / 1e9:,.1f} GB" if asked[2] == "bytes" else f"{asked[1]} {asked[2]}"
        more = f": {amount} more were asked for"
    return RunError(
        f"the memory does not suffice{more}",
        remedy="ask for less at a time: fewer new tokens, a smaller batch or length; `dovetail preflight` counts a training",
    )
