"""Phrases that mean one thing of a scene and no other: each is worked out on the scene before it is said.

What is nearly a tie is not said: places count as different only from a sixteenth of the image on, sizes from a quarter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dovetail.data.scenes.draws import Draws
from dovetail.data.scenes.layout import Layout
from dovetail.data.scenes.shapes import TICKS
from dovetail.data.scenes.words import COUNTED, EXTREMES, RELATIONS, definite, noun, ordinal

_TOUCH = 8  # pixels at which one thing must be seen to lie on another before it is said to be in front
_DIRECTIONS = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis, sign


@dataclass(frozen=True)
class Phrase:
    """text means thing number `object`."""

    text: str
    object: int


@dataclass(frozen=True)
class Reference:
    """A phrase, and which of colour and class it says of its thing."""

    text: str
    object: int
    says: tuple[bool, bool]


class Facts:
    """What phrases are worked out on: integers of a layout of N things in an image of `size` pixels a side.

    middles (N,2): of boxes, in half ticks; areas (N,): twice those of the whole polygons, in ticks²; hides (N,N):
    pixels where the first is seen and the second lies behind; shared (N,N): pixels that two whole things have in common.
    """

    def __init__(self, layout: Layout, size: int):
        vertices = layout.vertices
        self.count = len(vertices)
        self.labels, self.colors = layout.labels.tolist(), layout.colors.tolist()
        self.middles = (vertices.min(1) + vertices.max(1)).tolist()
        after = np.roll(vertices, -1, axis=1)  # the padding repeats a vertex, which adds nothing
        self.areas = (vertices[..., 0] * after[..., 1] - vertices[..., 1] * after[..., 0]).sum(1).tolist()
        whole, seen = (m.reshape(self.count, -1).astype(np.float32) for m in (layout.whole, layout.masks))
        self.shared = (whole @ whole.T).astype(np.int64).tolist()  # counts up to 2^24 are exact
        self.hides = (seen @ whole.T).astype(np.int64).tolist()
        self.margin = 2 * TICKS * size // 16
        self._held: dict[tuple[str, int, int], bool | None] = {}

    def matching(self, color: int | None, label: int | None) -> list[int]:
        return [
            i
            for i in range(self.count)
            if (color is None or self.colors[i] == color) and (label is None or self.labels[i] == label)
        ]

    def holds(self, relation: str, a: int, b: int) -> bool | None:
        """Whether a stands so to b; None where people could differ."""
        asked = relation, a, b
        if asked not in self._held:
            self._held[asked] = self._holds(*asked)
        return self._held[asked]

    def _holds(self, relation: str, a: int, b: int) -> bool | None:
        if relation in ("front", "behind"):
            front, back = (a, b) if relation == "front" else (b, a)
            if self.hides[front][back] >= _TOUCH:
                return True
            return False if self.hides[back][front] >= _TOUCH or not self.shared[a][b] else None
        axis, sign = _DIRECTIONS[relation]
        along = sign * (self.middles[a][axis] - self.middles[b][axis])
        across = abs(self.middles[a][1 - axis] - self.middles[b][1 - axis])
        if along >= self.margin and along >= across:
            return True
        return False if along <= 0 else None

    def extreme(self, which: str, among: list[int]) -> int | None:
        """The one that is clearly the most so, if one is."""
        if which in ("largest", "smallest"):
            order = sorted(among, key=lambda i: self.areas[i], reverse=which == "largest")
            small, large = sorted((self.areas[order[0]], self.areas[order[1]]))
            return order[0] if 4 * large >= 5 * small else None
        axis, sign = _DIRECTIONS[which]
        order = sorted(among, key=lambda i: -sign * self.middles[i][axis])
        gap = abs(self.middles[order[0]][axis] - self.middles[order[1]][axis])
        return order[0] if gap >= self.margin else None

    def row(self, axis: int, among: list[int]) -> list[int] | None:
        """All in the order of an axis, if each stands clearly apart from the next."""
        order = sorted(among, key=lambda i: self.middles[i][axis])
        places = [self.middles[i][axis] for i in order]
        apart = all(b - a >= self.margin for a, b in pairwise(places))
        return order if apart else None

    def plain(self, i: int) -> tuple[int | None, int | None] | None:
        """(color, label) that is said of i alone, by as little as will do."""
        color, label = self.colors[i], self.labels[i]
        for said in ((None, label), (color, None), (color, label)):
            if self.matching(*said) == [i]:
                return said
        return None


def references(facts: Facts, i: int, language: str) -> Iterator[Reference]:
    """Every phrase of this grammar that means thing i."""
    color, label = facts.colors[i], facts.labels[i]
    for said in ((None, label), (color, None), (color, label), (None, None)):
        among = facts.matching(*said)
        name, says = noun(*said, language), (said[0] is not None, said[1] is not None)
        if len(among) == 1:
            if says != (False, False):
                yield Reference(definite(name, language), i, says)
            continue
        for which, template in EXTREMES[language].items():
            if says[1] and which in ("largest", "smallest"):  # "the largest small triangle"
                continue
            if facts.extreme(which, among) == i:
                yield Reference(template.format(a=name), i, says)
        for which, template in COUNTED[language].items():
            order = facts.row(_DIRECTIONS[which][0], among) if len(among) > 2 and says[1] else None
            if order and i not in (order[0], order[-1]):
                yield Reference(template.format(a=name, n=ordinal(order.index(i) + 1, language)), i, says)
        yield from _related(facts, i, among, name, says, language)


def _related(
    facts: Facts, i: int, among: list[int], name: str, says: tuple[bool, bool], language: str
) -> Iterator[Reference]:
    """Phrases that tell i from the others of `among` by where it stands to a thing that has a plain name."""
    for j in range(facts.count):
        beside = facts.plain(j) if j != i else None
        if beside is None:
            continue
        for relation, template in RELATIONS[language].items():
            if not facts.holds(relation, i, j):
                continue
            if all(facts.holds(relation, a, j) is False for a in among if a not in (i, j)):
                said = template.format(a=definite(name, language), b=definite(noun(*beside, language), language))
                yield Reference(said, i, says)


def draw_phrases(known: Sequence[Sequence[Reference]], draws: Draws, most: int = 2) -> tuple[Phrase, ...]:
    """At most so many of the references of each thing, of which one that nothing tells from its likes has none."""
    return tuple(Phrase(r.text, r.object) for of_thing in known for r in draws.sample(of_thing, most))
