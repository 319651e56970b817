"""Rotating calipers on the convex hull: diameter, width and the rectangle of least area.

Shamos 1978; Toussaint 1983, "Solving geometric problems with the rotating calipers". Turning the calipers merges the
directions of the hull's edges with the opposite directions; on tensors the merge is a search in the sorted directions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dovetail.geometry.batch import Pair, padded, take
from dovetail.geometry.hull import convex_hull
from dovetail.geometry.predicates import _doubled_area


class Strip(NamedTuple):
    """The narrowest strip: width (...,), the hull's edge (..., 2, 2) on one side, the corner (..., 2) on the other."""

    width: Tensor
    edge: Tensor
    corner: Tensor


class Rectangle(NamedTuple):
    """box (..., 5): cx, cy, w, h, angle in radians in (-π/2, π/2], from x to the side w; corners (..., 4, 2)."""

    box: Tensor
    corners: Tensor


class _Hull(NamedTuple):
    points: Tensor  # (R, M, 2), padded by the first
    count: Tensor  # (R,)
    angles: Tensor  # (R, M) of the edges, ascending from -π/2 to 3π/2; infinite in the padding
    lead: torch.Size


def diameter(points: Tensor, count: Tensor | None = None) -> Pair:
    """The two points of a set that are farthest apart, and their distance. (..., N, 2) -> `Pair`. O(N log N).

    Error of the distance at most 4·2^-53 relative. Sets of one point have diameter 0.
    Raises DataError for wrong shapes, empty rows and coordinates out of range. Source: Shamos 1978.
    """
    hull = _hull(points, count)
    R, M = hull.angles.shape
    ends = torch.stack([hull.points, hull.points.roll(-1, 1)], 2)  # (R, M, 2, 2)
    across = _extreme(hull, math.pi)  # (R, M, 3)
    others = take(hull.points, across.flatten(1)).view(R, M, 3, 2)
    apart = torch.hypot(*(ends[:, :, :, None] - others[:, :, None]).unbind(-1)).flatten(1)  # (R, M·2·3)
    distance, best = apart.max(-1)
    each = torch.arange(R, device=apart.device)
    edge, end, other = best // 6, best // 3 % 2, best % 3
    pair = torch.stack([ends[each, edge, end], others[each, edge, other]], 1)
    given = padded(points, count, "point set").points.reshape(R, -1, 2)
    index = (given[:, None] == pair[:, :, None]).all(-1).long().argmax(-1)
    lead = hull.lead
    return Pair(distance.reshape(lead), pair.reshape(*lead, 2, 2), index.reshape(*lead, 2))


def width(points: Tensor, count: Tensor | None = None) -> Strip:
    """The narrowest strip between parallel lines that holds a set. (..., N, 2) -> `Strip`. O(N log N).

    Error at most 8·2^-53 times the diameter. 0 for sets on a line. Raises as `diameter`.
    Source: Houle and Toussaint 1988: one of the lines holds an edge of the hull.
    """
    hull = _hull(points, count)
    each = torch.arange(hull.points.shape[0], device=hull.points.device)
    ends = torch.stack([hull.points, hull.points.roll(-1, 1)], 2)
    height, which = _height(hull, _extreme(hull, math.pi))
    least, edge = torch.where(torch.isfinite(hull.angles), height, torch.inf).min(-1)
    corner = hull.points[each, which[each, edge]]
    return Strip(least.reshape(hull.lead), ends[each, edge].reshape(*hull.lead, 2, 2), corner.reshape(*hull.lead, 2))


