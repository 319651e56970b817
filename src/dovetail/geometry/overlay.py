"""The intersection of two simple polygons of any shape, in rational numbers."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from dovetail.errors import DataError
from dovetail.geometry.batch import Polygons, padded
from dovetail.geometry.predicates import orientation
from dovetail.geometry.segments import segments_intersect

Point = tuple[Fraction, Fraction]


def simple_intersection(a: Tensor, b: Tensor) -> Polygons:
    """The common area of two simple polygons (N, 2) and (M, 2), dented or not, as simple polygons.

    Returns `Polygons` (K, P, 2) with count (K,): K pieces, counter-clockwise, which may touch each other in points but
    not overlap; K = 0 where nothing with an area is common. Each has only corners.

    Exact: computed in rational numbers, each vertex is the exact one rounded once (2^-53 relative); pieces that rounding
    leaves without three different vertices are dropped. One pair at a time, O((N + M)²) rational operations: for
    many pairs, of which one side is convex, use `polygon_intersection`.
    Raises DataError for wrong shapes, coordinates out of range, and polygons that touch or cross themselves.
    Source: Weiler and Atherton 1977, without its special cases: edges are split where the polygons meet, the parts
    inside the other polygon are kept, and chained so that the common area stays on the left.
    """
    first, second = _ring(a, "first polygon"), _ring(b, "second polygon")
    edges = [_edges(first), _edges(second)]
    meet = segments_intersect(edges[0][:, None], edges[1][None])
    parts = [_split(edges[0], edges[1], meet), _split(edges[1], edges[0], meet.T)]
    rings = [([_rational(p) for p in ring.tolist()], ring[:, 1].tolist()) for ring in (first, second)]
    shared = set(parts[1])
    kept = []
    for edge in parts[0]:
        where = _location(_middle(edge), *rings[1])
        if where > 0 or (where == 0 and edge in shared):  # along a common edge the areas must lie on one side
            kept.append(edge)
    kept += [edge for edge in parts[1] if _location(_middle(edge), *rings[0]) > 0]
    pieces = [piece for ring in _chain(kept) if len(piece := _rounded(_corners(ring))) > 2]
    size = max(map(len, pieces), default=0)
    points = first.new_zeros(len(pieces), size, 2)
    for row, piece in enumerate(pieces):
        points[row] = points.new_tensor(piece + piece[:1] * (size - len(piece)))
    return Polygons(points, torch.tensor([len(p) for p in pieces], dtype=torch.int64, device=first.device))


def _ring(points: Tensor, what: str) -> Tensor:
    """Counter-clockwise without repeated vertices, (N, 2). Raises DataError where it is not simple."""
    points = padded(points, None, what, least=3).points.detach()
    if points.ndim != 2:
        raise DataError(
            f"{what}: one polygon (N, 2) at a time; this is {tuple(points.shape)}",
            where="simple_intersection",
            remedy="loop over the pairs, or use polygon_intersection, which takes batches where one side is convex",
        )
    points = points[(points != points.roll(-1, 0)).any(-1)]
    N = points.shape[0]
    index = torch.arange(N, device=points.device)
    gap = (index[:, None] - index).abs()
    edges, others = _edges(points), (gap > 1) & (gap < N - 1)
    back, on = points.roll(1, 0), points.roll(-1, 0)
    same_way = ((back - points).sign() * (on - points).sign() >= 0).all(-1)  # of edges on one line: folded
    folded = same_way & (orientation(back, points, on) == 0)
    if N < 3 or bool(folded.any() | (segments_intersect(edges[:, None], edges[None]) & others).any()):
        raise DataError(f"{what} touches or crosses itself", where="simple_intersection", remedy="give simple polygons")
    doubled = sum(_cross(p, q) for p, q in pairwise([_rational(p) for p in [*points.tolist(), points[0].tolist()]]))
    return points if doubled > 0 else points.flip(0)


def _edges(ring: Tensor) -> Tensor:
    return torch.stack([ring, ring.roll(-1, 0)], 1)


def _rational(p: list[float]) -> Point:
    return Fraction(p[0]), Fraction(p[1])


def _minus(p: Point, q: Point) -> Point:
    return p[0] - q[0], p[1] - q[1]


def _cross(p: Point, q: Point) -> Fraction:
    return p[0] * q[1] - p[1] * q[0]


def _turn(a: Point, b: Point, c: Point) -> Fraction:
    return _cross(_minus(b, a), _minus(c, a))


def _between(p: Point, a: Point, b: Point) -> bool:
    return min(a[0], b[0]) <= p[0] <= max(a[0], b[0]) and min(a[1], b[1]) <= p[1] <= max(a[1], b[1])


def _middle(edge: tuple[Point, Point]) -> Point:
    (ax, ay), (bx, by) = edge
    return (ax + bx) / 2, (ay + by) / 2


def _split(edges: Tensor, others: Tensor, meet: Tensor) -> list[tuple[Point, Point]]:
    """The edges cut at every point that they share with the edges of the other polygon that `meet` names."""
    parts = []
    for edge, row in zip(edges.tolist(), meet, strict=True):
        a, b = map(_rational, edge)
        cuts = {a, b}
        for j in row.nonzero()[:, 0].tolist():
            c, d = map(_rational, others[j].tolist())
            of_c, of_d = _turn(a, b, c), _turn(a, b, d)
            if of_c == of_d:  # on one line
                cuts |= {p for p in (c, d) if _between(p, a, b)}
            else:
                t = of_c / (of_c - of_d)
                cuts.add((c[0] + t * (d[0] - c[0]), c[1] + t * (d[1] - c[1])))
        along = sorted(cuts, reverse=b < a)
        parts += list(pairwise(along))
    return parts


def _location(p: Point, ring: list[Point], heights: list[float]) -> int:
    """1 inside, 0 on the boundary, -1 outside. heights: y of the ring's points, floats that say it exactly."""
    inside = False
    height = float(p[1])  # rounding keeps the order: an edge above or below it is above or below p
    for (a, b), (low, high) in zip(pairwise([*ring, ring[0]]), pairwise([*heights, heights[0]]), strict=True):
        if (low > height and high > height) or (low < height and high < height):
            continue
        if (a[1] > p[1]) == (b[1] > p[1]) and not _between(p, a, b):
            continue
        turn = _turn(a, b, p)
        if turn == 0 and _between(p, a, b):
            return 0
        if (a[1] > p[1]) != (b[1] > p[1]) and (turn > 0) == (b[1] > a[1]):
            inside = not inside
    return 1 if inside else -1


