"""Vectors of the plane: cross and dot products without cancellation, and the angle between two."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.geometry.batch import as_points, check_range
from dovetail.geometry.predicates import two_product, two_sum


def cross(a: Tensor, b: Tensor) -> Tensor:
    """a.x·b.y - a.y·b.x: the signed area of the parallelogram, positive where b is counter-clockwise of a.

    a, b (..., 2), broadcast; returns float64 (...), in squared units. Relative error at most 4·2^-53 even where the
    two products cancel, unless they underflow. Raises DataError for wrong shapes and coordinates out of range.
    Source: Kahan's difference of products, with Dekker's exact product.
    """
    a, b = _two(a, b)
    return _sum_of_products(a[..., 0], b[..., 1], -a[..., 1], b[..., 0])


def dot(a: Tensor, b: Tensor) -> Tensor:
    """a.x·b.x + a.y·b.y. Shapes, units, error and errors as `cross`."""
    a, b = _two(a, b)
    return _sum_of_products(a[..., 0], b[..., 0], a[..., 1], b[..., 1])


def angle(a: Tensor, b: Tensor) -> Tensor:
    """The signed angle from a to b in radians, in (-π, π]; 0 where either vector is zero.

    a, b (..., 2), broadcast; returns float64 (...). Error at most 8·2^-53 radians. Raises as `cross`.
    """
    a, b = _two(a, b)
    turn = _sum_of_products(a[..., 0], b[..., 1], -a[..., 1], b[..., 0])
    along = _sum_of_products(a[..., 0], b[..., 0], a[..., 1], b[..., 1])
    return torch.atan2(turn + 0.0, along + 0.0)  # + 0.0: opposite vectors give π, never -π, and zero ones 0


def _two(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = as_points(a, "vector", dims=1), as_points(b, "vector", dims=1)
    check_range(a, "vector")
    check_range(b, "vector")
    return a, b


def _sum_of_products(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """ab + cd."""
    (p, p_), (q, q_) = two_product(a, b), two_product(c, d)
    s, s_ = two_sum(p, q)
    return s + (s_ + (p_ + q_))
