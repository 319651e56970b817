"""The pictures of docs/algorithms, each drawn by running the algorithm itself. Used by generate.py.

A topic is a page `algorithms/TOPIC.md` and a file `drawn_TOPIC.py`, whose `PICTURES` are functions without arguments
that return a Figure; their names go into `TOPICS` here. The page shows the picture `NAME` of `TOPIC` by the line
`--8<-- "docs/generated/algorithms/TOPIC-NAME.svg"`, alone between empty lines. The first line of the function's
docstring says what is seen, for those who do not see it. What is drawn in black takes the page's text colour.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from dovetail.report import plots

TOPICS: tuple[str, ...] = (
    "approximation",
    "poisson",
    "extrema",
)


def pictures(topic: str) -> dict[str, Callable[[], Figure]]:
    """Name -> painter of the pictures of a topic."""
    return importlib.import_module(f"drawn_{topic}").PICTURES


def picture(painter: Callable[[], Figure]) -> str:
    """One picture, as a block of HTML that stands in a page."""
    label = (inspect.getdoc(painter) or "").split("\n")[0]
    return f"<figure>\n{plots.inline(painter(), label)}</figure>\n"


def write(out: Path) -> int:
    """Draws every picture into the folder `out`; how many there are."""
    out.mkdir(parents=True)
    drawn = [(topic, name, painter) for topic in TOPICS for name, painter in pictures(topic).items()]
    for topic, name, painter in drawn:
        (out / f"{topic}-{name}.svg").write_text(picture(painter), encoding="utf-8")
    return len(drawn)
