"""Orientation of three points with the right sign for every float64 input: a filter, then exact arithmetic.

Shewchuk 1997, "Adaptive precision floating-point arithmetic and fast robust geometric predicates": the determinant is
evaluated in float64; where it is smaller than the bound of its own rounding error it is evaluated again as an exact
sum of float64 components (an expansion), and where even those would underflow, in rational numbers.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from dovetail.geometry.batch import EPS, as_points, check_range

_FILTER = (3 + 16 * EPS) * EPS  # Shewchuk's ccwerrboundA
_TINY = 2.0**-1060  # more than underflow can take from the filter's products
_SMALLEST = 2.0**-480  # components at least this large multiply without underflow of the error term


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(s, e): s = fl(a + b) and a + b = s + e exactly (Knuth)."""
    s = a + b
    c = s - a
    return s, (a - (s - c)) + (b - c)


def two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(p, e): p = fl(ab) and ab = p + e exactly, unless e underflows (Dekker, Veltkamp's split)."""
    p = a * b
    ca, cb = 134217729.0 * a, 134217729.0 * b
    ah, bh = ca - (ca - a), cb - (cb - b)
    al, bl = a - ah, b - bh
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def orientation(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Which way a -> b -> c turns: 1 to the left (counter-clockwise, y upwards), -1 to the right, 0 collinear.

    a, b, c (..., 2), broadcast together; returns int8 (...). The sign is exact for every input: tolerance none.
    Raises DataError for shapes that do not end in 2 and coordinates out of range. Source: Shewchuk 1997.
    """
    return _orientation(*_three(a, b, c))


def doubled_area(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Twice the signed area of the triangles abc, positive where counter-clockwise. Squared units of the coordinates.

    a, b, c (..., 2), broadcast together; returns float64 (...). Relative error at most 4·2^-53 whatever cancels; zero
    exactly where the points are collinear (or where the area is below the smallest float64). Raises as `orientation`.
    """
    return _doubled_area(*_three(a, b, c))


def _three(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    points = [as_points(p, "orientation", dims=1) for p in (a, b, c)]
    for p in points:
        check_range(p, "orientation")
    return points


def _orientation(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`orientation` of checked float64 points."""
    acx, acy, bcx, bcy = a[..., 0] - c[..., 0], a[..., 1] - c[..., 1], b[..., 0] - c[..., 0], b[..., 1] - c[..., 1]
    left, right = acx * bcy, acy * bcx
    det = left - right
    sign = det.sign().to(torch.int8)
    doubtful = det.abs() <= _FILTER * (left.abs() + right.abs()) + _TINY
    doubtful &= ~(((acx == 0) | (bcy == 0)) & ((acy == 0) | (bcx == 0)))  # zero for certain, as on axis-parallel sides
    if bool(doubtful.any()):
        sign[doubtful] = _exact(*_chosen(a, b, c, doubtful))[0]
    return sign


def _doubled_area(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`doubled_area` of checked float64 points: in twice float64's precision first, which is nearly always enough."""
    (acx, acx_), (acy, acy_) = (two_sum(a[..., i], -c[..., i]) for i in (0, 1))
    (bcx, bcx_), (bcy, bcy_) = (two_sum(b[..., i], -c[..., i]) for i in (0, 1))
    (left, left_), (right, right_) = two_product(acx, bcy), two_product(acy, bcx)
    det, det_ = two_sum(left, -right)
    det = det + (det_ + ((left_ - right_) + ((acx * bcy_ + acx_ * bcy) - (acy * bcx_ + acy_ * bcx))))
    doubtful = det.abs() <= 16 * EPS * (left.abs() + right.abs()) + 2.0**-960
    doubtful &= ~(((acx == 0) | (bcy == 0)) & ((acy == 0) | (bcx == 0)))
    if bool(doubtful.any()):
        det = det.masked_scatter(doubtful, _exact(*_chosen(a, b, c, doubtful))[1])
    return det


def _chosen(a: Tensor, b: Tensor, c: Tensor, which: Tensor) -> list[Tensor]:
    return [p.expand(*which.shape, 2)[which] for p in (a, b, c)]


def _exact(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """(sign int8 (K,), value (K,) rounded) of the determinants of points (K, 2)."""
    value = a.new_zeros(a.shape[0])
    sign = torch.zeros_like(value, dtype=torch.int8)
    rest = ((a != b).any(-1)).nonzero()[:, 0]  # padding repeats points: a = b is collinear at no cost
    if not rest.numel():
        return sign, value
    a, b, c = a[rest], b[rest], c[rest]
    factors = [two_sum(p[:, i], -c[:, i]) for p, i in ((a, 0), (b, 1), (a, 1), (b, 0))]
    parts = torch.stack([part for factor in factors for part in factor])
    if bool(((parts != 0) & (parts.abs() < _SMALLEST)).any()):
        exact = [_rational(*row) for row in torch.cat([a, b, c], -1).tolist()]
        signs = torch.tensor([(d > 0) - (d < 0) for d in exact], dtype=torch.int8, device=sign.device)
        values = value.new_tensor([float(d) for d in exact])
    else:
        (acx, bcy, acy, bcx) = factors
        values = _expansion(
            [part for p in acx for q in bcy for part in two_product(p, q)]
            + [-part for p in acy for q in bcx for part in two_product(p, q)]
        )
        signs = values.sign().to(torch.int8)
    sign[rest], value = signs, value.index_copy(0, rest, values)
    return sign, value


def _expansion(terms: list[Tensor]) -> Tensor:
    """The exact sum of the terms, rounded once from its non-overlapping components (Shewchuk's GROW-EXPANSION)."""
    components: list[Tensor] = []
    for term in terms:
        if not bool((term != 0).any()):
            continue
        grown = []
        for component in components:
            term, low = two_sum(term, component)
            grown.append(low)
        components = [*grown, term]
    total = torch.zeros_like(terms[0])
    for component in components:  # from the smallest: the largest decides the sign
        total = total + component
    return total


def _rational(ax: float, ay: float, bx: float, by: float, cx: float, cy: float) -> Fraction:
    x, y = Fraction(cx), Fraction(cy)
    return (Fraction(ax) - x) * (Fraction(by) - y) - (Fraction(ay) - y) * (Fraction(bx) - x)
