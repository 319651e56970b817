"""Polygons: area, centroid, and where points lie."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.geometry.batch import EPS, as_points, check_range, padded
from dovetail.geometry.predicates import _doubled_area, _orientation

_CHUNK = 2**22  # edges x points looked at in one go: 32 MiB a temporary


def signed_area(points: Tensor, count: Tensor | None = None) -> Tensor:
    """Area of polygons, positive where counter-clockwise. (..., N, 2) -> (...,) float64, squared units.

    The sum of the triangles about the first vertex (the shoelace formula), each with a relative error of 4·2^-53: the
    error is at most (N + 4)·2^-53 times the sum of the triangles' absolute areas, so relative where the polygon is
    convex, however thin or far from zero. Self-crossing polygons count each region by its winding number.
    Rows of one or two points have area 0. Raises DataError for wrong shapes, empty rows and coordinates out of range.
    """
    points = padded(points, count, "polygon").points
    return _fan(points).sum(-1) / 2


def polygon_area(points: Tensor, count: Tensor | None = None) -> Tensor:
    """Area of polygons in either orientation: the magnitude of `signed_area`, whose shapes, error and errors it has."""
    return signed_area(points, count).abs()


def polygon_centroid(points: Tensor, count: Tensor | None = None) -> Tensor:
    """Centre of mass of polygons, (..., N, 2) -> (..., 2) float64.

    That of the area; where the area is zero (or below its own error), that of the boundary; of one point, itself.
    Error: 8·N·2^-53·s times (sum of the triangles' absolute areas / area), s the extent of the polygon, or the distance
    of the centroid from the first vertex where that is larger (of self-crossing ones only); the quotient is 1 for
    convex polygons. Added to it is 2^-53 times the coordinates' magnitude. Raises as `signed_area`.
    """
    points = padded(points, count, "polygon").points
    first = points[..., :1, :]
    local = points - first
    after = local.roll(-1, -2)
    fan = _fan(points)
    total, gross = fan.sum(-1), fan.abs().sum(-1)
    has_area = total.abs() > 4 * points.shape[-2] * EPS * gross
    scale = torch.where(gross > 0, gross, 1.0)[..., None]  # before the products, which could underflow
    moment = ((fan / scale)[..., None] * (local + after)).sum(-2) / 3
    by_area = moment / torch.where(has_area, total / scale[..., 0], 1.0)[..., None]
    length = torch.hypot(*(after - local).unbind(-1))
    whole = length.sum(-1)
    share = length / torch.where(whole > 0, whole, 1.0)[..., None]
    by_length = (share[..., None] * (local + after) / 2).sum(-2)
    return torch.where(has_area[..., None], by_area, by_length) + first[..., 0, :]


def polygon_location(polygon: Tensor, points: Tensor, count: Tensor | None = None) -> Tensor:
    """Where points lie: 1 inside, 0 on the boundary, -1 outside, by the even-odd rule.

    polygon (..., N, 2), points (..., P, 2), count (...,) of the polygons; leading dimensions broadcast. Returns int8
    (..., P). Exact for every float64 input: tolerance none. Memory is bounded: points are taken in chunks.
    Raises DataError for wrong shapes, empty rows and coordinates out of range.
    Source: Shimrat 1962 (crossing number) with the exact orientation of Shewchuk 1997.
    """
    ring = padded(polygon, count, "polygon").points
    points = as_points(points, "points")
    check_range(points, "points")
    lead = torch.broadcast_shapes(ring.shape[:-2], points.shape[:-2])
    P, N = points.shape[-2], ring.shape[-2]
    step = max(1, _CHUNK // max(1, N * lead.numel()))
    parts = [_locate(ring[..., None, :, :], points[..., i : i + step, None, :]) for i in range(0, P, step)]
    if not parts:
        return torch.zeros(*lead, 0, dtype=torch.int8, device=points.device)
    return torch.cat([part.expand(*lead, part.shape[-1]) for part in parts], -1)


def polygon_contains(polygon: Tensor, points: Tensor, count: Tensor | None = None) -> Tensor:
    """Whether points lie in closed polygons: inside or on the boundary. bool (..., P).

    Arguments, exactness and errors as `polygon_location`, which tells the boundary from the inside.
    """
    return polygon_location(polygon, points, count) >= 0


def _locate(a: Tensor, point: Tensor) -> Tensor:
    """a (..., 1, N, 2) vertices, point (..., P, 1, 2) -> int8 (..., P)."""
    b = a.roll(-1, -2)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    crossing = (a[..., 1] > point[..., 1]) != (b[..., 1] > point[..., 1])  # half-open: a vertex counts once
    right = crossing & (point[..., 0] < low[..., 0])  # the edge passes to the right of the point
    boundary = torch.zeros_like(right)
    boxed = ((low <= point) & (point <= high)).all(-1)  # the orientation decides within the box of the edge only
    where = boxed.nonzero(as_tuple=True)
    if where[0].numel():
        a, b, point = (v.expand(*boxed.shape, 2)[where] for v in (a, b, point))
        turn = _orientation(a, b, point)
        boundary[where] = turn == 0
        right[where] = crossing[where] & torch.where(b[..., 1] > a[..., 1], turn > 0, turn < 0)
    inside = right.sum(-1) % 2 == 1
    return torch.where(boundary.any(-1), 0, torch.where(inside, 1, -1)).to(torch.int8)


def _fan(points: Tensor) -> Tensor:
    """Twice the signed areas (..., N) of the triangles first vertex, i, i + 1."""
    return _doubled_area(points[..., :1, :], points, points.roll(-1, -2))
