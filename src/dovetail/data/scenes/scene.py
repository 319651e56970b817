"""Scenes: polygons in colours, and all that is true of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cached_property, partial

import numpy as np
import torch

from dovetail.data.scenes.draws import Draws
from dovetail.data.scenes.layout import Layout, draw_layout
from dovetail.data.scenes.questions import Question, draw_questions
from dovetail.data.scenes.referring import Facts, Phrase, Reference, draw_phrases, references
from dovetail.data.scenes.shapes import CORNERS, SHAPES, TICKS
from dovetail.data.scenes.table import Feature, Language, Row, Table
from dovetail.data.scenes.words import BACKGROUNDS, COLORS, caption
from dovetail.geometry import min_area_rectangle

PALETTE = np.array([color.rgb for color in COLORS], np.uint8)
_BACKGROUNDS = np.array([color.rgb for color in BACKGROUNDS], np.uint8)


class Scene(Row):
    """N things, 1 to 8, in an image of S pixels a side; x to the right, y down, in pixels, (0, 0) the upper left corner
    of the first pixel, whose centre is (0.5, 0.5). A mapping, and the same as attributes."""

    columns = (
        "image", "labels", "colors", "boxes", "rotated_boxes", "masks", "full_masks", "polygons", "depth",
        "background", "caption", "phrases", "questions",
    )  # fmt: skip

    def __init__(self, draws: Callable[[str], Draws], size: int, language: Language):
        self._draws, self.size, self.language = draws, size, language
        self.layout: Layout = draw_layout(draws("layout"), size)

    @cached_property
    def image(self) -> np.ndarray:
        """(3,S,S) uint8: the flat colour of the front thing at every pixel's centre. No pixel is a mixture."""
        ground = _BACKGROUNDS[self.background]
        image = np.empty((3, self.size, self.size), np.uint8)
        image[:] = ground[:, None, None]
        for mask, step in zip(self.masks.view(np.uint8), PALETTE[self.colors] - ground, strict=True):
            image += mask * step[:, None, None]  # modulo 256; no two masks share a pixel
        return image

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64: numbers of `SHAPES`."""
        return self.layout.labels

    @property
    def colors(self) -> np.ndarray:
        """(N,) int64: numbers of `COLORS`."""
        return self.layout.colors

    @cached_property
    def boxes(self) -> np.ndarray:
        """(N,4) float64: xyxy of the whole polygons, tight; exact to 1/16 of a pixel."""
        vertices = self.layout.vertices
        return np.concatenate([vertices.min(1), vertices.max(1)], 1) / TICKS

    @cached_property
    def rotated_boxes(self) -> np.ndarray:
        """(N,5) float64: (cx, cy, w, h, angle in radians), the smallest rectangle about each whole polygon."""
        points, counts = torch.from_numpy(self.layout.vertices), torch.from_numpy(CORNERS[self.labels])
        return min_area_rectangle(points, counts).box.numpy() / (TICKS, TICKS, TICKS, TICKS, 1)

    @property
    def masks(self) -> np.ndarray:
        """(N,S,S) bool: the pixels at which each thing is seen. No two share one."""
        return self.layout.masks

    @property
    def full_masks(self) -> np.ndarray:
        """(N,S,S) bool: the pixels of each thing as if it stood alone."""
        return self.layout.whole

    @cached_property
    def polygons(self) -> tuple[np.ndarray, ...]:
        """N of (corners,2) float64, the shoelace sum positive; exact to 1/16 of a pixel."""
        return tuple(self.layout.points(i) / TICKS for i in range(len(self.labels)))

    @property
    def depth(self) -> np.ndarray:
        """(N,) int64: a permutation; 0 is painted first, and hides nothing."""
        return self.layout.depth

    @property
    def background(self) -> int:
        """Number of `BACKGROUNDS`."""
        return self.layout.background

    @cached_property
    def caption(self) -> str:
        """A sentence that counts all things by colour and class."""
        groups = Counter(zip(self.colors.tolist(), self.labels.tolist(), strict=True))
        listed = [(count, color, label) for (color, label), count in groups.items()]
        return caption(listed, self.background, self._draws("caption").below(3), self.language)

    @cached_property
    def phrases(self) -> tuple[Phrase, ...]:
        """Up to two phrases a thing, each of which means it and no other."""
        return draw_phrases(self._known, self._draws("phrases"))

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """Questions with their answers, at most one of each kind."""
        known = [r for of_thing in self._known for r in of_thing]
        return draw_questions(self._facts, known, self.background, self._draws("questions"), self.language)

    @cached_property
    def _facts(self) -> Facts:
        return Facts(self.layout, self.size)

    @cached_property
    def _known(self) -> list[list[Reference]]:
        return [list(references(self._facts, i, self.language)) for i in range(len(self.labels))]


class Scenes(Table[Scene]):
    """Scenes of polygons with exact labels; see `Scene` for the columns and `Table` for the arguments.

    Procedural: a test bench and a first run, no substitute for photographs.
    """

    row = Scene

    def draw(self, index: int) -> Scene:
        return Scene(partial(self.draws, index), self.size, self.language)

    @property
    def features(self) -> dict[str, Feature]:
        s = self.size
        names, colors = tuple(shape.name for shape in SHAPES), tuple(color.name for color in COLORS)
        return {
            "image": Feature("uint8", (3, s, s), "flat colours"),
            "labels": Feature("int64", (None,), "class of each thing", names),
            "colors": Feature("int64", (None,), "colour of each thing", colors),
            "boxes": Feature("float64", (None, 4), "xyxy in pixels, of the whole polygon"),
            "rotated_boxes": Feature("float64", (None, 5), "cx, cy, w, h in pixels, angle in radians"),
            "masks": Feature("bool", (None, s, s), "what is seen"),
            "full_masks": Feature("bool", (None, s, s), "what would be seen of each thing alone"),
            "polygons": Feature("float64", (None, None, None), "corners (x, y) in pixels"),
            "depth": Feature("int64", (None,), "0 is painted first"),
            "background": Feature("int64", (), "colour", tuple(color.name for color in BACKGROUNDS)),
            "caption": Feature("string", (), "counts all things by colour and class"),
            "phrases": Feature({"text": "string", "object": "int64"}, (None,), "each means one thing"),
            "questions": Feature({"text": "string", "answer": "string", "kind": "string"}, (None,)),
        }
