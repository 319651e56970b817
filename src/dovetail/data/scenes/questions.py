"""Questions about a scene, with answers that are worked out on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dovetail.data.scenes.draws import Draws
from dovetail.data.scenes.referring import Facts, Reference
from dovetail.data.scenes.shapes import SHAPES
from dovetail.data.scenes.words import (
    ASKED,
    COLORS,
    background_name,
    color_name,
    definite,
    indefinite,
    noun,
    shape_name,
)


@dataclass(frozen=True)
class Question:
    """kind: "count", "exists", "color", "shape", "place" (left, right, above, below), "depth" (in front, behind) or
    "background"."""

    text: str
    answer: str
    kind: str


def draw_questions(
    facts: Facts, known: Sequence[Reference], background: int, draws: Draws, language: str
) -> tuple[Question, ...]:
    """One of each kind that the scene has; `known`: all references to its things."""
    ask = ASKED[language]
    found = [_count(facts, draws, language), _exists(facts, draws, language)]
    colorless = [r for r in known if not r.says[0]]
    if colorless:
        r = draws.pick(colorless)
        found.append(Question(ask["color"].format(a=r.text), color_name(facts.colors[r.object], language), "color"))
    shapeless = [r for r in known if not r.says[1]]
    if shapeless:
        r = draws.pick(shapeless)
        found.append(Question(ask["shape"].format(a=r.text), shape_name(facts.labels[r.object], language), "shape"))
    plain = [_plainly(facts, i, language) for i in range(facts.count)]
    for kind, relations in (("place", ("left", "right", "above", "below")), ("depth", ("front", "behind"))):
        found += _related(facts, [r for r in plain if r], relations, kind, draws, language)
    found.append(Question(ask["background"], background_name(background, language), "background"))
    return tuple(found)


def _plainly(facts: Facts, i: int, language: str) -> Reference | None:
    said = facts.plain(i)
    return said and Reference(definite(noun(*said, language), language), i, (said[0] is not None, said[1] is not None))


def _count(facts: Facts, draws: Draws, language: str) -> Question:
    i = draws.below(facts.count)
    said = draws.pick(
        [(None, None), (facts.colors[i], None), (None, facts.labels[i]), (facts.colors[i], facts.labels[i])]
    )
    name = noun(*said, language, plural=True)
    return Question(ASKED[language]["count"].format(a=name), str(len(facts.matching(*said))), "count")


def _exists(facts: Facts, draws: Draws, language: str) -> Question:
    """Half the time of something that is there."""
    there, i = draws.below(2) == 1, draws.below(facts.count)
    color, label = facts.colors[i], facts.labels[i]
    if not there:  # the same with another colour, or another shape
        colors = [c for c in range(len(COLORS)) if not facts.matching(c, label)]
        labels = [k for k in range(len(SHAPES)) if not facts.matching(color, k)]
        if draws.below(2) and colors:
            color = draws.pick(colors)
        else:
            label = draws.pick(labels)  # twelve classes, and at most eight things
    name = indefinite(noun(color, label, language), language)
    ask = ASKED[language]
    return Question(ask["exists"].format(a=name), ask["yes" if there else "no"], "exists")


def _related(
    facts: Facts, plain: list[Reference], relations: tuple[str, ...], kind: str, draws: Draws, language: str
) -> list[Question]:
    """One question whether a stands so to b, if any pair stands clearly so or not so. Things that share no pixel are
    not asked about for depth."""
    ask, truth = ASKED[language], draws.below(2) == 1
    pairs: list[tuple[str, Reference, Reference]] = []
    for a in plain:
        for b in plain:
            if a is b or (kind == "depth" and not facts.shared[a.object][b.object]):
                continue
            pairs += [(r, a, b) for r in relations if facts.holds(r, a.object, b.object) is truth]
    if not pairs:
        return []
    relation, a, b = draws.pick(pairs)
    return [Question(ask[relation].format(a=a.text, b=b.text), ask["yes" if truth else "no"], kind)]
