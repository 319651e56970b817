"""Each operation of the plane against its oracle on n hard cases; used by the tests (few) and bench/geometry.py (many).

A check returns the worst error in units of 2^-53 times the scale that the operation's docstring names, and fails by
itself on what has no tolerance: wrong predicates, NaN, broken promises about the result.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction as F
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import plane_cases as cases
import plane_exact as exact
import shapely
import torch
from plane_cases import extent, filled, magnitude, repeated

import dovetail.geometry as geo

U = 2.0**-53
Array = Any


class Outcome(NamedTuple):
    """What a check found: cases, the worst error and its tolerance (in units of 2^-53·scale, 0 for exact ones), against
    what, how many cases the peer (naive float64, or shapely) got wrong where that was counted."""

    cases: int
    worst: float
    tolerance: float
    oracle: str
    peer: str = ""
    peer_wrong: int = 0


def t(x: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


def worst(error: Array, scale: Array) -> float:
    """The largest error in units of 2^-53·scale; an error where the scale is zero is infinite."""
    error, scale = np.asarray(error, np.longdouble), np.asarray(scale, np.longdouble)
    assert np.isfinite(error).all()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error == 0, 0, error / (U * scale))
    return float(ratio.max(initial=0))


def relative(found: float, true: F) -> float:
    """Relative error; nothing where the difference lies below the smallest normal float64."""
    error = abs(F(found) - true)
    return float(error / abs(true)) if error > F(2) ** -1022 else 0.0


def orientation(n: int, seed: int) -> Outcome:
    p = cases.triples(np.random.default_rng(seed), n)
    ours = geo.orientation(*t(p).unbind(1)).numpy()
    a, b, c = p[:, 0], p[:, 1], p[:, 2]
    naive = np.sign((a[:, 0] - c[:, 0]) * (b[:, 1] - c[:, 1]) - (a[:, 1] - c[:, 1]) * (b[:, 0] - c[:, 0]))
    true = np.array([exact.sign(exact.turn(*exact.rational(row))) for row in p])
    assert (ours == true).all()
    return Outcome(n, 0, 0, "fractions", "naive float64", int((naive != true).sum()))


def doubled_area(n: int, seed: int) -> Outcome:
    p = cases.triples(np.random.default_rng(seed), n)
    ours = geo.doubled_area(*t(p).unbind(1)).tolist()
    true = [exact.turn(*exact.rational(row)) for row in p]
    return Outcome(n, worst([relative(o, w) for o, w in zip(ours, true)], 1.0), 4, "fractions")


def products(n: int, seed: int) -> Outcome:
    """cross and dot."""
    p = cases.triples(np.random.default_rng(seed), n)
    a, b = p[:, 0], cases.jiggled(np.random.default_rng(seed + 1), p[:, 0] * 3.0)
    b[::2] = p[::2, 1]
    c = np.stack([-b[:, 1], b[:, 0]], -1)
    c[::2] = b[::2]
    cross, dot = geo.cross(t(a), t(b)).tolist(), geo.dot(t(a), t(c)).tolist()
    error = []
    for (ax, ay), (bx, by), (cx, cy), x, d in zip(a.tolist(), b.tolist(), c.tolist(), cross, dot):
        for found, true in (x, F(ax) * F(by) - F(ay) * F(bx)), (d, F(ax) * F(cx) + F(ay) * F(cy)):
            error.append(relative(found, true))
    return Outcome(n, worst(error, 1.0), 4, "fractions")


def angle(n: int, seed: int) -> Outcome:
    p = cases.triples(np.random.default_rng(seed), n)
    largest = np.abs(p).max((1, 2), keepdims=True)
    p = p / np.where(largest > 0, largest, 1)
    a, b = p[:, 0], p[:, 1]
    ours = geo.angle(t(a), t(b)).numpy()
    x, y = exact.wide(a), exact.wide(b)
    true = np.arctan2(x[:, 0] * y[:, 1] - x[:, 1] * y[:, 0], (x * y).sum(-1))
    off = np.abs(ours - true)
    return Outcome(n, worst(np.minimum(off, np.abs(off - 2 * np.pi)), 1.0), 8, "80-bit floats")


def segments(n: int, seed: int) -> Outcome:
    """segments_intersect and segment_intersection."""
    p, q = cases.segments(np.random.default_rng(seed), n)
    hit = geo.segments_intersect(t(p), t(q)).tolist()
    found = geo.segment_intersection(t(p), t(q))
    peer = shapely.intersects(shapely.linestrings(p), shapely.linestrings(q)).tolist()
    error, scale, peer_wrong = [], [], 0
    for a, b, points, count, yes, other in zip(p, q, found.points.numpy(), found.count.tolist(), hit, peer):
        true = exact.common(*exact.rational(a), *exact.rational(b))
        assert yes == bool(true) and count == len(true), (a.tolist(), b.tolist())
        point = (a[0] == a[1]).all() or (b[0] == b[1]).all()  # shapely calls a segment without length invalid
        peer_wrong += other != bool(true) and not point
        for ours, wanted in zip(exact.rational(points), true):
            error.append(float(max(abs(ours[0] - wanted[0]), abs(ours[1] - wanted[1]))))
            scale.append(max(np.abs(a).max(), np.abs(b).max()))
    return Outcome(n, worst(error, scale), 8, "fractions", "shapely", peer_wrong)


def polygon_location(n: int, seed: int) -> Outcome:
    """polygon_contains: n points, ten a polygon, corners and points of edges among them."""
    rng = np.random.default_rng(seed)
    rings = np.concatenate([cases.stars(rng, n // 20, 8), np.round(cases.stars(rng, n - n // 20, 8)[: n // 20] * 5)])
    a, b = rings, np.roll(rings, -1, 1)
    low, high = rings.min(1, keepdims=True), rings.max(1, keepdims=True)
    middle, beside = ((a + b) / 2)[:, :2], rng.integers(-1, 2, (len(rings), 1, 2))
    near = [middle, cases.jiggled(rng, middle), rings[:, :1], np.round(rings[:, :1] + beside)]
    points = np.concatenate([low + (high - low) * rng.random((len(rings), 4, 2)), *near], 1)
    ours = geo.polygon_location(t(rings), t(points))
    assert torch.equal(geo.polygon_contains(t(rings), t(points)), ours >= 0)
    peer = shapely.covers(shapely.polygons(rings)[:, None], shapely.points(points))
    peer &= shapely.is_valid(shapely.polygons(rings))[:, None]
    valid, wrong = shapely.is_valid(shapely.polygons(rings)), 0
    for ring, row, found, other, simple in zip(rings, points, ours.tolist(), peer.tolist(), valid):
        corners = exact.rational(ring)
        true = [exact.location(p, corners) for p in exact.rational(row)]
        assert found == true, (ring.tolist(), row.tolist())
        wrong += sum((w >= 0) != o for w, o in zip(true, other)) if simple else 0
    return Outcome(ours.numel(), 0, 0, "fractions", "shapely", wrong)


def area_and_centroid(n: int, seed: int) -> Outcome:
    rng = np.random.default_rng(seed)
    count = cases.counts(rng, n, 8, 3)
    rings = cases.stars(rng, n, 8)  # any first corners of a star are a polygon, crossing itself or not
    given, number = t(filled(rings, count)), t(count)
    areas, centers = geo.signed_area(given, number).tolist(), geo.polygon_centroid(given, number).numpy()
    error, scale = [], []
    for ring, k, found, center in zip(rings, count, areas, centers):
        corners = exact.rational(ring[:k])
        true, gross = (
            exact.area(corners),
            sum(abs(exact.turn(corners[0], p, q)) for p, q in pairwise(corners)) / 2,
        )
        error.append(float(abs(F(found) - true)))
        scale.append(float(gross) * (k + 4) / 8)
        if abs(true) > gross / 2**20:
            where = exact.centroid(corners)
            off = max(abs(F(float(center[i])) - where[i]) for i in (0, 1))
            far = max(extent(ring[:k]), *(abs(float(w - c)) for w, c in zip(where, corners[0])))
            bound = 8 * k * far * float(gross / abs(true)) + magnitude(ring)
            error.append(float(off))
            scale.append(bound / 8)
    return Outcome(n, worst(error, scale), 8, "fractions")


def convex_hull(n: int, seed: int) -> Outcome:
    """Exact by definition: corners are input points, each a turn to the left, and no input point is to the right."""
    rng = np.random.default_rng(seed)
    sets, count = cases.point_sets(rng, n, 9), cases.counts(rng, n, 9)
    hull = geo.convex_hull(t(filled(sets, count)), t(count))
    for points, k, corners, m in zip(sets, count, hull.points.numpy(), hull.count.tolist()):
        given, ring = exact.rational(points[:k]), exact.rational(corners[:m])
        assert set(ring) <= set(given) and len(set(ring)) == m and ring[0] == min(given)
        if m < 3:
            assert all(exact.on_segment(p, ring[0], ring[-1]) for p in given)
            continue
        assert all(exact.turn(a, b, c) > 0 for a, b, c in zip(ring, ring[1:] + ring[:1], ring[2:] + ring[:2]))
        edges = list(zip(ring, ring[1:] + ring[:1]))
        assert all(exact.turn(a, b, p) >= 0 for p in given if p not in ring for a, b in edges)
    few = [geo.convex_hull(t(points[:k])).points for points, k in zip(sets[:100], count[:100])]
    assert all(torch.equal(one, row[:m]) for one, row, m in zip(few, hull.points, hull.count))
    theirs = shapely.area(shapely.convex_hull(shapely.multipoints(repeated(sets, count))))
    wrong = np.abs(theirs - geo.polygon_area(*hull).numpy()) > 64 * U * extent(repeated(sets, count)) ** 2
    return Outcome(n, 0, 0, "fractions", "shapely", int(wrong.sum()))


def _sets(n: int, seed: int, least: int = 1) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    sets, count = cases.point_sets(rng, n, 7), cases.counts(rng, n, 7, least)
    return repeated(sets, count), t(filled(sets, count)), t(count)


def _apart(sets: Array) -> np.ndarray:
    """Distances of all pairs (rows, N, N) in 80 bits."""
    p = exact.wide(sets)
    return np.hypot(*np.moveaxis(p[:, :, None] - p[:, None], -1, 0))


def diameter(n: int, seed: int) -> Outcome:
    sets, given, count = _sets(n, seed)
    found = geo.diameter(given, count)
    true = _apart(sets).max((1, 2))
    ends = given[torch.arange(n)[:, None], found.index]
    assert torch.equal(ends, found.points)
    return Outcome(n, worst(np.abs(found.distance.numpy() - true), true), 4, "80-bit floats, all pairs")


def closest_pair(n: int, seed: int) -> Outcome:
    sets, given, count = _sets(n, seed, 2)
    found = geo.closest_pair(given, count)
    apart = _apart(sets)
    nobody = np.arange(7) >= count.numpy()[:, None]
    apart[nobody[:, None] | nobody[:, :, None] | np.eye(7, dtype=bool)] = np.inf
    true = apart.min((1, 2))
    ends = given[torch.arange(n)[:, None], found.index]
    assert torch.equal(ends, found.points) and (found.index[:, 0] != found.index[:, 1]).all()
    return Outcome(n, worst(np.abs(found.distance.numpy() - true), true), 4, "80-bit floats, all pairs")


def _heights(sets: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every line through two points, in 80 bits: (how far the others reach to either side, along it), (n, N·N) each,
    and whether it holds an edge of the hull."""
    p = exact.wide(sets)
    way = (p[:, None] - p[:, :, None]).reshape(len(p), -1, 1, 2)
    size = np.hypot(way[..., 0], way[..., 1])
    way = way / np.where(size > 0, size, 1)[..., None]
    rest = p[:, None] - np.repeat(p, p.shape[1], 1)[:, :, None]
    across, along = way[..., 0] * rest[..., 1] - way[..., 1] * rest[..., 0], (way * rest).sum(-1)
    edge = (size[..., 0] > 0) & (np.minimum(across.max(-1), -across.min(-1)) <= 4 * U * extent(sets)[:, None])
    return across.max(-1) - across.min(-1), along.max(-1) - along.min(-1), edge