def min_area_rectangle(points: Tensor, count: Tensor | None = None) -> Rectangle:
    """The rectangle of least area, in any direction, that holds a set. (..., N, 2) -> `Rectangle`. O(N log N).

    Error of the area at most 32·2^-53 times the squared diameter, and of the corners 16·2^-53 times the diameter plus
    the largest magnitude of the coordinates; of equal rectangles, the first of the hull's edges. Sets on a line give h = 0, a
    point w = h = 0. Raises as `diameter`.
    Source: Freeman and Shapira 1975: one side holds an edge of the hull.
    """
    hull = _hull(points, count)
    R, M = hull.angles.shape
    each = torch.arange(R, device=hull.points.device)
    edge = hull.points.roll(-1, 1) - hull.points
    length = torch.hypot(*edge.unbind(-1))[..., None]
    along = torch.where(length > 0, edge / torch.where(length > 0, length, 1.0), edge.new_tensor([1.0, 0.0]))
    high, _ = _height(hull, _extreme(hull, math.pi))

    def reach(turn: float) -> Tensor:
        corners = take(hull.points, _extreme(hull, turn).flatten(1)).view(R, M, 3, 2)
        return ((corners - hull.points[:, :, None]) * along[:, :, None]).sum(-1)

    right, left = reach(math.pi / 2).amax(-1).clamp(min=0), reach(-math.pi / 2).amin(-1).clamp(max=0)
    area = torch.where(torch.isfinite(hull.angles), (right - left) * high, torch.inf)
    best = area.argmin(-1)
    u, start = along[each, best], hull.points[each, best]
    left, right, high = (v[each, best][:, None] for v in (left, right, high))
    v = torch.stack([-u[:, 1], u[:, 0]], -1)
    corners = torch.stack([start + left * u, start + right * u, start + right * u + high * v, start + left * u + high * v], 1)  # fmt: skip
    centre = start + (left + right) / 2 * u + high / 2 * v
    forward = torch.where((u[:, :1] < 0) | ((u[:, :1] == 0) & (u[:, 1:] < 0)), -u, u) + 0.0
    box = torch.cat([centre, right - left, high, torch.atan2(forward[:, 1:], forward[:, :1])], -1)
    return Rectangle(box.reshape(*hull.lead, 5), corners.reshape(*hull.lead, 4, 2))


def _hull(points: Tensor, count: Tensor | None) -> _Hull:
    hull = convex_hull(points, count)
    lead = hull.count.shape
    p, n = hull.points.reshape(-1, *hull.points.shape[-2:]), hull.count.reshape(-1)
    x, y = (p.roll(-1, 1) - p).unbind(-1)
    # The hull starts at its leftmost point: first the edges to the right, then those to the left, each ascending.
    back = (x < 0) | ((x == 0) & (y < 0))
    angles = torch.atan2(torch.where(back, -y, y), torch.where(back, -x, x)) + math.pi * back.to(x.dtype)
    angles = torch.where(torch.arange(p.shape[1], device=p.device) < n[:, None], angles, torch.inf)
    return _Hull(p, n, angles.cummax(-1).values, lead)


def _extreme(hull: _Hull, turn: float) -> Tensor:
    """(R, M, 3): for each edge, the corner at which the hull's edges pass the edge's direction + turn, and both beside it.

    Directions are rounded: of edges that are parallel but for that, the corner beside may be the extreme one.
    """
    wanted = torch.where(torch.isfinite(hull.angles), hull.angles + turn, 0.0)
    wanted = torch.where(wanted > 1.5 * math.pi, wanted - 2 * math.pi, wanted)
    wanted = torch.where(wanted <= -0.5 * math.pi, wanted + 2 * math.pi, wanted)
    at = torch.searchsorted(hull.angles, wanted.contiguous())
    beside = torch.arange(-1, 2, device=at.device)
    return (at[..., None] + beside) % hull.count[:, None, None]


def _height(hull: _Hull, across: Tensor) -> tuple[Tensor, Tensor]:
    """(R, M) the largest distance of the corners `across` (R, M, 3) from the edges' lines, and which corner it is."""
    R, M = hull.angles.shape
    corners = take(hull.points, across.flatten(1)).view(R, M, 3, 2)
    start, end = hull.points[:, :, None], hull.points.roll(-1, 1)[:, :, None]
    length = torch.hypot(*(end - start).unbind(-1))
    height = _doubled_area(start, end, corners) / torch.where(length > 0, length, 1.0)
    most, which = height.max(-1)
    return most.clamp(min=0), across.gather(-1, which[..., None])[..., 0]
