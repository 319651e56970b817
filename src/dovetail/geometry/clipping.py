"""The intersection of polygons, many pairs at once: clipping one against each edge of the other, which is convex.

Sutherland and Hodgman 1974, "Reentrant polygon clipping". One step clips every pair by one edge, so that the number of
steps is that of the edges of the clip polygons, whatever the number of pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.errors import DataError
from dovetail.geometry.batch import EPS, Polygons, padded, reverse
from dovetail.geometry.hull import convex_hull

_FLAT = 2.0**-48  # an intersection thinner than this, relative to its own size, is a touch and not an area


def polygon_intersection(
    subject: Tensor, clip: Tensor, subject_count: Tensor | None = None, clip_count: Tensor | None = None
) -> Polygons:
    """The parts of the subject polygons inside the clip polygons, counter-clockwise.

    subject (..., N, 2), clip (..., M, 2): simple polygons in either orientation, padded with their counts (...,); the
    leading dimensions broadcast, so (A, 1, 4, 2) with (1, B, 4, 2) gives all pairs (A, B). Returns `Polygons` with the
    leading dimensions broadcast and as many points as the largest intersection has. Count 0: no common area, though
    the polygons may touch.

    The clip polygons must be convex; repeated and collinear vertices may occur, and dents below 2^-40 of the polygon's
    size count as rounding: then its convex hull is meant. Subjects may be any simple polygon: where a dented subject falls into several pieces they
    come as one boundary, joined by edges of zero width along the clip polygon, and its area is right.

    Error: with s the larger polygon's extent plus the largest magnitude of the coordinates, no returned vertex lies
    outside the clip polygon by more than 16·2^-53·s and the area differs from the exact one by at most 64·2^-53·s².
    Raises DataError for wrong shapes, coordinates out of range and clip polygons that are not convex.
    """
    local, origin, lead = _clipped(subject, clip, subject_count, clip_count)
    valid = (torch.arange(local.points.shape[-2], device=origin.device) < local.count[:, None])[..., None]
    points = torch.where(valid | (local.count > 0)[:, None, None], local.points + origin[:, None], 0.0)
    return Polygons(points.reshape(*lead, *points.shape[1:]), local.count.reshape(lead))


def intersection_area(
    subject: Tensor, clip: Tensor, subject_count: Tensor | None = None, clip_count: Tensor | None = None
) -> Tensor:
    """The area that polygons share, (...,) float64: that of `polygon_intersection`, whose arguments and errors these are.

    Computed about a vertex of the smaller polygon, so that coordinates far from zero cost no precision: the error is
    at most 64·2^-53·s², s the larger polygon's extent.
    """
    local, _, lead = _clipped(subject, clip, subject_count, clip_count)
    return (_doubled(local.points) / 2).reshape(lead)


def _clipped(
    subject: Tensor, clip: Tensor, subject_count: Tensor | None, clip_count: Tensor | None
) -> tuple[Polygons, Tensor, torch.Size]:
    """(intersections (R, K, 2) about origins, origins (R, 2), the leading dimensions whose product is R)."""
    subjects = _counter_clockwise(padded(subject, subject_count, "subject polygon", least=0))
    clips = _convex(_counter_clockwise(padded(clip, clip_count, "clip polygon", least=0)))
    lead = torch.broadcast_shapes(subjects.count.shape, clips.count.shape)
    low, high = zip(*((p.points.amin(-2), p.points.amax(-2)) for p in (subjects, clips)))
    meet = (torch.maximum(*low) < torch.minimum(*high)).all(-1)
    meet = (meet & (subjects.count > 2) & (clips.count > 2)).expand(lead)
    R = meet.numel()
    rows = meet.reshape(-1).nonzero()[:, 0]  # pairs whose bounding boxes are apart take no part
    s, n = _rows(subjects, meet.shape, rows)
    c = _rows(clips, meet.shape, rows).points
    smaller = (s.amax(1) - s.amin(1)).sum(-1) <= (c.amax(1) - c.amin(1)).sum(-1)
    origin = torch.where(smaller[:, None], s[:, 0], c[:, 0])
    # Edges are taken before the origin is: those between corners that all but coincide keep their direction.
    (x, y), (ax, ay), (ex, ey) = (p.unbind(-1) for p in (s - origin[:, None], c - origin[:, None], c.roll(-1, 1) - c))
    for j in range(c.shape[1]):  # a padded clip edge has no length: everything is on its inner side
        side = ex[:, j, None] * (y - ay[:, j, None]) - ey[:, j, None] * (x - ax[:, j, None])
        x, y, n = cut(x, y, n, side)
    found = tidy(torch.stack([x, y], -1), n)
    points = s.new_zeros(R, found.points.shape[1], 2).index_copy(0, rows, found.points)
    count = torch.zeros(R, dtype=torch.int64, device=s.device).index_copy(0, rows, found.count)
    return Polygons(points, count), s.new_zeros(R, 2).index_copy(0, rows, origin), lead


def _rows(polygons: Polygons, lead: torch.Size, rows: Tensor) -> Polygons:
    """Rows of the flattened batch that broadcasts to `lead`, without building it."""
    own = torch.arange(polygons.count.numel(), device=rows.device).view(polygons.count.shape)
    which = own.expand(lead).reshape(-1)[rows]
    return Polygons(polygons.points.reshape(-1, *polygons.points.shape[-2:])[which], polygons.count.reshape(-1)[which])


def cut(x: Tensor, y: Tensor, n: Tensor, side: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of the polygons (x, y, n) where the linear function that is `side` (R, N) at their vertices is >= 0.

    A new vertex lies on the edge that it cuts, between ends of opposite sides, so that no rounding moves it out of
    their box: hence neither NaN nor areas out of range, whatever the input.
    """
    inside = side >= 0
    valid = torch.arange(x.shape[1], device=x.device) < n[:, None]
    crossed = valid & (inside != inside.roll(-1, 1))
    if not bool((valid & ~inside).any()):
        return x, y, n
    t = torch.where(crossed, side / torch.where(crossed, side - side.roll(-1, 1), 1.0), 0.0)
    px, py = x + t * (x.roll(-1, 1) - x), y + t * (y.roll(-1, 1) - y)
    keep = torch.stack([valid & inside, crossed], -1).flatten(1)
    n = keep.sum(1)
    size = int(n.max())
    place = torch.where(keep, keep.cumsum(1) - 1, size)
    valid = torch.arange(size, device=x.device) < n[:, None]
    x, y = (torch.stack(pair, -1).flatten(1) for pair in ((x, px), (y, py)))
    x, y = (v.new_zeros(v.shape[0], size + 1).scatter(1, place, v)[:, :size] for v in (x, y))
    x, y = (torch.where(valid, v, v[:, :1]) for v in (x, y))
    return x, y, n