def _chain(edges: list[tuple[Point, Point]]) -> list[list[Point]]:
    """Closed rings of directed edges that have the area on their left.

    Around a vertex, sectors of the area lie between an edge that comes and one that goes: each edge has one successor.
    """
    onward: dict[Point, list[Point]] = {}
    for a, b in edges:
        onward.setdefault(a, []).append(b)
    after = {(a, b): (b, _leftmost(a, b, onward[b])) for a, b in edges}
    rings = []
    while after:
        edge = next(iter(after))
        ring = []
        while edge in after:
            ring.append(edge[0])
            edge = after.pop(edge)
        rings.append(ring)
    return rings


def _leftmost(a: Point, b: Point, choices: list[Point]) -> Point:
    """Of the edges that leave b, the first clockwise from the way back to a."""
    back = _minus(a, b)
    best: tuple[bool, Point, Point] | None = None
    for c in choices:
        way = _minus(c, b)
        side = _cross(back, way)
        far = side > 0 or (side == 0 and back[0] * way[0] + back[1] * way[1] > 0)  # more than half a turn
        if best is None or (not far and best[0]) or (far == best[0] and _cross(way, best[1]) < 0):
            best = (far, way, c)
    assert best is not None
    return best[2]


def _corners(ring: list[Point]) -> list[Point]:
    return [b for a, b, c in zip([ring[-1], *ring], ring, [*ring[1:], ring[0]]) if _turn(a, b, c) != 0]


def _rounded(ring: list[Point]) -> list[list[float]]:
    points = [[float(x), float(y)] for x, y in ring]
    return [p for i, p in enumerate(points) if p != points[i - 1]]
