"""The procedural world: scenes, windows and clips with exact labels, drawn from (seed, split, index) by integers alone."""

from __future__ import annotations

from dovetail.data.scenes.clips import Action, Clip, Clips
from dovetail.data.scenes.export import write_rows
from dovetail.data.scenes.scene import Scene, Scenes
from dovetail.data.scenes.shapes import SHAPES
from dovetail.data.scenes.story import ACTIONS
from dovetail.data.scenes.widgets import ROLES
from dovetail.data.scenes.windows import Window, Windows
from dovetail.data.scenes.words import BACKGROUNDS, COLORS

__all__ = [
    "ACTIONS", "BACKGROUNDS", "COLORS", "ROLES", "SHAPES", "Action", "Clip", "Clips", "Scene", "Scenes", "Window",
    "Windows", "write_rows",
]  # fmt: skip
