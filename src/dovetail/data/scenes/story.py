"""What happens in a clip: things, and actions one after the other that begin and end at known frames; in integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np

from dovetail.data.scenes.draws import Draws
from dovetail.data.scenes.raster import fill
from dovetail.data.scenes.shapes import SHAPES, TICKS, TURN, outline
from dovetail.data.scenes.words import BACKGROUNDS, COLORS

ACTIONS = (
    "move left", "move right", "move up", "move down", "turn clockwise", "turn counterclockwise", "grow", "shrink",
    "appear", "vanish", "change color",
)  # fmt: skip
_WAYS = ((-1, 0), (1, 0), (0, -1), (0, 1))  # of the first four
_CHANGED = 3  # pixels that a frame in an action differs in from the one before, at least
_SEEN = (12, 2, 5)  # pixels of a thing that are seen in every frame, and two fifths of it


@dataclass(frozen=True)
class Event:
    """In the frames begin <= t < end, and in no others of its time, frame t differs from frame t - 1: thing `object`
    does ACTIONS[action]. colors: the thing's before and after."""

    action: int
    object: int
    begin: int
    end: int
    colors: tuple[int, int]


@dataclass(frozen=True)
class Story:
    """N things in T frames. colors, present (T,N); vertices (T,N,V,2) int64 in ticks; masks (T,N,S,S) bool of what is
    seen; depth (N,): 0 is painted first; no two things are of one colour in one frame."""

    labels: np.ndarray
    colors: np.ndarray
    present: np.ndarray
    vertices: np.ndarray
    masks: np.ndarray
    depth: np.ndarray
    background: int
    events: tuple[Event, ...]


def draw_story(draws: Callable[[str], Draws], size: int, length: int) -> Story:
    """The first try that fits: all things stay inside the image and in sight, and every action shows in every frame."""
    for attempt in count():
        story = _try(draws(f"story {attempt}"), size, length)
        if story is not None:
            return story
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class _States:
    """All things in all frames, at first all alike. middles (T,N,2) and units (T,N) in ticks, turns (T,N) in steps."""

    size: int
    labels: np.ndarray
    colors: np.ndarray
    middles: np.ndarray
    units: np.ndarray
    turns: np.ndarray
    present: np.ndarray

    def act(self, draws: Draws, action: int, i: int, begin: int, end: int) -> None:
        """Thing i does so from frame begin to end, and stays as it is then."""
        name, frames = ACTIONS[action], np.arange(len(self.colors))
        steps = np.clip(frames - begin + 1, 0, end - begin)  # how far it has come in each frame
        if name == "appear":
            self.present[:begin, i] = False
        elif name == "vanish":
            self.present[begin:, i] = False
        elif name == "change color":
            self.colors[begin:, i] = draws.pick([c for c in range(len(COLORS)) if c not in self.colors])
        elif action < len(_WAYS):
            pace = TICKS * draws.between(16, 32) * self.size // 1024  # a sixty-fourth to a thirty-second of the image
            self.middles[:, i] += steps[:, None] * pace * np.array(_WAYS[action])
        elif name.startswith("turn"):
            pace = draws.between(15, 23)  # 7.5 to 11.5 degrees, less than half of what any shape looks alike after
            self.turns[:, i] += steps * (pace if name == "turn clockwise" else -pace)
        else:
            self.units[:, i] += self.units[:, i] * steps * (10 if name == "grow" else -7) // 100


def _try(draws: Draws, size: int, length: int) -> Story | None:
    things = draws.between(2, 4)
    mirrored = draws.many([2] * things) == 1
    depth, background = draws.order(things), draws.below(len(BACKGROUNDS))
    states = _States(
        size=size,
        labels=draws.many([len(SHAPES)] * things),
        colors=np.tile(draws.order(len(COLORS))[:things], (length, 1)),
        middles=np.tile(TICKS * size // 6 + draws.many([[TICKS * size * 2 // 3] * 2] * things), (length, 1, 1)),
        units=np.tile(TICKS * size // 11 + draws.many([TICKS * size // 40] * things), (length, 1)),
        turns=np.tile(draws.many([TURN] * things), (length, 1)),
        present=np.ones((length, things), bool),
    )
    events = _events(draws, states)
    if not events:
        return None
    flat = np.tile(states.labels, length), states.units.ravel(), states.turns.ravel(), np.tile(mirrored, length)
    vertices = outline(*flat).reshape(length, things, -1, 2) + states.middles[:, :, None]
    if vertices.min() < TICKS or vertices.max() > (size - 1) * TICKS:
        return None
    whole = fill(vertices.reshape(length * things, -1, 2), size, size).reshape(length, things, size, size)
    whole &= states.present[..., None, None]
    masks, covered = whole.copy(), np.zeros((length, size, size), bool)
    for i in np.argsort(-depth):
        masks[:, i] &= ~covered
        covered |= whole[:, i]
    seen, all_pixels = masks.sum((2, 3)), whole.sum((2, 3))
    pixels, part, of = _SEEN
    if not ((seen >= pixels) & (seen * of >= all_pixels * part))[states.present].all():
        return None
    story = Story(states.labels, states.colors, states.present, vertices, masks, depth, background, events)
    return story if _shows(story) else None


def _events(draws: Draws, states: _States) -> tuple[Event, ...]:
    """1 to 4 actions, which `states` then have; none where one would not be possible."""
    events: list[Event] = []
    length, things = states.colors.shape
    begin, most = draws.between(2, 6), draws.between(1, 4)
    while len(events) < most:
        action, i = draws.below(len(ACTIONS)), draws.below(things)
        name = ACTIONS[action]
        end = begin + (1 if name in ("appear", "vanish", "change color") else draws.between(4, 8))
        if end > length - 2:
            break
        if not states.present[begin - 1, i] or (name == "appear" and any(event.object == i for event in events)):
            return ()  # it is gone, or has been seen already
        if name.startswith("turn") and not SHAPES[states.labels[i]].symmetry:
            return ()  # a round thing that turns looks as if it did not
        before = int(states.colors[begin - 1, i])
        states.act(draws, action, i, begin, end)
        events.append(Event(action, i, begin, end, (before, int(states.colors[end, i]))))
        begin = end + draws.between(2, 6)
    return tuple(events)


def _shows(story: Story) -> bool:
    """Whether frames differ in every step of an action. (In others nothing moves.)"""
    front = np.full(story.masks.shape[:1] + story.masks.shape[2:], -1)
    for i in range(story.masks.shape[1]):
        front = np.where(story.masks[:, i], story.colors[:, i, None, None], front)
    changed = (front[1:] != front[:-1]).sum((1, 2))
    acting = np.concatenate([np.arange(event.begin, event.end) for event in story.events])
    return bool((changed[acting - 1] >= _CHANGED).all())
