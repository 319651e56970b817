"""Short clips of things that act, with the frames at which each action begins and ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from dovetail.data.scenes.draws import Draws
from dovetail.data.scenes.scene import PALETTE
from dovetail.data.scenes.shapes import SHAPES, TICKS
from dovetail.data.scenes.story import ACTIONS, Event, Story, draw_story
from dovetail.data.scenes.table import Feature, Language, Row, Split, Table
from dovetail.data.scenes.words import BACKGROUNDS, COLORS, color_name, definite, noun
from dovetail.errors import DataError

_GROUNDS = np.array([color.rgb for color in BACKGROUNDS], np.uint8)
_VERBS = {
    "en": (
        "moves left", "moves right", "moves up", "moves down", "turns clockwise", "turns counterclockwise", "grows",
        "shrinks", "appears", "vanishes", "becomes {color}",
    ),
    "zh": (
        "向左移动", "向右移动", "向上移动", "向下移动", "顺时针旋转", "逆时针旋转", "变大", "变小", "出现", "消失", "变成{color}",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Action:
    """Thing `object` does ACTIONS[label]: frame t differs from frame t - 1 for begin <= t < end. text says so."""

    label: int
    object: int
    begin: int
    end: int
    text: str


class Clip(Row):
    """T frames of S pixels a side with N things, 2 to 4, no two of one colour at a time. A mapping from column to value,
    and the same as attributes. Actions follow one another; between them, and before and after, nothing changes."""

    columns = (
        "frames", "labels", "colors", "present", "boxes", "masks", "depth", "background", "actions", "frame_actions",
        "caption",
    )  # fmt: skip

    def __init__(self, draws: Callable[[str], Draws], size: int, length: int, language: Language):
        self.size, self.length, self.language = size, length, language
        self.story: Story = draw_story(draws, size, length)

    @cached_property
    def frames(self) -> np.ndarray:
        """(T,3,S,S) uint8, flat colours."""
        ground = _GROUNDS[self.background]
        found = np.empty((self.length, 3, self.size, self.size), np.uint8)
        found[:] = ground[:, None, None]
        steps = PALETTE[self.colors] - ground  # modulo 256
        for i in range(len(self.labels)):
            found += self.masks[:, i, None] * steps[:, i, :, None, None]
        return found

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64: numbers of `SHAPES`."""
        return self.story.labels

    @property
    def colors(self) -> np.ndarray:
        """(T,N) int64: numbers of `COLORS`."""
        return self.story.colors

    @property
    def present(self) -> np.ndarray:
        """(T,N) bool: false before a thing appears and after it has vanished."""
        return self.story.present

    @cached_property
    def boxes(self) -> np.ndarray:
        """(T,N,4) float64: xyxy in pixels of the whole polygons, tight; zeros where a thing is not present."""
        vertices = self.story.vertices
        return np.concatenate([vertices.min(2), vertices.max(2)], 2) / TICKS * self.present[..., None]

    @property
    def masks(self) -> np.ndarray:
        """(T,N,S,S) bool: the pixels at which each thing is seen."""
        return self.story.masks

    @property
    def depth(self) -> np.ndarray:
        """(N,) int64: 0 is painted first."""
        return self.story.depth

    @property
    def background(self) -> int:
        """Number of `BACKGROUNDS`."""
        return self.story.background

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        """In the order of time."""
        return tuple(Action(e.action, e.object, e.begin, e.end, self._said(e)) for e in self.story.events)

    @cached_property
    def frame_actions(self) -> np.ndarray:
        """(T,) int64: 0 where nothing changes, else 1 + the number of the action."""
        found = np.zeros(self.length, np.int64)
        for action in self.actions:
            found[action.begin : action.end] = 1 + action.label
        return found

    @cached_property
    def caption(self) -> str:
        """All actions in the order of time."""
        if self.language == "zh":
            return "，然后".join(action.text for action in self.actions) + "。"
        text = ", then ".join(action.text for action in self.actions) + "."
        return text[0].upper() + text[1:]

    def _said(self, event: Event) -> str:
        before, after = event.colors
        thing = definite(noun(before, int(self.labels[event.object]), self.language), self.language)
        verb = _VERBS[self.language][event.action].format(color=color_name(after, self.language))
        return thing + verb if self.language == "zh" else f"{thing} {verb}"


class Clips(Table[Clip]):
    """Short clips; see `Clip` for the columns and `Table` for the arguments. length: frames, 16 to 256, 32 unless given.
    64 pixels a side unless given."""

    row = Clip

    def __init__(
        self,
        size: int = 64,
        seed: int = 0,
        language: Language = "en",
        count: int | None = None,
        split: Split = "train",
        length: int = 32,
    ):
        super().__init__(size, seed, language, count, split)
        if not 16 <= length <= 256:
            raise DataError(f"clips of {length} frames", where="length", remedy="give 16 to 256")
        self.length = length

    def draw(self, index: int) -> Clip:
        return Clip(partial(self.draws, index), self.size, self.length, self.language)

    @property
    def features(self) -> dict[str, Feature]:
        t, s = self.length, self.size
        action = {"label": "int64", "object": "int64", "begin": "int64", "end": "int64", "text": "string"}
        return {
            "frames": Feature("uint8", (t, 3, s, s), "flat colours"),
            "labels": Feature("int64", (None,), "class of each thing", tuple(shape.name for shape in SHAPES)),
            "colors": Feature("int64", (t, None), "colour of each thing in each frame", tuple(c.name for c in COLORS)),
            "present": Feature("bool", (t, None), "whether it is there"),
            "boxes": Feature("float64", (t, None, 4), "xyxy in pixels, zeros where it is not there"),
            "masks": Feature("bool", (t, None, s, s), "what is seen"),
            "depth": Feature("int64", (None,), "0 is painted first"),
            "background": Feature("int64", (), "colour", tuple(color.name for color in BACKGROUNDS)),
            "actions": Feature(action, (None,), "what happens from which frame to which"),
            "frame_actions": Feature("int64", (t,), "what happens in each frame", ("nothing", *ACTIONS)),
            "caption": Feature("string", (), "what happens"),
        }
