"""The plane in rational numbers, slowly and by definition: what the tests hold `dovetail.geometry` to."""

from __future__ import annotations

from fractions import Fraction as F
from typing import Any

import numpy as np

Point = tuple[F, F]


def rational(points: Any) -> list[Point]:
    return [(F(x), F(y)) for x, y in points.tolist()]


def turn(a: Point, b: Point, c: Point) -> F:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def sign(x: F) -> int:
    return (x > 0) - (x < 0)


def on_segment(p: Point, a: Point, b: Point) -> bool:
    inside = min(a[0], b[0]) <= p[0] <= max(a[0], b[0]) and min(a[1], b[1]) <= p[1] <= max(a[1], b[1])
    return inside and turn(a, b, p) == 0


def common(a: Point, b: Point, c: Point, d: Point) -> list[Point]:
    """The common points of segments ab and cd: none, one, or the ends of the overlap."""
    slope = (b[0] - a[0]) * (d[1] - c[1]) - (b[1] - a[1]) * (d[0] - c[0])
    if slope == 0:
        ends = {p for p in (a, b) if on_segment(p, c, d)} | {p for p in (c, d) if on_segment(p, a, b)}
        return sorted(ends)
    t = ((c[0] - a[0]) * (d[1] - c[1]) - (c[1] - a[1]) * (d[0] - c[0])) / slope
    s = ((c[0] - a[0]) * (b[1] - a[1]) - (c[1] - a[1]) * (b[0] - a[0])) / slope
    return [(a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]))] if 0 <= t <= 1 and 0 <= s <= 1 else []


def location(p: Point, ring: list[Point]) -> int:
    """1 inside, 0 on the boundary, -1 outside; a ray to the right, decided by where it meets each edge."""
    crossings = 0
    for a, b in zip(ring, ring[1:] + ring[:1]):
        if on_segment(p, a, b):
            return 0
        if (a[1] > p[1]) != (b[1] > p[1]):
            x = a[0] + (p[1] - a[1]) * (b[0] - a[0]) / (b[1] - a[1])
            crossings += x > p[0]
    return 1 if crossings % 2 else -1


def area(ring: list[Point]) -> F:
    """Signed."""
    return sum((a[0] * b[1] - a[1] * b[0] for a, b in zip(ring, ring[1:] + ring[:1])), F(0)) / 2


def centroid(ring: list[Point]) -> Point:
    """Of a ring whose area is not zero."""
    six, x, y = 6 * area(ring), F(0), F(0)
    for a, b in zip(ring, ring[1:] + ring[:1]):
        w = a[0] * b[1] - a[1] * b[0]
        x, y = x + (a[0] + b[0]) * w, y + (a[1] + b[1]) * w
    return x / six, y / six


def hull(points: list[Point]) -> list[Point]:
    """Corners, counter-clockwise."""
    chains = []
    for line in (sorted(set(points)), sorted(set(points), reverse=True)):
        chain: list[Point] = []
        for p in line:
            while len(chain) > 1 and turn(chain[-2], chain[-1], p) <= 0:
                chain.pop()
            chain.append(p)
        chains += chain[:-1]
    return chains


def cut(ring: list[Point], a: F, b: F, c: F) -> list[Point]:
    """The part of a convex ring where ax + by <= c."""
    side = [c - a * p[0] - b * p[1] for p in ring]
    out = []
    for i, (p, s) in enumerate(zip(ring, side)):
        q, r = ring[i - 1], side[i - 1]
        if (s > 0 and r < 0) or (s < 0 and r > 0):
            t = r / (r - s)
            out.append((q[0] + t * (p[0] - q[0]), q[1] + t * (p[1] - q[1])))
        if s >= 0:
            out.append(p)
    return out


def edges_as_planes(ring: list[Point]) -> list[tuple[F, F, F]]:
    """ax + by <= c for each edge of the hull of a ring."""
    ring = hull(ring)
    return [(q[1] - p[1], p[0] - q[0], q[1] * p[0] - p[1] * q[0]) for p, q in zip(ring, ring[1:] + ring[:1])]


def clipped(ring: list[Point], planes: list[tuple[F, F, F]]) -> list[Point]:
    for a, b, c in planes:
        if not ring:
            break
        ring = cut(ring, a, b, c)
    return ring


def distance2(p: Point, a: Point, b: Point) -> F:
    """Squared, of p from the segment ab."""
    along = (b[0] - a[0]) ** 2 + (b[1] - a[1]) ** 2
    if along == 0:
        return (p[0] - a[0]) ** 2 + (p[1] - a[1]) ** 2
    t = min(F(1), max(F(0), ((p[0] - a[0]) * (b[0] - a[0]) + (p[1] - a[1]) * (b[1] - a[1])) / along))
    return (p[0] - a[0] - t * (b[0] - a[0])) ** 2 + (p[1] - a[1] - t * (b[1] - a[1])) ** 2


def simplified(line: list[Point], kept: list[Point], limit: F, slack: F) -> bool:
    """Whether Douglas and Peucker may leave `kept` of the line: each piece is split at a farthest point where one is
    farther than the limit, and only there; distances within `slack` of each other or of the limit may go either way."""

    def farther(d2: F, most: F) -> bool:
        """Whether a squared distance is that of more than `most`."""
        return most < 0 or d2 > most * most

    def may(low: int, high: int, inner: list[Point]) -> bool:
        """Whether `inner` may stay of what lies strictly between two points that stay."""
        away = [distance2(p, line[low], line[high]) for p in line[low + 1 : high]]
        top = max(away, default=F(0))
        if not inner:
            return not away or not farther(top, limit + slack)
        if len(away) < len(inner) or not farther(top, limit - slack):
            return False
        root = F(float(top) ** 0.5)
        splits = [i for i, d2 in enumerate(away, low + 1) if farther(d2, root - slack) or d2 == top]
        halves = [(i, k) for i in splits for k, p in enumerate(inner) if p == line[i]]
        return any(may(low, i, inner[:k]) and may(i, high, inner[k + 1 :]) for i, k in halves)

    if len(line) < 2:
        return kept == line
    return kept[0] == line[0] and kept[-1] == line[-1] and may(0, len(line) - 1, kept[1:-1])


def wide(points: Any) -> np.ndarray:
    """As 80-bit floats, where the machine has them: eleven bits more than what is tested."""
    return np.asarray(points).astype(np.longdouble)