def width(n: int, seed: int) -> Outcome:
    sets, given, count = _sets(n, seed)
    found = geo.width(given, count).width.numpy()
    across, _, edge = _heights(sets)
    true = np.where(edge, across, np.inf).min(-1)
    true = np.where(np.isfinite(true), true, 0)
    return Outcome(n, worst(np.abs(found - true), _apart(sets).max((1, 2))), 8, "80-bit floats, all directions")


def min_area_rectangle(n: int, seed: int) -> Outcome:
    """The least area over all directions, and that the rectangle holds the points and is its box."""
    sets, given, count = _sets(n, seed)
    found = geo.min_area_rectangle(given, count)
    box, corners = exact.wide(found.box), exact.wide(found.corners)
    across, along, edge = _heights(sets)
    true = np.where(edge, across * along, np.inf).min(-1)
    true = np.where(np.isfinite(true), true, 0)
    size = _apart(sets).max((1, 2))
    error = worst(np.abs(box[:, 2] * box[:, 3] - true), size**2) / 32
    u = np.stack([np.cos(box[:, 4]), np.sin(box[:, 4])], -1)
    v = np.stack([-u[:, 1], u[:, 0]], -1)
    far = size + magnitude(sets)
    for points in (exact.wide(sets), corners):
        for axis, side in ((u, 2), (v, 3)):
            reach = np.abs(((points - box[:, None, :2]) * axis[:, None]).sum(-1)).max(1) - box[:, side] / 2
            error = max(error, worst(np.maximum(reach, 0), far) / 16)
            if points is corners:
                error = max(error, worst(np.abs(reach), far) / 16)
    return Outcome(n, 32 * error, 32, "80-bit floats, all directions")


