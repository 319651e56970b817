"""The smallest circle that holds a set of points."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dovetail.geometry.batch import padded, take, unit


class Circle(NamedTuple):
    """center (..., 2) and radius (...,)."""

    center: Tensor
    radius: Tensor


def smallest_circle(points: Tensor, count: Tensor | None = None) -> Circle:
    """The smallest circle that holds a set, (..., N, 2) -> `Circle`; deterministic.

    Two or three of the points carry it. While a point lies outside the circle that is carried so far, the farthest one
    joins, and the smallest circle of these at most four points is found by trying every two and three of them. The
    radius grows at each turn, so that it ends; in practice after about ten turns of O(N), all rows at once.

    Error: the radius is at most 32·2^-53 relative above the least one plus the rounding of the center's coordinates
    (2^-52 times their magnitude), and at least the distance of every point from
    the center as float64 computes it. The center is only as well decided as that allows: moving it by d adds no more
    than d² / 2r, so that 2^-23·r are within the error. A single point has radius 0.
    Raises DataError for wrong shapes, empty rows and coordinates out of range.
    Source: Welzl 1991 (the basis and its update); Gärtner 1999 (the farthest point as pivot).
    """
    given = padded(points, count, "point set")
    lead = given.count.shape
    p, origin, scale = unit(given.points.detach().reshape(-1, *given.points.shape[-2:]))
    R = p.shape[0]
    basis = torch.zeros(R, 3, dtype=torch.int64, device=p.device)
    center, radius2 = p[:, 0].clone(), torch.zeros(R, dtype=p.dtype, device=p.device)
    going = torch.arange(R, device=p.device)
    while going.numel():
        distance2, far = ((p[going] - center[going, None]) ** 2).sum(-1).max(-1)
        out = distance2 > radius2[going]
        going, far = going[out], far[out]
        four = torch.cat([basis[going], far[:, None]], -1)
        new_center, new_radius2, new_basis = _of_four(take(p[going], four))
        grows = new_radius2 > radius2[going]  # else rounding alone keeps the point outside
        going = going[grows]
        center[going], radius2[going] = new_center[grows], new_radius2[grows]
        basis[going] = four[grows].gather(1, new_basis[grows])
    center = center * scale[:, None] + origin
    whole = given.points.detach().reshape(-1, *given.points.shape[-2:])
    radius = torch.hypot(*(whole - center[:, None]).unbind(-1)).amax(-1)
    return Circle(center.reshape(*lead, 2), radius.reshape(lead))


_SUPPORTS = ((0, 3, 3), (1, 3, 3), (2, 3, 3), (0, 1, 3), (0, 2, 3), (1, 2, 3))  # the new point, 3, always carries


def _of_four(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(center (K, 2), radius² (K,), support (K, 3)) of points (K, 4, 2), of which the last is on the circle.

    Each two and three of them give a center; the one from which the farthest of the four is nearest is the center of
    the smallest circle. So no tolerance decides, and a center from points almost on a line loses by itself.
    """
    support = torch.tensor(_SUPPORTS, device=p.device)
    a, b, c = p[:, support].unbind(2)  # (K, 6, 2)
    ab, ac = b - a, c - a
    doubled = 2 * (ab[..., 0] * ac[..., 1] - ab[..., 1] * ac[..., 0])
    ab2, ac2 = (ab**2).sum(-1), (ac**2).sum(-1)
    middle = torch.stack([ac[..., 1] * ab2 - ab[..., 1] * ac2, ab[..., 0] * ac2 - ac[..., 0] * ab2], -1)
    three = a + middle / torch.where(doubled == 0, 1.0, doubled)[..., None]
    pairs = torch.arange(6, device=p.device) < 3
    center = torch.where(pairs[:, None], (a + b) / 2, three)
    reach = ((center[:, :, None] - p[:, None]) ** 2).sum(-1).amax(-1)
    reach = torch.where((~pairs & (doubled == 0)) | ~torch.isfinite(reach), torch.inf, reach)
    radius2, best = reach.min(-1)
    each = torch.arange(p.shape[0], device=p.device)
    return center[each, best], radius2, support[best]
