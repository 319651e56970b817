"""Were these arrivals a Poisson process? Tests of dispersion, of times and of counts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.errors import DataError
from dovetail.stats.poisson import PoissonProcess, rising
from dovetail.stats.tails import (
    chi_square_cdf,
    chi_square_tail,
    kolmogorov_tail,
    poisson_log_probability,
    poisson_tail,
)


@dataclass(frozen=True)
class Goodness:
    """statistic: what was measured. p: the chance of one as extreme or more, were it a Poisson process. degrees: of
    freedom, of a chi-square."""

    statistic: float
    p: float
    degrees: int | None = None


def dispersion_test(counts: Tensor) -> Goodness:
    """Σ (n_k − n̄)² / n̄ of counts (K,) over equal spans, against a chi-square of K − 1 degrees; two-sided.

    Over K − 1 it is the index of dispersion: above 1 arrivals come in bunches, below 1 they keep apart. The
    approximation wants n̄ above about 5. Raises DataError for fewer than 2 counts, or none but zeros.
    Source: Fisher, Thornton and Mackenzie 1922; Cox and Lewis 1966, section 6.3.
    """
    n = _counts(counts)
    mean = n.mean()
    value, degrees = float(((n - mean) ** 2).sum() / mean), len(n) - 1
    p = 2 * min(float(chi_square_cdf(value, degrees)), float(chi_square_tail(value, degrees)))
    return Goodness(value, min(1.0, p), degrees)


def times_test(times: Tensor, duration: float | None = None, process: PoissonProcess | None = None) -> Goodness:
    """Kolmogorov and Smirnov's distance of the times to the process: given how many came, Λ(t) / Λ(duration) are
    uniform.

    times: (N,) of [0, duration) seconds; without a duration those between the first and the last are tested. process:
    whose Λ it is (a constant rate of any size unless given). It sees a rate that drifts, and is weak against bunches:
    see `dispersion_test`. The distribution is exact (`kolmogorov_tail`). Raises DataError for no times, those outside,
    or a process without arrivals. Source: Cox and Lewis 1966, section 6.2; varying rates Brown et al. 2002.
    """
    if duration is None:
        if process is not None:
            raise DataError("a process without a duration", remedy="say how long was watched: duration")
        times = rising(times, -math.inf, math.inf)
        if len(times) < 3 or not float(times[-1]) > float(times[0]):
            raise DataError("fewer than three arrivals", where="times", remedy="give more, or a duration")
        u = (times[1:-1] - times[0]) / (times[-1] - times[0])
    else:
        times = rising(times, 0.0, duration)
        process = process or PoissonProcess(1.0)
        mass = process.mean(torch.cat([times, torch.tensor([duration], dtype=torch.float64)]))
        if not len(times) or not float(mass[-1]) > 0:
            raise DataError("no arrivals, or a process without any", remedy="give a longer span")
        u = mass[:-1] / mass[-1]
    n = len(u)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = float(torch.maximum(steps[1:] - u, u - steps[:-1]).max())
    return Goodness(distance, kolmogorov_tail(distance, n))


def counts_test(counts: Tensor, mean: float | None = None, *, least: float = 5.0) -> Goodness:
    """Pearson's chi-square of how often each count was seen in equal spans, against a Poisson.

    counts: (K,). mean: of the Poisson; estimated where not given, which costs one degree. Neighbouring counts are
    joined until each class is expected `least` times. Raises DataError where fewer classes remain than it needs: more
    spans, or longer ones. Source: Cochran 1954.
    """
    n = _counts(counts)
    average = float(n.mean()) if mean is None else mean
    if not 0 < average < math.inf:
        raise DataError(f"a mean of {average}", where="mean", remedy="give a positive number")
    top = int(n.max())
    values = torch.arange(top + 1, dtype=torch.float64)
    expected = poisson_log_probability(values, average).exp() * len(n)
    expected[-1] = poisson_tail(top, average) * len(n)  # the last class has no end
    seen = torch.bincount(n.long(), minlength=top + 1).double()
    classes: list[tuple[float, float]] = []
    waiting = (0.0, 0.0)
    for pair in zip(seen.tolist(), expected.tolist(), strict=True):
        waiting = (waiting[0] + pair[0], waiting[1] + pair[1])
        if waiting[1] >= least:
            classes.append(waiting)
            waiting = (0.0, 0.0)
    if classes:
        classes[-1] = (classes[-1][0] + waiting[0], classes[-1][1] + waiting[1])
    degrees = len(classes) - 1 - (mean is None)
    if degrees < 1:
        raise DataError(
            f"{len(classes)} classes of counts are too few to test",
            where="counts",
            remedy="take more spans, or longer ones",
        )
    value = sum((a - b) ** 2 / b for a, b in classes)
    return Goodness(value, float(chi_square_tail(value, degrees)), degrees)


def _counts(counts: Tensor) -> Tensor:
    n = counts.detach().double()
    if n.ndim != 1 or len(n) < 2 or not bool((n >= 0).all()) or bool((n != n.round()).any()) or not float(n.sum()) > 0:
        raise DataError("no counts", where="counts", remedy="give (K,) whole numbers, two or more, not all 0")
    return n