def smallest_circle(n: int, seed: int) -> Outcome:
    sets, given, count = _sets(n, seed)
    found = geo.smallest_circle(given, count)
    p = exact.wide(sets)
    size = extent(sets)
    p = (p - p[:, :1]) / np.where(size > 0, size, 1)[:, None, None]
    i, j, k = (np.array(x) for x in zip(*[(i, j, k) for k in range(7) for j in range(k + 1) for i in range(j + 1)]))
    a, b, c = p[:, i], p[:, j], p[:, k]
    ab, ac = b - a, c - a
    d = 2 * (ab[..., 0] * ac[..., 1] - ab[..., 1] * ac[..., 0])
    m = np.stack([ac[..., 1] * (ab**2).sum(-1) - ab[..., 1] * (ac**2).sum(-1),
                  ab[..., 0] * (ac**2).sum(-1) - ac[..., 0] * (ab**2).sum(-1)], -1)  # fmt: skip
    three = np.where((d == 0)[..., None], (a + c) / 2, a + m / np.where(d == 0, 1, d)[..., None])
    centers = np.concatenate([three, (a + c) / 2], 1)
    reach = np.hypot(*np.moveaxis(centers[:, :, None] - p[:, None], -1, 0)).max(-1)
    true = reach.min(1) * size
    ours = found.radius.numpy()
    off = np.hypot(*np.moveaxis(exact.wide(sets) - exact.wide(found.center)[:, None], -1, 0)).max(-1)
    assert (ours >= off * (1 - 4 * U)).all()
    peer = shapely.minimum_bounding_radius(shapely.multipoints(sets))
    bound = 32 * true + 2 * magnitude(sets)
    wrong = int((np.abs(peer - true) > U * bound * 4).sum())
    return Outcome(n, worst(np.abs(ours - true), bound / 32), 32, "80-bit floats, all triples", "shapely", wrong)


