"""The convex hull, exactly: Andrew's monotone chain, over all rows in step or one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.geometry.batch import EPS, Polygons, compact, padded, take
from dovetail.geometry.predicates import _orientation, _rational

_IN_STEP = 64  # rows from which a step over all of them costs less than plain Python on each


def convex_hull(points: Tensor, count: Tensor | None = None) -> Polygons:
    """The convex hulls of point sets (..., N, 2), counter-clockwise from the leftmost (then lowest) point.

    Only corners: no repeated points, none on an edge. Sets on a line give its two ends, a single point itself. The
    corners are input points and exact for every float64 input: tolerance none. O(N log N) a row.
    Raises DataError for wrong shapes, empty rows and coordinates out of range.
    Source: Andrew 1979, with the exact orientation of Shewchuk 1997.
    """
    given = padded(points, count, "point set")
    lead = given.points.shape[:-2]
    rows = _sorted(given.points.detach().reshape(-1, *given.points.shape[-2:]))
    hull = _in_step(rows) if rows.count.numel() >= _IN_STEP else _one_by_one(rows)
    return Polygons(hull.points.reshape(*lead, *hull.points.shape[1:]), hull.count.reshape(lead))


def _sorted(points: Tensor) -> Polygons:
    """By x, then y, without repetitions (among which is the padding)."""
    points = take(points, points[..., 1].argsort(dim=-1, stable=True))
    points = take(points, points[..., 0].argsort(dim=-1, stable=True))
    new = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device)
    new[:, 1:] = (points[:, 1:] != points[:, :-1]).any(-1)
    return compact(points, new)


def _in_step(rows: Polygons) -> Polygons:
    """Every row takes one step of its own chain at a time: a pop or a push, 2N of them in all."""
    points, n = rows
    R, N = points.shape[:2]
    index = torch.arange(N, device=points.device)
    back = (n[:, None] - 1 - index).clamp(min=0)
    points = torch.cat([points, take(points, back)])  # the lower chain goes right, the upper one left
    n = torch.cat([n, n])
    each = torch.arange(2 * R, device=points.device)
    stack = torch.zeros(2 * R, N, dtype=torch.int64, device=points.device)
    size, at = torch.zeros_like(n), torch.zeros_like(n)
    for _ in range(2 * N):
        going = at < n
        if not bool(going.any()):
            break
        i, j = (stack[each, (size - k).clamp(min=0)] for k in (2, 1))
        here = at.clamp(max=N - 1)
        turn = _orientation(points[each, i], points[each, j], points[each, here])
        pop = going & (size >= 2) & (turn <= 0)
        push = going & ~pop
        stack[each[push], size[push]] = at[push]
        size = size + push.long() - pop.long()
        at = at + push.long()
    chains = take(points, stack)
    keep = index < torch.clamp(size - 1, min=0)[:, None]  # each chain without its last point, the other's first
    keep[:R, 0] = True
    return compact(torch.cat([chains[:R], chains[R:]], 1), torch.cat([keep[:R], keep[R:]], 1))


def _one_by_one(rows: Polygons) -> Polygons:
    hulls = []
    for points, n in zip(rows.points, rows.count.tolist(), strict=True):
        line = [tuple(p) for p in points[:n].tolist()]
        lower, upper = _chain(line), _chain(line[::-1])
        hulls.append(points.new_tensor(lower[:-1] + upper[:-1] if n > 1 else line))
    size = max((len(h) for h in hulls), default=0)
    padded_hulls = [torch.cat([h, h[:1].expand(size - len(h), 2)]) for h in hulls]
    count = torch.tensor([len(h) for h in hulls], dtype=torch.int64, device=rows.points.device)
    return Polygons(torch.stack(padded_hulls) if hulls else rows.points, count)


def _chain(line: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    stack: list[tuple[float, ...]] = []
    for c in line:
        while len(stack) >= 2 and not _left(stack[-2], stack[-1], c):
            stack.pop()
        stack.append(c)
    return stack


def _left(a: tuple[float, ...], b: tuple[float, ...], c: tuple[float, ...]) -> bool:
    """Whether a -> b -> c turns left: the scalar twin of `orientation`."""
    left, right = (a[0] - c[0]) * (b[1] - c[1]), (a[1] - c[1]) * (b[0] - c[0])
    det = left - right
    if abs(det) > 4 * EPS * (abs(left) + abs(right)) + 2.0**-1060:
        return det > 0
    return _rational(*a, *b, *c) > 0
