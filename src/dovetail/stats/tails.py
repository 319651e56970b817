"""Distributions that the tests and intervals of counts need, in float64 on torch.special."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dovetail.errors import DataError


def chi_square_cdf(x: Tensor | float, degrees: Tensor | float) -> Tensor:
    """P(X <= x) of a chi-square: the regularised lower incomplete gamma function at (degrees / 2, x / 2)."""
    return torch.special.gammainc(_double(degrees) / 2, _double(x) / 2)


def chi_square_tail(x: Tensor | float, degrees: Tensor | float) -> Tensor:
    """P(X > x) of a chi-square, exact where it is tiny too."""
    return torch.special.gammaincc(_double(degrees) / 2, _double(x) / 2)


def chi_square_quantile(p: Tensor | float, degrees: Tensor | float) -> Tensor:
    """The x with P(X <= x) = p, to a few last bits of float64. p and degrees: shapes that broadcast.

    Newton's method on the logarithm of the smaller tail against log x, within a bracket. 0 for 0 degrees, of which all
    weight is there, and for an x below 1e-300. Raises DataError unless 0 < p < 1 and degrees >= 0.
    """
    chance, degrees = _double(p), _double(degrees)
    if not bool(((chance > 0) & (chance < 1)).all()) or not bool(((degrees >= 0) & degrees.isfinite()).all()):
        raise DataError("a quantile outside of 0 < p < 1, or degrees of freedom below 0", where="chi_square_quantile")
    half = degrees.clamp_min(1e-300) / 2
    lower = chance < 0.5
    goal = torch.where(lower, chance, 1 - chance).log()
    low, high = torch.tensor(-700.0, dtype=torch.float64), (2 * half + 100 * half.sqrt() + 1500).log()
    # Where both are small P(X <= x) = (x/2)^half / Γ(half + 1); else from the middle.
    u = torch.where(half < 1, (chance.log() + torch.lgamma(half + 1)) / half + math.log(2), (2 * half).log())
    for _ in range(100):
        u = u.clamp(low, high)
        y = u.exp() / 2
        tail = torch.where(lower, torch.special.gammainc(half, y), torch.special.gammaincc(half, y)).log()
        short = torch.where(lower, tail < goal, tail > goal)  # x is too small
        low, high = torch.where(short, u, low), torch.where(short, high, u)
        density = (half * y.log() - y - torch.lgamma(half) - tail).exp()  # of log x, over the tail
        after = u + torch.where(lower, goal - tail, tail - goal) / density
        after = torch.where((after > low) & (after < high), after, (low + high) / 2)
        done, u = (after - u).abs() <= 1e-15 * (1 + u.abs()), after
        if bool(done.all()):
            break
    return torch.where((degrees == 0) | (u <= -690), 0.0, u.exp())


def poisson_log_probability(counts: Tensor, mean: Tensor | float) -> Tensor:
    """log P(N = n) of a Poisson: n log mean − mean − log n!; −inf for n > 0 of mean 0."""
    n, mean = _double(counts), _double(mean)
    return torch.special.xlogy(n, mean) - mean - torch.lgamma(n + 1)


def poisson_tail(counts: Tensor | float, mean: Tensor | float) -> Tensor:
    """P(N >= n) of a Poisson."""
    n = _double(counts)
    return torch.where(n <= 0, 1.0, torch.special.gammainc(n.clamp_min(1), _double(mean)))


def kolmogorov_tail(distance: float, n: int) -> float:
    """P(D_n > distance) of Kolmogorov's two-sided statistic of n uniforms.

    Up to n · distance = 200 by the exact recursion over matrices of Marsaglia, Tsang and Wang 2003 (errors of 1e-11);
    beyond, by the limit at √n d + 1/(6√n) + (√n d − 1)/4n (Vrbik 2018), which is off by less than 1e-5 there.
    """
    if distance <= 0.5 / n:
        return 1.0
    if distance >= 1:
        return 0.0
    if n * distance > 200:
        root = math.sqrt(n)
        return _limit(root * distance + 1 / (6 * root) + (root * distance - 1) / (4 * n))
    return min(1.0, max(0.0, 1 - _matrix(distance, n)))


def _limit(x: float) -> float:
    """1 − K(x) of Kolmogorov's limit, by the series of either that converges quickly."""
    if x <= 0:
        return 1.0
    if x < 1:
        odd = sum(math.exp(-((2 * k - 1) ** 2) * math.pi**2 / (8 * x * x)) for k in range(1, 20))
        return 1 - math.sqrt(2 * math.pi) / x * odd
    return 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 20))


def _matrix(distance: float, n: int) -> float:
    """P(D_n < distance): n!/n^n times the middle entry of H^n, with H of Marsaglia et al."""
    k = int(n * distance) + 1
    m, h = 2 * k - 1, k - n * distance
    i = torch.arange(m, dtype=torch.float64)
    ones = (i[:, None] - i[None] + 1 >= 0).double()
    powers = h ** (i + 1)
    ones[:, 0] -= powers
    ones[-1] -= powers.flip(0)
    ones[-1, 0] += max(0.0, 2 * h - 1) ** m
    matrix = ones * torch.exp(-torch.lgamma((i[:, None] - i[None] + 2).clamp_min(1)))
    result, square, left = torch.eye(m, dtype=torch.float64), matrix, n
    scale, scale_square = 0.0, 0.0  # logarithms, so that nothing overflows
    while left:
        if left & 1:
            result, scale = result @ square, scale + scale_square
            largest = float(result.abs().max())
            result, scale = result / largest, scale + math.log(largest)
        square, scale_square, left = square @ square, 2 * scale_square, left >> 1
        largest = float(square.abs().max())
        square, scale_square = square / largest, scale_square + math.log(largest)
    middle = float(result[k - 1, k - 1])
    return middle * math.exp(scale + math.lgamma(n + 1) - n * math.log(n)) if middle > 0 else 0.0


def _double(x: Tensor | float) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)