def tidy(points: Tensor, count: Tensor) -> Polygons:
    """Without repeated vertices; counter-clockwise; without what has no area."""
    valid = torch.arange(points.shape[1], device=points.device) < count[:, None]
    moved = (points != points.roll(-1, 1)).any(-1)  # padding repeats the first: the last vertex is compared with it
    keep = valid & moved
    doubled = _doubled(points)
    extent = (points.amax(1) - points.amin(1)).amax(-1) if points.shape[1] else doubled
    keep &= ((keep.sum(-1) > 2) & (doubled > _FLAT * extent**2))[:, None]
    count = keep.sum(-1)
    size = int(count.max()) if count.numel() else 0
    place = torch.where(keep, keep.cumsum(-1) - 1, size)[..., None].expand(-1, -1, 2)
    out = points.new_zeros(points.shape[0], size + 1, 2).scatter(1, place, points)[:, :size]
    left = (torch.arange(size, device=points.device) < count[:, None])[..., None]
    return Polygons(torch.where(left, out, out[:, :1]), count)


def _doubled(points: Tensor) -> Tensor:
    """Twice the signed area (R,) about the first vertex."""
    if not points.shape[-2]:
        return points.new_zeros(points.shape[0])
    x, y = (points - points[:, :1]).unbind(-1)
    return (x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(-1)


def _counter_clockwise(polygons: Polygons) -> Polygons:
    x, y = (polygons.points - polygons.points[..., :1, :]).unbind(-1)
    clockwise = (x * y.roll(-1, -1) - y * x.roll(-1, -1)).sum(-1) < 0
    if not bool(clockwise.any()):
        return polygons
    return Polygons(torch.where(clockwise[..., None, None], reverse(polygons).points, polygons.points), polygons.count)


def _convex(clips: Polygons) -> Polygons:
    """The clip polygons, without the dents and loops that rounding makes; clearly convex ones are as they were given.

    Corners that all but coincide have an edge of any direction between them, by which one must not clip: such rows are
    replaced by their convex hull, which must be their like in area and perimeter. Raises DataError where it is not.
    """
    ex, ey = (clips.points.roll(-1, -2) - clips.points).unbind(-1)
    turn = ex.roll(1, -1) * ey - ey.roll(1, -1) * ex  # at each vertex
    length = torch.hypot(ex, ey)
    clear = turn > 16 * EPS * length * length.roll(1, -1)
    if (
        clips.count.numel() and int(clips.count.min()) < clips.points.shape[-2]
    ):  # the last vertex comes before the first
        back = (clips.count - 1).clamp(min=0)[..., None]
        at_first = ex.gather(-1, back) * ey[..., :1] - ey.gather(-1, back) * ex[..., :1]
        clear[..., :1] = at_first > 16 * EPS * length.gather(-1, back) * length[..., :1]
        clear |= torch.arange(clips.points.shape[-2], device=back.device) >= clips.count[..., None]
    right = ex > 0
    around = (right != right.roll(1, -1)).sum(-1) <= 2  # once: no more than one change each way between right and left
    doubtful = (~(clear.all(-1) & around) & (clips.count > 0)).reshape(-1).nonzero()[:, 0]
    if not doubtful.numel():
        return clips
    points = clips.points.reshape(-1, *clips.points.shape[-2:])
    given = points[doubtful]
    hull = convex_hull(given)
    size = (given.amax(1) - given.amin(1)).amax(-1)
    slack = 2.0**-40 * size + 4 * EPS * given.abs().amax((1, 2))  # the coordinates themselves are rounded
    area = (_doubled(hull.points) - _doubled(given)).abs() / 2
    perimeter = _perimeter(given) - _perimeter(hull.points)
    bad = (area > 8 * slack * size) | (perimeter > 8 * clips.points.shape[-2] * slack)
    if bool(bad.any()):
        raise DataError(
            f"clip polygon {int(doubtful[bad][0])} is not convex",
            where="polygon_intersection",
            remedy="give the convex polygon as the clip and the other as the subject; for two that are not convex, "
            "call simple_intersection(a, b), which is exact, one pair at a time; or clip by convex pieces of it",
        )
    M = points.shape[1]
    full = torch.cat([hull.points, hull.points[:, :1].expand(-1, M - hull.points.shape[1], 2)], 1)
    points = points.index_copy(0, doubtful, full)
    count = clips.count.reshape(-1).index_copy(0, doubtful, hull.count)
    return Polygons(points.view(clips.points.shape), count.view(clips.count.shape))


def _perimeter(points: Tensor) -> Tensor:
    return torch.hypot(*(points.roll(-1, 1) - points).unbind(-1)).sum(-1)
