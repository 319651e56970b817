"""What stands where in a scene, drawn; all of it in integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dovetail.data.scenes.draws import Draws
from dovetail.data.scenes.raster import fill
from dovetail.data.scenes.shapes import CORNERS, SHAPES, TICKS, TURN, outline, spreads, unit
from dovetail.data.scenes.words import BACKGROUNDS, COLORS

MOST = 8  # things that a scene may have
_SEEN = (2, 5)  # at least two fifths of a thing are seen,
_PIXELS = 12  # and at least so many pixels


@dataclass(frozen=True)
class Layout:
    """N things and their background. vertices (N,V,2) int64 in ticks, padded; whole, masks (N,H,W) bool: all of each
    thing, and what is seen of it; depth (N,): 0 is painted first."""

    labels: np.ndarray
    colors: np.ndarray
    vertices: np.ndarray
    whole: np.ndarray
    masks: np.ndarray
    depth: np.ndarray
    background: int

    def points(self, i: int) -> np.ndarray:
        """Vertices of thing i (corners,2), in ticks."""
        return self.vertices[i, : CORNERS[self.labels[i]]]


def draw_layout(draws: Draws, size: int, most: int = MOST) -> Layout:
    """1 to `most` things inside an image of `size` pixels a side.

    What would be mostly hidden, or would lie on a thing of its own colour (no edge would be seen), is left out, from
    front to back: so every pixel of a thing's colour is that of a thing that is said.
    """
    count = draws.between(min(2, most), most)
    every = np.ones(count, np.int64)
    limits = np.stack([len(SHAPES) * every, len(COLORS) * every, TURN * every, 2 * every, 3 * every])
    labels, colors, turns, mirrored, near = draws.many(limits)
    widths = 2 * spreads(labels) + 1
    units = unit(size) * (100 - widths // 2 + draws.many(widths)) // 100
    vertices = outline(labels, units, turns, mirrored == 1)
    vertices += _middles(draws, vertices, near == 0, size)[:, None]
    depth = draws.order(count)
    whole = fill(vertices, size, size)
    masks, kept = _seen(whole, colors, np.argsort(-depth))
    ranks = np.argsort(np.argsort(depth[kept]))
    background = draws.below(len(BACKGROUNDS))
    return Layout(labels[kept], colors[kept], vertices[kept], whole[kept], masks[kept], ranks, background)


def _middles(draws: Draws, vertices: np.ndarray, near: np.ndarray, size: int) -> np.ndarray:
    """(N,2) ticks to move each thing by: anywhere inside the image, or near the one before it, which overlaps often."""
    least, room = TICKS - vertices.min(1), (size - 1) * TICKS - vertices.max(1)
    found = least + draws.many(room - least + 1)
    reach = 2 * unit(size)
    step = draws.many(np.full(found.shape, 2 * reach + 1)) - reach
    for i in np.flatnonzero(near[1:]) + 1:
        found[i] = np.clip(found[i - 1] + step[i], least[i], room[i])
    return found


def _seen(whole: np.ndarray, colors: np.ndarray, front_to_back: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(masks (N,H,W) of what is seen, the numbers of the things that are kept)."""
    masks = np.zeros_like(whole)
    covered = np.zeros(whole.shape[1:], bool)
    of_color: dict[int, np.ndarray] = {}
    for i in front_to_back.tolist():
        color = int(colors[i])
        if color in of_color and (whole[i] & of_color[color]).any():
            continue
        seen = whole[i] & ~covered
        pixels, all_pixels = np.count_nonzero(seen), np.count_nonzero(whole[i])
        if pixels < _PIXELS or pixels * _SEEN[1] < all_pixels * _SEEN[0]:
            continue
        masks[i] = seen
        covered |= whole[i]
        of_color[color] = of_color[color] | whole[i] if color in of_color else whole[i]
    return masks, np.flatnonzero(masks.any((1, 2)))
