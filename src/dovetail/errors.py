"""Messages for people: what was wrong, where, and what to do about it.

Every error that a user can cause is a `DovetailError`. The command line prints it without a
traceback and leaves with `exit_code`: 2 when the input was at fault, 1 when the run was.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DovetailError(Exception):
    """Base of all errors raised on purpose. `what` happened, `where`, and the `remedy`."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None):
        self.what, self.where, self.remedy = what, where, remedy
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if remedy:
            lines.append(f"  what to do: {remedy}")
        super().__init__("\n".join(lines))


class UserError(DovetailError):
    """The input was at fault: a spec, a config, a path, a recipe, a command."""

    exit_code = 2


class SpecError(UserError):
    """A spec names an unknown kind or key, or holds a value of the wrong type."""


class BuildError(UserError):
    """Parts that cannot work together, refused when the model is built."""


class ConfigError(UserError):
    """A config.json with an unknown, missing or contradictory key."""


class CheckpointError(UserError):
    """Weights that are missing, left over, misshapen, truncated or unsafe."""


class DataError(UserError):
    """A corpus or a batch that cannot be used."""


class RunError(DovetailError):
    """The run itself failed: NaN loss, a full disk, a broken state."""


class DivergedError(RunError):
    """A training whose loss or gradients ceased to be finite."""


class StoppedError(RunError):
    """A training that was told to stop, and saved what it had."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A remedy that names the closest choice, or lists them all. Returns a sentence."""
    known = sorted(choices)
    near = difflib.get_close_matches(word, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(known)}" if known else "nothing is known here"
