"""Fewer points on a line, within a tolerance."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.errors import DataError
from dovetail.geometry.batch import Polygons, compact, padded, unit
from dovetail.geometry.predicates import _doubled_area


def simplify(points: Tensor, tolerance: float | Tensor, count: Tensor | None = None) -> Polygons:
    """Open lines (..., N, 2) with only the points that are needed to stay within `tolerance` of every one left out.

    tolerance: >= 0, in units of the coordinates; one number or one a row (...,). Ends stay. Of each piece the point
    farthest from the *segment* between its ends stays if it is farther than the tolerance, and splits the piece; of
    equally far ones the first. To simplify a ring, repeat its first point at the end. Lines may come to cross
    themselves, as in the published algorithm. All pieces of all rows are split at once: O(N·depth).

    Distances have an error of 8·2^-53 times the extent of the line: points within that of the tolerance may stay or go.
    Returns `Polygons`, here lines. Raises DataError for wrong shapes, empty rows, coordinates out of range and
    negative tolerances. Source: Ramer 1972; Douglas and Peucker 1973.
    """
    given = padded(points, count, "line")
    lead, N = given.count.shape, given.points.shape[-2]
    whole = given.points.reshape(-1, N, 2)
    p, _, scale = unit(whole)
    limit = torch.as_tensor(tolerance, dtype=torch.float64, device=p.device)
    if (limit.ndim and limit.shape != lead) or not bool((limit >= 0).all()):
        raise DataError(f"the tolerance must be one number >= 0, or one a row {tuple(lead)}", where="simplify")
    limit = limit.expand(lead).reshape(-1) / scale
    R, n = p.shape[0], given.count.reshape(-1)
    flat = p.reshape(-1, 2)
    start = torch.arange(R, device=p.device)[:, None] * N
    at = torch.arange(N, device=p.device)
    keep = ((at == 0) | (at == n[:, None] - 1)).reshape(-1)
    inner = ((at > 0) & (at < n[:, None] - 1)).reshape(-1)
    here = inner.nonzero()[:, 0]  # places in the flat batch that are undecided, with the ends of their piece
    low, high = start.expand(R, N).reshape(-1)[here], (start + n[:, None] - 1).expand(R, N).reshape(-1)[here]
    farthest = p.new_empty(R * N)
    split = torch.empty(R * N, dtype=torch.int64, device=p.device)
    while here.numel():
        away = _distance(flat[here], flat[low], flat[high])
        farthest[low] = -1.0  # a piece is known by its first end
        farthest.scatter_reduce_(0, low, away, "amax")
        left = farthest[low] > limit[low // N]
        here, low, high, away = here[left], low[left], high[left], away[left]
        top = away == farthest[low]
        split[low] = R * N
        split.scatter_reduce_(0, low[top], here[top], "amin")
        middle = split[low]
        keep[middle] = True
        low, high = torch.where(here > middle, middle, low), torch.where(here < middle, middle, high)
        rest = here != middle
        here, low, high = here[rest], low[rest], high[rest]
    line = compact(whole, keep.view(R, N))
    return Polygons(line.points.reshape(*lead, *line.points.shape[1:]), line.count.reshape(lead))


def _distance(p: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Of points from segments, all (K, 2)."""
    length = torch.hypot(*(b - a).unbind(-1))
    to_a, to_b = torch.hypot(*(p - a).unbind(-1)), torch.hypot(*(p - b).unbind(-1))
    between = (((p - a) * (b - a)).sum(-1) > 0) & (((p - b) * (b - a)).sum(-1) < 0)
    height = _doubled_area(a, b, p).abs() / torch.where(length > 0, length, 1.0)
    return torch.where(between & (length > 0), height, torch.minimum(to_a, to_b))
