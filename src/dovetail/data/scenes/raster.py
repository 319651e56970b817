"""Polygons to masks, exactly: a pixel belongs to a polygon if its centre does, told by integer arithmetic."""

from __future__ import annotations

import numpy as np

from dovetail.data.scenes.shapes import TICKS

_HALF = TICKS // 2


def fill(vertices: np.ndarray, height: int, width: int) -> np.ndarray:
    """Masks (N,H,W) bool of simple polygons (N,V,2), int64 in ticks; a vertex said again changes nothing.

    Even-odd rule on pixel centres (x + 1/2, y + 1/2). A centre on an edge belongs to the polygon to its right or, on a
    level edge, below it, so that polygons which share an edge share no pixel and leave none out. The same as
    `geometry.polygons_to_mask`, a scene at a time.
    """
    count = len(vertices)
    after = np.concatenate([vertices[:, 1:], vertices[:, :1]], 1)
    x0, y0 = vertices[..., 0].ravel(), vertices[..., 1].ravel()
    x1, y1 = after[..., 0].ravel(), after[..., 1].ravel()
    falls = y0 > y1
    x0, x1 = np.where(falls, x1, x0), np.where(falls, x0, x1)
    y0, y1 = np.where(falls, y1, y0), np.where(falls, y0, y1)
    # Rows whose centres lie in [y0, y1): the first centre at or below y is that of row ceil((y - 8) / 16).
    first = np.clip((y0 + _HALF - 1) // TICKS, 0, height)
    rows_of = np.clip((y1 + _HALF - 1) // TICKS, 0, height) - first
    edge = np.repeat(np.arange(len(x0)), rows_of)
    ends = np.cumsum(rows_of)
    row = np.arange(len(edge)) - (ends - rows_of)[edge] + first[edge]
    # Where the edge crosses the row, and the first pixel centre at or after that: ceil((x* - 8) / 16).
    x0, y0, rise, run = x0[edge], y0[edge], (y1 - y0)[edge], (x1 - x0)[edge]
    over = (x0 - _HALF) * rise + (TICKS * row + _HALF - y0) * run
    column = np.clip(-(-over // (TICKS * rise)), 0, width)
    crossings = np.zeros((count, height, width // 8 + 1, 8), np.uint8)
    np.bitwise_xor.at(crossings, (edge // vertices.shape[1], row, column // 8, column % 8), 1)
    return _odd(crossings)[..., :width]


def _odd(crossings: np.ndarray) -> np.ndarray:
    """Whether the crossings (N,H,W/8,8), 0 or 1, up to and with each are odd in number: (N,H,W) bool. Eight at a time."""
    words = crossings.view("<u8")[..., 0]
    for bits in (8, 16, 32):
        words ^= words << np.uint64(bits)
    before = np.bitwise_xor.accumulate(words >> np.uint64(56), axis=2)[..., :-1]
    words[..., 1:] ^= before * np.uint64(0x0101010101010101)
    return crossings.reshape(*crossings.shape[:2], -1).view(bool)
