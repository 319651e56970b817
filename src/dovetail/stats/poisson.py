"""The Poisson process: arrivals that do not know of each other, at a rate that is constant or varies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.errors import DataError
from dovetail.stats.tails import chi_square_quantile, poisson_log_probability

MOST = 10**8  # arrivals that are drawn at once; beyond, a rate in the wrong unit is likelier than intent


@dataclass(frozen=True)
class Piecewise:
    """A rate in pieces: rates[k] per second for edges[k] <= t < edges[k+1], in seconds; 0 outside.

    edges: K+1 rising numbers. rates: K numbers >= 0. Raises DataError otherwise.
    """

    edges: tuple[float, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.edges, self.edges[1:]))
        finite = all(map(math.isfinite, (*self.edges, *self.rates)))
        if not self.rates or len(self.edges) != len(self.rates) + 1 or not rising or not finite or min(self.rates) < 0:
            raise DataError(f"no rate in pieces: {self}", remedy="give K+1 rising edges and K rates >= 0")

    def __call__(self, t: Tensor) -> Tensor:
        """Rates (N,) at the times t (N,)."""
        edges, rates = (torch.tensor(values, dtype=torch.float64) for values in (self.edges, self.rates))
        piece = torch.bucketize(t, edges, right=True) - 1
        inside = (piece >= 0) & (piece < len(rates))
        return torch.where(inside, rates[piece.clamp(0, len(rates) - 1)], 0.0)

    def integral(self, t: Tensor) -> Tensor:
        """∫ of the rate from the first edge to t (N,)."""
        edges, rates = (torch.tensor(values, dtype=torch.float64) for values in (self.edges, self.rates))
        time_in = (t[:, None] - edges[:-1]).clamp_min(0).minimum(edges.diff())
        return (time_in * rates).sum(-1)


class PoissonProcess:
    """rate: arrivals per second: a number; a `Piecewise`; or a function of times (N,) -> rates (N,), float64, with
    `bound`, a number that it never exceeds.

    Raises DataError for a rate that is negative or not finite, a bound that is not positive, or a function without one.
    Source: Kingman 1993, chapters 1 to 4; varying rates by thinning, Lewis and Shedler 1979.
    """

    def __init__(self, rate: float | Piecewise | Callable[[Tensor], Tensor], *, bound: float | None = None):
        if callable(rate) and not isinstance(rate, Piecewise):
            if bound is None or not 0 < bound < math.inf:
                raise DataError("a rate that varies needs a bound", where="bound", remedy="give its largest value")
        elif bound is not None:
            raise DataError("a bound beside a rate that has one", where="bound", remedy="leave it out")
        elif not callable(rate) and not 0 <= rate < math.inf:
            raise DataError(f"a rate of {rate}", where="rate", remedy="give arrivals per second, 0 or more")
        self.rate = rate
        if callable(rate):
            self.bound = max(rate.rates) if isinstance(rate, Piecewise) else float(bound or 0)
        else:
            self.bound = float(rate)

    def arrivals(self, duration: float, seed: int) -> Tensor:
        """Times (N,) of arrivals in [0, duration) seconds, rising, float64; the same for the same seed.

        Gaps are exponential; of a rate that varies, arrivals at the bound are kept with probability rate / bound.
        Raises DataError for a duration that is not positive, more than 10^8 arrivals on average, or a rate above the
        bound.
        """
        if not 0 < duration < math.inf:
            raise DataError(f"a duration of {duration} s", where="duration", remedy="give a positive number")
        expected = self.bound * duration
        if expected > MOST:
            raise DataError(f"{expected:.3g} arrivals at once", remedy="draw them in shorter spans, or lower the rate")
        if expected == 0:
            return torch.empty(0, dtype=torch.float64)
        rng = torch.Generator().manual_seed(seed)
        block = math.ceil(expected + 5 * math.sqrt(expected)) + 8
        times = torch.zeros(1, dtype=torch.float64)
        while times[-1] < duration:
            gaps = torch.empty(block, dtype=torch.float64).exponential_(self.bound, generator=rng)
            times = torch.cat([times, times[-1] + gaps.cumsum(0)])
        times = times[1 : int(torch.searchsorted(times, duration))]
        if not callable(self.rate):
            return times
        uniform = torch.rand(times.shape, dtype=torch.float64, generator=rng)
        return times[uniform * self.bound < self._rates(times)]

    def mean(self, times: Tensor) -> Tensor:
        """Expected arrivals from 0 to each of `times` (N,), rising: Λ(t) = ∫ rate, float64.

        Exact for numbers and `Piecewise`; a function is integrated by Gauss and Legendre's rule of 5 points over 1,024
        panels and the gaps between times, which is exact to rounding for smooth ones. Raises DataError for negative
        times.
        """
        times = times.double()
        if times.numel() and float(times.min()) < 0:
            raise DataError("a time before 0", where="times", remedy="subtract the start")
        if not callable(self.rate):
            return self.rate * times
        if isinstance(self.rate, Piecewise):
            return self.rate.integral(times) - self.rate.integral(torch.zeros(1, dtype=torch.float64))
        if not times.numel():
            return times
        panels = torch.linspace(0, float(times.max()), 1025, dtype=torch.float64)
        edges, order = torch.cat([times, panels]).sort()
        middle, half = (edges[1:] + edges[:-1]) / 2, edges.diff() / 2
        pieces = sum(w * self._rates(middle + half * x) for x, w in _GAUSS) * half
        whole = torch.cat([torch.zeros(1, dtype=torch.float64), pieces.cumsum(0)])
        return torch.empty_like(whole).scatter_(0, order, whole)[: len(times)]

    def _rates(self, times: Tensor) -> Tensor:
        """Rates (N,), judged. Raises DataError for one that is negative, above the bound or NaN, or another shape."""
        if not callable(self.rate):
            return torch.full_like(times, self.rate)
        rates = self.rate(times).double()
        if rates.shape != times.shape:
            raise DataError(
                f"rates of shape {tuple(rates.shape)} at times of shape {tuple(times.shape)}",
                remedy="return one for each",
            )
        bad = ~((rates >= 0) & (rates <= self.bound))
        if bool(bad.any()):
            raise DataError(
                f"a rate of {float(rates[bad][0])} at {float(times[bad][0])} s, outside of 0 to the bound {self.bound}",
                where="rate",
                remedy="raise the bound",
            )
        return rates

    def log_likelihood(self, times: Tensor, duration: float) -> float:
        """Σ log rate(t) − Λ(duration), of arrivals (N,) in [0, duration); −inf where one came at rate 0."""
        times = rising(times, 0.0, duration)
        end = torch.tensor([duration], dtype=torch.float64)
        return float(self._rates(times).log().sum() - self.mean(end)[0])

    def count_log_probability(self, counts: Tensor, edges: Tensor) -> Tensor:
        """log P of (K,) counts between (K+1,) edges, each: a Poisson of mean Λ(edge) − Λ(edge before)."""
        return poisson_log_probability(counts, self.mean(edges).diff())

    @staticmethod
    def fit(
        times: Tensor, duration: float | None = None, *, edges: Tensor | None = None, confidence: float = 0.95
    ) -> PoissonFit:
        """The process that fits best, of a constant rate or of one in pieces, with exact intervals of its rates.

        times: (N,) seconds, in any order. duration: they are all the arrivals of [0, duration), and the interval is
        Garwood's. edges: instead, (K+1,) rising times: a rate for each piece, and Garwood's interval for each. Neither:
        watched from the first arrival to the last, which both belong to the data; the rate is then N − 1 over that
        time, whose interval is that of a gamma variable. Raises DataError for arrivals outside, for fewer than 2 where
        there is no duration, a confidence outside of (0, 1). Source: Garwood 1936; Cox and Lewis 1966, chapters 2 and
        3.
        """
        if not 0 < confidence < 1:
            raise DataError(f"a confidence of {confidence}", where="confidence", remedy="give one as 0.95")
        if duration is not None and edges is not None:
            raise DataError("a duration and edges", remedy="give one: the last edge is the end")
        miss = (1 - confidence) / 2
        if duration is None and edges is None:
            times, _ = times.double().sort()
            if len(times) < 2 or not float(times[-1]) > float(times[0]):
                raise DataError(
                    "fewer than two arrivals at different times", remedy="say how long was watched: duration"
                )
            found, n = times[[0, -1]], torch.tensor([len(times) - 1], dtype=torch.float64)
            low, high = chi_square_quantile(miss, 2 * n) / 2, chi_square_quantile(1 - miss, 2 * n) / 2
        else:
            found = torch.tensor([0.0, duration], dtype=torch.float64) if edges is None else edges
            found = found.double()
            n = arrival_counts(times, found).double()
            low = chi_square_quantile(miss, 2 * n) / 2
            high = chi_square_quantile(1 - miss, 2 * n + 2) / 2
        span = found.diff()
        rates = n / span
        rate = float(rates[0]) if len(rates) == 1 else Piecewise(tuple(found.tolist()), tuple(rates.tolist()))
        return PoissonFit(PoissonProcess(rate), found, n.long(), rates, low / span, high / span, confidence)


@dataclass(frozen=True)
class PoissonFit:
    """process: what fits best. edges: (K+1,) seconds. counts: (K,) of arrivals (of gaps, where no duration was given).
    rates, low, high: (K,) per second, with the interval at the level `confidence`. A constant rate has K = 1."""

    process: PoissonProcess
    edges: Tensor
    counts: Tensor
    rates: Tensor
    low: Tensor
    high: Tensor
    confidence: float


def arrival_counts(times: Tensor, edges: Tensor) -> Tensor:
    """How many of the times (N,) fall into edges[k] <= t < edges[k+1]: (K,) int64, of (K+1,) rising edges.

    Raises DataError for edges that do not rise, and times outside of them.
    """
    edges = edges.double()
    if edges.ndim != 1 or len(edges) < 2 or not bool((edges.diff() > 0).all()) or not bool(edges.isfinite().all()):
        raise DataError("edges that do not rise", where="edges", remedy="give (K+1,) rising times")
    times = rising(times, float(edges[0]), float(edges[-1]))
    return torch.bincount(torch.bucketize(times, edges, right=True) - 1, minlength=len(edges) - 1)


def waiting_times(times: Tensor) -> Tensor:
    """Gaps (N−1,) between arrivals (N,), sorted first; of a constant rate, exponential. Raises DataError for NaN."""
    return rising(times, -math.inf, math.inf).diff()


def rising(times: Tensor, start: float, end: float) -> Tensor:
    """Times (N,) in order, float64. Raises DataError for a shape other than (N,), and times outside [start, end)."""
    if times.ndim != 1:
        raise DataError(f"times of shape {tuple(times.shape)}", where="times", remedy="give (N,)")
    times = times.detach().double().sort().values
    outside = ~((times >= start) & (times < end)) if math.isfinite(end) else ~times.isfinite()
    if bool(outside.any()):
        raise DataError(
            f"a time of {float(times[outside][0])} outside of [{start}, {end})", where="times",
            remedy="choose those within, or give the span in which all were seen",
        )  # fmt: skip
    return times


_GAUSS = (  # nodes and weights on [−1, 1], degree 9
    (0.0, 128 / 225),
    *((s * math.sqrt(5 - 2 * math.sqrt(10 / 7)) / 3, (322 + 13 * math.sqrt(70)) / 900) for s in (-1, 1)),
    *((s * math.sqrt(5 + 2 * math.sqrt(10 / 7)) / 3, (322 - 13 * math.sqrt(70)) / 900) for s in (-1, 1)),
)
