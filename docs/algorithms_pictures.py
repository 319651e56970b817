"""The pictures of docs/algorithms, each drawn by running the algorithm itself. Used by generate.py.

A topic is a page `algorithms/TOPIC.md` and a file `drawn_TOPIC.py`, whose `PICTURES` are functions without arguments
that return a Figure; their names go into `TOPICS` here. The page shows the picture `NAME` of `TOPIC` by the line
`--8<-- "docs/generated/algorithms/TOPIC-NAME.svg"`, alone between empty lines. The first line of the function's
docstring says what is seen, for those who do not see it. What is drawn in black takes the page's text colour.

The tests run a page's blocks marked `python` and `bash` in order, in an empty folder with `assets/`: what a command
reads, a block before it writes. Commands that are shown only stand in a block marked `text`. The page has a row in
`algorithms/index.md`.
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
    "geometry",
    "words",
    "boxes",
    "ngram",
)


def pictures(topic: str) -> dict[str, Callable[[], Figure]]:
    """Name -> painter of the pictures of a topic."""
    return importlib.import_module(f"drawn_{topic}").PICTURES


def picture(painter: Callable[[], Figure]) -> str:
    """One picture, as a block of HTML that stands in a page."""
    label = (inspect.getdoc(painter) or "").split("\n")[0]
    svg = plots.inline(painter(), label).replace("<svg", '<svg style="max-width:100%;height:auto"', 1)
    return f"<figure>\n{svg}</figure>\n"


def write(out: Path) -> int:
    """Draws every picture into the folder `out`; how many there are."""
    out.mkdir(parents=True)
    drawn = [(topic, name, painter) for topic in TOPICS for name, painter in pictures(topic).items()]
    for topic, name, painter in drawn:
        (out / f"{topic}-{name}.svg").write_text(picture(painter), encoding="utf-8")
    return len(drawn)
