"""Point sets, polygons, segments and half-planes that are hard on purpose, as numpy float64, from a seed."""

from __future__ import annotations

import numpy as np

Rng = np.random.Generator
ULP = 2.0**-52


def jiggled(rng: Rng, x: np.ndarray) -> np.ndarray:
    """x with up to two units in the last place added to or taken from each number."""
    return x + rng.integers(-2, 3, x.shape) * np.spacing(x)


def point_sets(rng: Rng, rows: int, size: int) -> np.ndarray:
    """(rows, size, 2): nine kinds in turn, each as hard as it can be in its own way."""
    uniform = rng.random((rows, size, 2))
    grid = rng.integers(0, 5, (rows, size, 2)).astype(float)
    start, way, t = rng.random((rows, 1, 2)), rng.normal(size=(rows, 1, 2)), rng.random((rows, size, 1))
    angle = rng.integers(0, 12, (rows, size)) * (np.pi / 6)
    kinds = [
        uniform,
        grid,
        grid * 0.1,  # collinear but for rounding
        jiggled(rng, start + way * t),
        uniform * [1.0, 1e-13] + rng.random((rows, 1, 2)),  # thinner than its coordinates resolve
        uniform + 1e8,
        uniform * 2.0 ** rng.integers(-200, 200, (rows, 1, 1)),
        jiggled(rng, np.where(rng.random((rows, size, 1)) < 0.5, start, start + way)),  # two places
        np.stack([np.cos(angle), np.sin(angle)], -1) + rng.integers(0, 2, (rows, 1, 2)),  # on a circle
    ]
    return np.choose(np.arange(rows)[:, None, None] % len(kinds), kinds)


def counts(rng: Rng, rows: int, size: int, least: int = 1) -> np.ndarray:
    return rng.integers(least, size + 1, rows)


def triples(rng: Rng, rows: int) -> np.ndarray:
    """(rows, 3, 2) for orientation: half of them within units in the last place of a line."""
    sets = point_sets(rng, rows, 3)
    a, b = sets[:, 0], sets[:, 1]
    on_line = jiggled(rng, a + rng.integers(-4, 5, (rows, 1)) / 4 * (b - a))
    sets[::2, 2] = on_line[::2]
    return sets