def _clipping(n: int, seed: int) -> tuple[float, float, float, int]:
    """Worst area error of the polygons, of intersection_area, of vertices beyond an edge; and shapely's wrong areas."""
    a, b = cases.convex_pairs(np.random.default_rng(seed), n, 6)
    found, areas = geo.polygon_intersection(t(a), t(b)), geo.intersection_area(t(a), t(b)).tolist()
    size = np.maximum(extent(a), extent(b))
    far = size + np.maximum(magnitude(a), magnitude(b))
    peer = shapely.area(
        shapely.intersection(shapely.make_valid(shapely.polygons(a)), shapely.make_valid(shapely.polygons(b)))
    )
    errors: list[list[float]] = [[], [], []]
    wrong = 0
    for one, other, ring, count, area, theirs, s, f in zip(
        a, b, found.points.numpy(), found.count.tolist(), areas, peer.tolist(), size, far
    ):
        first, second = exact.rational(one), exact.rational(other)
        planes = exact.edges_as_planes(second)
        true = abs(exact.area(exact.clipped(first, planes)))
        corners = exact.rational(ring[:count])
        errors[0].append(float(abs(exact.area(corners) - true)) / f**2)
        errors[1].append(float(abs(F(area) - true)) / s**2)
        wrong += abs(theirs - float(true)) > 64 * U * f**2
        for p, q, r in planes if count else ():
            beyond = max(p * x + q * y - r for x, y in corners)
            errors[2].append(max(0.0, float(beyond) / float(p * p + q * q) ** 0.5) / f)
    return worst(errors[0], 1.0), worst(errors[1], 1.0), worst(errors[2], 1.0), wrong


def polygon_intersection(n: int, seed: int) -> Outcome:
    polygons, areas, vertices, wrong = _clipping(n, seed)
    return Outcome(n, max(polygons, areas, 4 * vertices), 64, "fractions", "shapely", wrong)


