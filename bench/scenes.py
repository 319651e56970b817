"""Rows of the procedural world a second, on one core; and the exact masks against two other ways to draw them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from common import interleaved, main, row
from PIL import Image, ImageDraw

from dovetail.data import Clips, Scenes, Windows
from dovetail.data.scenes.raster import fill
from dovetail.geometry import polygons_to_masks

BENCHMARK = {"threads": 1, "minutes": 1}
ROWS = 400
PROMISED = 500  # scenes a second a core at 128 x 128, with these columns:
COLUMNS = ("image", "labels", "boxes", "masks", "polygons", "caption")


def read(table: Any, columns: tuple[str, ...] | list[str]) -> None:
    for one in table:
        for name in columns:
            one[name]


def pillow(polygons: tuple[np.ndarray, ...], size: int) -> list[np.ndarray]:
    """Masks by ImageDraw, which rounds vertices to pixels and fills edges: near, not exact."""
    found = []
    for polygon in polygons:
        image = Image.new("1", (size, size))
        ImageDraw.Draw(image).polygon([tuple(p) for p in polygon.tolist()], fill=1)
        found.append(np.array(image))
    return found


def check() -> None:
    """The masks of 40 scenes, drawn by both of ours, are equal in every pixel."""
    for scene in Scenes(count=40):
        layout, regions = scene.layout, [[torch.from_numpy(polygon)] for polygon in scene.polygons]
        ours = torch.from_numpy(fill(layout.vertices, 128, 128))
        assert torch.equal(ours.bool(), polygons_to_masks(regions, 128, 128)), "fill and polygons_to_masks differ"


def measure() -> Iterator[dict[str, Any]]:
    n = ROWS
    scenes, windows, clips = Scenes(count=n), Windows(count=n // 4), Clips(count=n // 8)
    layouts = [scene.layout for scene in scenes]
    drawn = [scene.polygons for scene in scenes]
    regions = [[[torch.from_numpy(p)] for p in polygons] for polygons in drawn]
    cases = {
        "promised": lambda: read(scenes, COLUMNS),
        "every": lambda: read(scenes, scenes.column_names),
        "windows": lambda: read(windows, windows.column_names),
        "clips": lambda: read(clips, clips.column_names),
        "fill": lambda: [fill(layout.vertices, 128, 128) for layout in layouts],
        "pillow": lambda: [pillow(polygons, 128) for polygons in drawn],
        "geometry": lambda: [polygons_to_masks(region, 128, 128) for region in regions],
    }
    seconds = interleaved(cases, rounds=5)

    def rate(name: str, count: int) -> float:
        return count / seconds[name][0]

    def spread(name: str, count: int) -> float:
        median, width = seconds[name]
        return round(count * width / median**2, 1)

    things = sum(len(polygons) for polygons in drawn)
    yield from [
        row("scenes 128², " + ", ".join(COLUMNS), "rows/s", rate("promised", n), PROMISED, "promised", target=PROMISED, spread=spread("promised", n)),
        row("scenes 128², every column", "rows/s", rate("every", n), rate("promised", n), "without rotated boxes, phrases, questions", spread=spread("every", n)),
        row("windows 256², every column", "rows/s", rate("windows", n // 4), rate("promised", n), "scenes 128²", spread=spread("windows", n // 4)),
        row("clips 64², every column", "frames/s", 32 * rate("clips", n // 8), rate("promised", n), "scenes 128²", spread=32 * spread("clips", n // 8)),
        row("masks 128², exact", "masks/s", rate("fill", things), rate("pillow", things), "Pillow's ImageDraw (not exact)", spread=spread("fill", things)),
        row("masks 128², exact", "masks/s", rate("fill", things), rate("geometry", things), "geometry.polygons_to_masks", spread=spread("fill", things)),
    ]  # fmt: skip


if __name__ == "__main__":
    main(__file__)
