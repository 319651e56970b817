"""The room's one convention for batches of point sets and polygons, and the checks at its door."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dovetail.errors import DataError

EPS = 2.0**-53  # unit roundoff of float64: half a unit in the last place
LIMIT = 2.0**250  # largest magnitude of a coordinate: products of four of them stay finite


class Polygons(NamedTuple):
    """A padded batch: points (..., N, 2) float64 and count (...,) int64, as described in `dovetail.geometry`."""

    points: Tensor
    count: Tensor


class Pair(NamedTuple):
    """Two points of a set: distance (...,), points (..., 2, 2) and their places in the input, index (..., 2) int64."""

    distance: Tensor
    points: Tensor
    index: Tensor


def as_points(points: Tensor, what: str, dims: int = 2) -> Tensor:
    """`points` (..., 2) in float64, of at least `dims` dimensions. Its values are not looked at.

    Raises DataError for another shape, and for complex numbers.
    """
    if not isinstance(points, Tensor):  # lists of floats are float64, which torch would not make of them
        points = torch.as_tensor(points, dtype=torch.float64)
    if points.ndim < dims or points.shape[-1] != 2 or points.is_complex():
        raise DataError(
            f"{what}: real points end in a dimension of 2 (x, y); this is {tuple(points.shape)} of {points.dtype}",
            where="dovetail.geometry",
            remedy="stack x and y in the last dimension" + (": (..., N, 2)" if dims == 2 else ""),
        )
    return points.to(torch.float64)


def check_range(points: Tensor, what: str) -> None:
    """Raises DataError where a coordinate is NaN, infinite or beyond 2^250 in magnitude."""
    if points.numel() and not bool((points.detach().abs() <= LIMIT).all()):
        raise DataError(
            f"{what}: coordinates must be finite and at most 2^250 in magnitude",
            where="dovetail.geometry",
            remedy="remove NaN and infinity, or scale the coordinates",
        )


def padded(points: Tensor, count: Tensor | None, what: str, least: int = 1) -> Polygons:
    """Checked float64 points (..., N, 2), N >= 1, whose padding repeats the row's first point (zero in empty rows).

    Raises DataError for wrong shapes, coordinates out of range and rows of fewer than `least` points.
    """
    points = as_points(points, what)
    if points.shape[-2] == 0:
        points = points.new_zeros(*points.shape[:-2], 1, 2)
        count = points.new_zeros(points.shape[:-2], dtype=torch.int64)
    N = points.shape[-2]
    if count is None:
        count = torch.full(points.shape[:-2], N, dtype=torch.int64, device=points.device)
    else:
        count = torch.as_tensor(count, device=points.device)
        if count.shape != points.shape[:-2] or count.is_floating_point() or count.dtype == torch.bool:
            raise DataError(
                f"{what}: count must be integers {tuple(points.shape[:-2])}, one a row; "
                f"it is {tuple(count.shape)} of {count.dtype}",
                where="dovetail.geometry",
            )
        count = count.to(torch.int64)
        if count.numel() and (int(count.min()) < 0 or int(count.max()) > N):
            raise DataError(f"{what}: counts must lie in 0..{N}, the padded length", where="dovetail.geometry")
        valid = (torch.arange(N, device=points.device) < count[..., None])[..., None]
        first = torch.where((count > 0)[..., None, None], points[..., :1, :], 0.0)
        points = torch.where(valid, points, first)
    if count.numel() and int(count.min()) < least:
        raise DataError(
            f"{what}: a row has {int(count.min())} points and needs at least {least}",
            where="dovetail.geometry",
            remedy="leave out the rows that are too short",
        )
    check_range(points, what)
    return Polygons(points, count)


def compact(points: Tensor, keep: Tensor) -> Polygons:
    """The points (R, N, 2) that keep (R, N) names, moved to the front of each row in their order; padding as above."""
    count = keep.sum(-1)
    N = int(count.max()) if count.numel() else 0
    place = torch.where(keep, keep.cumsum(-1) - 1, N)
    out = points.new_zeros(points.shape[0], N + 1, 2).scatter(1, place[..., None].expand(-1, -1, 2), points)[:, :N]
    valid = (torch.arange(N, device=points.device) < count[:, None])[..., None]
    return Polygons(torch.where(valid, out, torch.where((count > 0)[:, None, None], out[:, :1], 0.0)), count)


def take(points: Tensor, index: Tensor) -> Tensor:
    """Points (..., K, 2) at index (..., K) of points (..., N, 2)."""
    return points.gather(-2, index[..., None].expand(*index.shape, 2))


def reverse(polygons: Polygons) -> Polygons:
    """The same polygons traversed the other way, each from its own first vertex."""
    N = polygons.points.shape[-2]
    index = torch.arange(N, device=polygons.points.device)
    back = torch.where(index < polygons.count[..., None], (polygons.count[..., None] - index) % N, 0)
    back = torch.where(index == 0, 0, back)
    return Polygons(take(polygons.points, back), polygons.count)


def unit(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(points about the middle of their row's box and at most 1 in size, origin (R, 2), scale (R,)) of (R, N, 2).

    The scale is a power of two, so that it costs no precision; squares of the result neither overflow nor vanish.
    """
    low, high = points.amin(1), points.amax(1)
    origin = low + (high - low) / 2  # of one point: itself
    extent = (high - low).amax(-1)
    scale = torch.ldexp(torch.ones_like(extent), torch.frexp(torch.where(extent > 0, extent, 1.0)).exponent)
    return (points - origin[:, None]) / scale[:, None, None], origin, scale