def half_planes(n: int, seed: int) -> Outcome:
    rng = np.random.default_rng(seed)
    planes, count = cases.half_planes(rng, n, 6), cases.counts(rng, n, 6)
    window = np.array([-2.0, -1.0, 1.0, 2.0])
    given = planes.copy()
    given[np.arange(6) >= count[:, None]] = np.nan
    found = geo.half_plane_intersection(t(given), t(window), t(count))
    start = [(F(x), F(y)) for x, y in ((-2, -1), (1, -1), (1, 2), (-2, 2))]
    error = []
    for row, k, ring, m in zip(planes, count, found.points.numpy(), found.count.tolist()):
        limits = [tuple(map(F, plane)) for plane in row[:k].tolist()]
        true, corners = exact.area(exact.clipped(start, limits)), exact.rational(ring[:m])
        error.append(float(abs(exact.area(corners) - true)) / 25)
        for p, q, r in limits if m else ():
            beyond = max(p * x + q * y - r for x, y in corners)
            error.append(4 * max(0.0, float(beyond) / float(p * p + q * q) ** 0.5) / 5)
    return Outcome(n, worst(error, 1.0), 64, "fractions")


def simplify(n: int, seed: int) -> Outcome:
    """Every piece split at its farthest point exactly where that is beyond the tolerance; shapely's choice counted."""
    rng = np.random.default_rng(seed)
    points, count = cases.lines(rng, n, 10), cases.counts(rng, n, 10)
    limit = extent(repeated(points, count)) * np.choose(
        rng.integers(0, 3, n), [np.zeros(n), np.full(n, 0.1), rng.random(n)]
    )
    line = geo.simplify(t(filled(points, count)), t(limit), t(count))
    peer = shapely.simplify(
        [shapely.linestrings(p[: max(k, 2)]) for p, k in zip(points, count)], limit, preserve_topology=False
    )
    wrong = 0
    for i, (row, k, most, ours, m, theirs) in enumerate(
        zip(points, count, limit, line.points.numpy(), line.count.tolist(), peer)
    ):
        other = shapely.get_coordinates(theirs)
        same = ours[:m].shape == other.shape and bool((ours[:m] == other).all())
        if same and i % 10:  # two programs that agree; of the rest, rational numbers are the judge
            continue
        true, slack = exact.rational(row[:k]), F(8) * F(U) * F(float(extent(row[:k])))
        assert exact.simplified(true, exact.rational(ours[:m]), F(float(most)), slack), (row[:k].tolist(), most)
        wrong += not same and k > 1 and not exact.simplified(true, exact.rational(other), F(float(most)), slack)
    return Outcome(n, 0, 8, "shapely, fractions where they differ and of every tenth", "shapely", wrong)


def simple_intersection(n: int, seed: int) -> Outcome:
    """Of n / 20 pairs, one at a time: areas, and that the pieces are valid and apart; half the corners are on a grid."""
    rng = np.random.default_rng(seed)
    a, b = (cases.stars(rng, 5 * n, 7)[::5] * 8 for _ in range(2))
    a[::2], b[::2] = np.round(a[::2]), np.round(b[::2])
    valid = shapely.is_valid(shapely.polygons(a)) & shapely.is_valid(shapely.polygons(b))
    a, b = a[valid][: n // 20], b[valid][: n // 20]
    peer = shapely.area(shapely.intersection(shapely.polygons(a), shapely.polygons(b)))
    error = []
    for one, other, true in zip(a, b, peer):
        points, count = geo.simple_intersection(t(one), t(other))
        pieces = [shapely.Polygon(p[:k]) for p, k in zip(points.numpy(), count.tolist())]
        assert all(p.is_valid and p.exterior.is_ccw for p in pieces)
        total = sum(p.area for p in pieces)
        error += [abs(total - true), abs(total - shapely.union_all(pieces).area)]
    return Outcome(len(a), worst(error, extent(np.concatenate([a, b])).max() ** 2), 64, "shapely")


CHECKS: dict[str, Callable[[int, int], Outcome]] = {
    check.__name__: check
    for check in (
        orientation, doubled_area, products, angle, segments, polygon_location, area_and_centroid, convex_hull, diameter,
        width, min_area_rectangle, smallest_circle, closest_pair, polygon_intersection, half_planes, simplify,
        simple_intersection,
    )
}  # fmt: skip
