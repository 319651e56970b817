"""Every fast path off at once: each kernel's plain twin, eager, in fp32 or better. What they must all agree with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

WHY = "plain, as asked"
_asked = False


@contextmanager
def plain() -> Iterator[None]:
    """Inside, plans name the plain twins ("plain, as asked"): attention as a matrix of scores, recurrences token by
    token, norms by their formula, all logits at once, an optimiser that goes from parameter to parameter.

    Memory and time are the formulas'. It holds for the whole process, since a backward may run on another thread; a
    backward belongs inside it, and so does the making of an optimiser. What `torch.compile` has made for the fast
    paths is made anew. `train.plain` in a recipe does this for a run.
    """
    global _asked
    before, _asked = _asked, True
    try:
        yield
    finally:
        _asked = before


def asked() -> bool:
    """Whether the plain twins are asked for: what a plan looks at first."""
    return _asked
