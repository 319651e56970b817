"""Segments: whether two meet, exactly, and where."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.errors import DataError
from dovetail.geometry.batch import Polygons, as_points, check_range
from dovetail.geometry.predicates import _doubled_area, _orientation


def segments_intersect(p: Tensor, q: Tensor) -> Tensor:
    """Whether closed segments have a point in common: touching and overlapping counts.

    p, q (..., 2, 2): two ends each, which may coincide; leading dimensions broadcast, so (A, 1, 2, 2) with (B, 2, 2)
    gives all pairs. Returns bool (...). Exact for every float64 input: tolerance none.
    Raises DataError for wrong shapes and coordinates out of range. Source: Cormen et al., section 33.1, with the exact
    orientation of Shewchuk 1997.
    """
    p, q = _segments(p), _segments(q)
    a, b, c, d = p[..., 0, :], p[..., 1, :], q[..., 0, :], q[..., 1, :]
    boxes = _boxes_meet(p, q)
    apart = _orientation(a, b, c) * _orientation(a, b, d) > 0
    apart |= _orientation(c, d, a) * _orientation(c, d, b) > 0
    return boxes & ~apart


def segment_intersection(p: Tensor, q: Tensor) -> Polygons:
    """The common points of closed segments: none, one, or the two ends of an overlap.

    p, q as in `segments_intersect`. Returns points (..., 2, 2) with count (...,) 0, 1 or 2; as everywhere, padding
    repeats the first point. Whether there is a point, and whether there are two, is exact. Ends that lie on the other
    segment are returned as they were given; a point where interiors cross is within 8·2^-53·m of the exact one, m the
    largest magnitude of the coordinates, however flat the angle. Raises as `segments_intersect`.
    """
    p, q = _segments(p), _segments(q)
    shape = torch.broadcast_shapes(p.shape, q.shape)
    p, q = p.expand(shape), q.expand(shape)
    a, b, c, d = p[..., 0, :], p[..., 1, :], q[..., 0, :], q[..., 1, :]
    # Accurate in value as in sign: what cancels in them has cancelled before any rounding. Scaled against underflow.
    largest = torch.maximum(p.abs().amax((-2, -1)), q.abs().amax((-2, -1)))
    exponent = torch.frexp(torch.where(largest > 0, largest, 1.0)).exponent
    scale = torch.ldexp(torch.ones_like(largest), (249 - exponent).clamp(max=1000))[..., None]
    of_c, of_d = (_doubled_area(a * scale, b * scale, end * scale) for end in (c, d))
    sc, sd, sa, sb = (_orientation(*t) for t in ((a, b, c), (a, b, d), (c, d, a), (c, d, b)))
    hit = _boxes_meet(p, q) & (sc * sd <= 0) & (sa * sb <= 0)
    flat = (sa == 0) & (sb == 0) & (sc == 0) & (sd == 0)

    span = torch.where(of_c == of_d, 1.0, of_c - of_d)  # of opposite signs where interiors cross: nothing cancels
    t = (of_c / span)[..., None]  # the place between c and d, reckoned from the nearer end
    point = torch.where(t <= 0.5, c + t * (d - c), d + (of_d / -span)[..., None] * (c - d))
    for sign, end in ((sa, a), (sb, b), (sc, c), (sd, d)):
        point = torch.where((sign == 0)[..., None] & _in_box(end, p, q), end, point)

    low_p, high_p = _in_order(p)
    low_q, high_q = _in_order(q)
    low = torch.where(_before(low_p, low_q)[..., None], low_q, low_p)
    high = torch.where(_before(high_p, high_q)[..., None], high_p, high_q)
    first = torch.where(flat[..., None], low, point)
    second = torch.where(flat[..., None], high, point)
    count = hit.long() * (1 + (flat & (low != high).any(-1)).long())
    points = torch.stack([first, second], -2)
    return Polygons(torch.where(hit[..., None, None], points, 0.0), count)


def _segments(s: Tensor) -> Tensor:
    s = as_points(s, "segment")
    if s.shape[-2] != 2:
        raise DataError(
            f"segments are (..., 2, 2), two ends of (x, y); this is {tuple(s.shape)}",
            where="dovetail.geometry.segments",
        )
    check_range(s, "segment")
    return s


def _boxes_meet(p: Tensor, q: Tensor) -> Tensor:
    return (torch.maximum(p.amin(-2), q.amin(-2)) <= torch.minimum(p.amax(-2), q.amax(-2))).all(-1)


def _in_box(point: Tensor, *segments: Tensor) -> Tensor:
    return torch.stack([((s.amin(-2) <= point) & (point <= s.amax(-2))).all(-1) for s in segments]).all(0)[..., None]


def _before(a: Tensor, b: Tensor) -> Tensor:
    """Whether a comes before b by x, then y: the order along a line."""
    return (a[..., 0] < b[..., 0]) | ((a[..., 0] == b[..., 0]) & (a[..., 1] < b[..., 1]))


def _in_order(s: Tensor) -> tuple[Tensor, Tensor]:
    swap = _before(s[..., 1, :], s[..., 0, :])[..., None]
    return torch.where(swap, s[..., 1, :], s[..., 0, :]), torch.where(swap, s[..., 0, :], s[..., 1, :])
