"""The intersection of half-planes, inside a window."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.errors import DataError
from dovetail.geometry.batch import Polygons, check_range
from dovetail.geometry.clipping import cut, tidy
from dovetail.geometry.predicates import two_product, two_sum


def half_plane_intersection(planes: Tensor, window: Tensor, count: Tensor | None = None) -> Polygons:
    """The points of a window that satisfy a·x + b·y <= c for every half-plane (a, b, c) of a row.

    planes (..., M, 3), count (...,) of them where rows differ; window (..., 4) or (4,): xmin, ymin, xmax, ymax. The
    window makes every intersection bounded: where it matters to know, an unbounded one has a vertex on the window's
    border. Returns `Polygons` counter-clockwise, count 0 where nothing with an area is left. A row (0, 0, c) says
    0 <= c. All rows are cut by their i-th half-plane at once, M steps: O(M·(number of vertices left)).

    Error: with s the window's size plus its largest magnitude, every returned vertex violates no half-plane by more
    than 16·2^-53·s in distance, and the area differs from the exact one by at most 64·2^-53·s²; slopes must not make
    |c| larger than 2^20·s·|(a, b)|, or c itself rounds by more.
    Raises DataError for wrong shapes, values out of range and empty windows.
    Source: Preparata and Shamos 1985, section 7.2, as successive cuts (Sutherland and Hodgman 1974).
    """
    planes, window = torch.as_tensor(planes), torch.as_tensor(window)
    if planes.ndim < 2 or planes.shape[-1] != 3 or planes.is_complex() or window.shape[-1:] != (4,):
        raise DataError(
            f"half-planes are (..., M, 3) and the window (..., 4); these are {tuple(planes.shape)}, {tuple(window.shape)}",
            where="half_plane_intersection",
        )
    lead, M = planes.shape[:-2], planes.shape[-2]
    planes, window = planes.double(), window.to(planes.device, torch.float64)
    if count is not None:
        count = torch.as_tensor(count, device=planes.device)
        if count.shape != lead or count.is_floating_point() or bool(((count < 0) | (count > M)).any()):
            raise DataError(f"count must be integers {tuple(lead)} in 0..{M}", where="half_plane_intersection")
        planes = torch.where((torch.arange(M, device=planes.device) < count[..., None])[..., None], planes, 0.0)
    check_range(planes, "half-planes")
    check_range(window, "window")
    planes, window = planes.reshape(-1, M, 3), window.expand(*lead, 4).reshape(-1, 4)
    if bool((window[:, :2] >= window[:, 2:]).any()):
        raise DataError(
            "the window is empty", where="half_plane_intersection", remedy="give xmin < xmax and ymin < ymax"
        )
    x, y = window[:, [0, 2, 2, 0]], window[:, [1, 1, 3, 3]]
    n = torch.full(planes.shape[:1], 4, dtype=torch.int64, device=planes.device)
    for a, b, c in (plane.unbind(-1) for plane in planes.unbind(1)):
        x, y, n = cut(x, y, n, _slack(a[:, None], b[:, None], c[:, None], x, y))
    found = tidy(torch.stack([x, y], -1), n)
    return Polygons(found.points.reshape(*lead, *found.points.shape[1:]), found.count.reshape(lead))


def _slack(a: Tensor, b: Tensor, c: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """c - ax - by, rounded about once: its terms may cancel."""
    (p, p_), (q, q_) = two_product(a, x), two_product(b, y)
    s, s_ = two_sum(c, -p)
    t, t_ = two_sum(s, -q)
    return t + (t_ + s_ - (p_ + q_))
