"""The shapes: the seven pieces of the tangram and friends, placed by integer arithmetic.

Lengths are in *ticks*, `TICKS` = 16 to a pixel; turns in `TURN` = 720 steps. Nothing here is rounded by a platform's
libm: sines come from a power series in integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TICKS = 16  # to a pixel
TURN = 720  # steps of a full turn
_ONE = 1 << 12  # the tangram's unit: half the hypotenuse of its small triangle
_SINE = 15  # fractional bits of the table below


def _sines() -> np.ndarray:
    """sin(2 pi k / TURN) for k = 0 .. TURN - 1 with 15 fractional bits, rounded to nearest: (TURN,) int64."""
    bits, pi = 64, 57952155664616982739  # pi · 2^64
    quarter = []
    for k in range(TURN // 4 + 1):
        x = 2 * pi * k // TURN
        term = total = x
        for n in range(2, 40, 2):  # x - x^3/3! + x^5/5! ...
            term = -(term * x >> bits) * x // (n * (n + 1)) >> bits
            total += term
        quarter.append((total + (1 << (bits - _SINE - 1))) >> (bits - _SINE))
    half = quarter + quarter[-2:0:-1]
    return np.array(half + [-v for v in half], np.int64)


SINE = _sines()
COSINE = np.roll(SINE, -TURN // 4)


@dataclass(frozen=True)
class Shape:
    """A class of things. vertices (V,2) int64 in 2^-12 of the tangram's unit, y down, about the middle of its box,
    the shoelace sum positive. spread: sizes are drawn within 100 ± spread per cent. symmetry: looks alike when turned by
    a full turn over this; 0 for a round one."""

    name: str
    plural: str
    chinese: str
    vertices: np.ndarray
    spread: int
    symmetry: int = 1


def _shape(
    name: str, chinese: str, points: list[tuple[int, int]], spread: int, symmetry: int = 1, plural: str = ""
) -> Shape:
    vertices = np.array(points, np.int64)
    x, y = vertices.T
    if (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() < 0:
        vertices = vertices[::-1]
    middle = (vertices.min(0) + vertices.max(0)) // 2
    return Shape(name, plural or f"{name}s", chinese, vertices - middle, spread, symmetry)


def _units(*points: tuple[float, float]) -> list[tuple[int, int]]:
    return [(round(x * _ONE), round(y * _ONE)) for x, y in points]


def _ring(count: int, radius: float, inner: float = 0.0) -> list[tuple[int, int]]:
    """A regular polygon, or a star where `inner` is given: TURN must be a multiple of its corners."""
    corners = 2 * count if inner else count
    radii = [round((inner if inner and i % 2 else radius) * _ONE) for i in range(corners)]
    steps = [i * TURN // corners for i in range(corners)]
    half = 1 << (_SINE - 1)
    return [
        (int(r * SINE[s] + half >> _SINE), int(-r * COSINE[s] + half >> _SINE))
        for r, s in zip(radii, steps, strict=True)
    ]


# The first five are the tangram's: its seven pieces are two large, one medium and two small triangles, a square and a
# parallelogram, and their areas are 4, 2, 1, 2 and 2. Their sizes stay within 13%, or the triangles could be mistaken.
SHAPES: tuple[Shape, ...] = (
    _shape("large triangle", "大三角形", _units((-2, 0), (2, 0), (0, 2)), 13),
    _shape("medium triangle", "中三角形", _units((0, 0), (2, 0), (0, 2)), 13),
    _shape("small triangle", "小三角形", _units((-1, 0), (1, 0), (0, 1)), 13),
    _shape("square", "正方形", _units((-1, 0), (0, -1), (1, 0), (0, 1)), 13, 4),
    _shape("parallelogram", "平行四边形", _units((0, 0), (2, 0), (3, 1), (1, 1)), 13, 2),
    _shape("pentagon", "五边形", _ring(5, 1.2), 30, 5),
    _shape("hexagon", "六边形", _ring(6, 1.2), 30, 6),
    _shape("circle", "圆形", _ring(24, 1.1), 30, 0),
    _shape("star", "五角星", _ring(5, 1.5, 0.6), 30, 5),
    _shape("trapezoid", "梯形", _units((-1.5, 0.6), (1.5, 0.6), (0.8, -0.6), (-0.8, -0.6)), 30),
    _shape("arrow", "箭头", _units((-1.5, -0.4), (0.2, -0.4), (0.2, -1.1), (1.6, 0), (0.2, 1.1), (0.2, 0.4), (-1.5, 0.4)), 25),
    _shape("cross", "十字形", _units((-0.45, -1.3), (0.45, -1.3), (0.45, -0.45), (1.3, -0.45), (1.3, 0.45), (0.45, 0.45), (0.45, 1.3), (-0.45, 1.3), (-0.45, 0.45), (-1.3, 0.45), (-1.3, -0.45), (-0.45, -0.45)), 25, 4, plural="crosses"),
)  # fmt: skip
CORNERS = np.array([len(shape.vertices) for shape in SHAPES])
_MOST = int(CORNERS.max())
# (shapes, corners of the one with most, 2): the last vertex stands for those that a shape has not.
_PADDED = np.stack([np.pad(s.vertices, ((0, _MOST - len(s.vertices)), (0, 0)), mode="edge") for s in SHAPES])
_SPREADS = np.array([shape.spread for shape in SHAPES])


def unit(size: int) -> int:
    """The tangram's unit in ticks in an image of `size` pixels a side."""
    return size * TICKS // 12


def spreads(labels: np.ndarray) -> np.ndarray:
    """Per cent by which sizes of these classes vary."""
    return _SPREADS[labels]


def outline(labels: np.ndarray, units: np.ndarray, turns: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """Vertices (N,V,2) int64 in ticks about each shape's middle, padded with the last one: see `CORNERS`.

    labels (N,): numbers of `SHAPES`; units (N,): ticks that the tangram's unit has; turns (N,): steps, clockwise on the
    screen; mirrored (N,) bool. A shape's vertices run the same way round, mirrored or not.
    """
    points = _PADDED[labels]
    if mirrored.any():
        points = points.copy()
        for i in np.flatnonzero(mirrored):
            corners = CORNERS[labels[i]]
            points[i, :corners] = points[i, :corners][::-1] * (-1, 1)
            points[i, corners:] = points[i, corners - 1]
    sine, cosine = SINE[turns % TURN][:, None], COSINE[turns % TURN][:, None]
    x, y = points[..., 0], points[..., 1]
    turned = np.stack([x * cosine - y * sine, x * sine + y * cosine], -1)
    bits = 12 + _SINE
    return turned * units[:, None, None] + (1 << (bits - 1)) >> bits