def segments(rng: Rng, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (rows, 2, 2): at random, sharing ends, an end on the other, overlapping, near-identical, points."""
    p, q = point_sets(rng, rows, 2), point_sets(rng, rows, 2)
    both = point_sets(rng, rows, 4)
    kind = rng.integers(0, 6, rows)
    a, b, c = both[:, 0], both[:, 1], both[:, 2]
    s, t = rng.integers(-2, 7, (2, rows, 1)) / 4
    p = np.where((kind > 0)[:, None, None], both[:, :2], p)
    choices = [
        both[:, 2:],  # of one set
        np.stack([a, c], 1),
        np.stack([a + s * (b - a), c], 1),
        np.stack([a + s * (b - a), a + t * (b - a)], 1),
        jiggled(rng, np.stack([b, a], 1)),
        np.stack([a + s * (b - a)] * 2, 1),
    ]
    q = np.choose(kind[:, None, None], choices)
    swap = rng.random(rows) < 0.5
    return np.where(swap[:, None, None], q, p), np.where(swap[:, None, None], p, q)


def stars(rng: Rng, rows: int, size: int) -> np.ndarray:
    """(rows, size, 2) polygons without self-crossings, star-shaped about their centers, in either orientation."""
    gaps = rng.random((rows, size)) + 0.2  # no gap reaches half a turn
    angle = np.cumsum(gaps, 1) / gaps.sum(1, keepdims=True) * 2 * np.pi
    radius = rng.random((rows, size)) + 0.1
    points = radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    kinds = [points, points * [1.0, 1e-6], points + 1e6, points * 1e-50, points * 1e50]
    points = np.choose(np.arange(rows)[:, None, None] % len(kinds), kinds)
    flip = rng.random(rows) < 0.5
    return np.where(flip[:, None, None], points[:, ::-1], points)


def convex(rng: Rng, rows: int, size: int) -> np.ndarray:
    """(rows, size, 2): corners on ellipses, and rotated boxes whose further corners repeat the last."""
    angle = np.sort(rng.random((rows, size)), 1) * 2 * np.pi
    wide, high, turn = rng.random((3, rows, 1)) + 0.05
    x, y = wide * np.cos(angle), high * np.sin(angle)
    square = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]] + [[-1, 1]] * (size - 4)).T[:, None]
    box = rng.random((rows, 1)) < 0.5
    x, y = np.where(box, wide * square[0], x), np.where(box, high * square[1], y)
    turn = np.where(rng.random((rows, 1)) < 0.3, rng.integers(0, 4, (rows, 1)) * (np.pi / 2), turn * 6)
    return np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], -1)


def convex_pairs(rng: Rng, rows: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of convex polygons: at random, identical, near-identical, shifted, touching, nested, turned, far away."""
    a = convex(rng, rows, size)
    other = convex(rng, rows, size) + rng.normal(size=(rows, 1, 2)) * 0.5
    center = a.mean(1, keepdims=True)
    tiny = 10.0 ** rng.integers(-17, -4, (rows, 1, 1)).astype(float)
    small = tiny[:, 0]
    turned = np.stack([a[..., 0] - small * a[..., 1], a[..., 1] + small * a[..., 0]], -1)
    kinds = [
        other,
        a,
        jiggled(rng, a),
        a + tiny * rng.normal(size=(rows, 1, 2)),
        a + (a[:, 1:2] - a[:, :1]),  # often with a side in common
        2 * a[:, :1] - a,  # with a corner in common, or a side
        center + (a - center) * (1 - tiny),
        center + (a - center) * rng.random((rows, 1, 1)),
        turned,
    ]
    b = np.choose(rng.integers(0, len(kinds), rows)[:, None, None], kinds)
    place = [np.zeros((rows, 1, 2)), 1e6 * rng.normal(size=(rows, 1, 2))]
    shift = np.choose((rng.random(rows) < 0.2).astype(int)[:, None, None], place)
    flip = (rng.random(rows) < 0.5)[:, None, None]
    a, b = a + shift, b + shift
    return np.where(flip, a[:, ::-1], a), b


def half_planes(rng: Rng, rows: int, size: int) -> np.ndarray:
    """(rows, size, 3): about points near the middle; some parallel, repeated, opposite, through one point."""
    angle = rng.random((rows, size)) * 2 * np.pi
    angle = np.where(rng.random((rows, 1)) < 0.3, rng.integers(0, 8, (rows, size)) * (np.pi / 4), angle)
    normal = np.stack([np.cos(angle), np.sin(angle)], -1) * 2.0 ** rng.integers(-30, 30, (rows, size, 1))
    point = rng.random((rows, size, 2)) - 0.5 + 1.5 * np.stack([np.cos(angle), np.sin(angle)], -1)
    point = np.where(rng.random((rows, 1, 1)) < 0.2, point[:, :1] * 0.1, point)
    planes = np.concatenate([normal, (normal * point).sum(-1, keepdims=True)], -1)
    planes[:, 1] = np.where(rng.random((rows, 1)) < 0.2, planes[:, 0], planes[:, 1])
    opposite = -planes[:, 0] * [1, 1, 1 + 1e-15]
    planes[:, 2] = np.where(rng.random((rows, 1)) < 0.1, opposite, planes[:, 2])
    return planes


def lines(rng: Rng, rows: int, size: int) -> np.ndarray:
    """(rows, size, 2) walks and point sets, some of them closed."""
    walk = np.cumsum(rng.normal(size=(rows, size, 2)), 1)
    points = np.where((np.arange(rows) % 3 == 0)[:, None, None], walk, point_sets(rng, rows, size))
    points[::5, -1] = points[::5, 0]
    return points


def extent(points: np.ndarray) -> np.ndarray:
    return (points.max(-2) - points.min(-2)).max(-1)


def magnitude(points: np.ndarray) -> np.ndarray:
    return np.abs(points).max((-2, -1))


def filled(points: np.ndarray, count: np.ndarray) -> np.ndarray:
    """With NaN where there is only padding: what must not be looked at."""
    out = points.copy()
    out[np.arange(points.shape[1]) >= count[:, None]] = np.nan
    return out


def repeated(points: np.ndarray, count: np.ndarray) -> np.ndarray:
    """With the first point where there is only padding."""
    return np.where((np.arange(points.shape[1]) < count[:, None])[..., None], points, points[:, :1])
