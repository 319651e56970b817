"""Stochastic approximation: the root of a function that is seen through noise, x ← x + a_n (target − noisy(x)).

The running mean is the simplest case (noisy(x) = x − a draw), stochastic gradient descent the best known one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch import Tensor

from dovetail.errors import DataError, RunError
from dovetail.stats.schedules import Steps

Noisy = Callable[[Tensor], Tensor]


class RunningMean:
    """mean ← mean + a_n (x − mean), without keeping what came.

    Without `steps`, a_n = 1/n and it is the arithmetic mean of all that came (of weighted values, a_n is the share that
    the newest has in the weight so far). With `steps`, n -> a_n of `dovetail.stats.schedules` or any function:
    `constant(0.1)` is an exponential moving average, whose first value is taken whole. Values are numbers or tensors of
    one shape, in float64 or their own type (float32 where that is narrower). Source: Robbins and Monro 1951; by groups,
    Chan, Golub and LeVeque 1979.
    """

    def __init__(self, steps: Steps | None = None):
        self.steps = steps
        self.updates = 0
        self.weight: Tensor | float = 0.0
        self._mean: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """So far; NaN while all that came was sums of none. Raises DataError before the first value."""
        if self._mean is None:
            raise DataError("nothing came yet, and nothing has no mean", remedy="call update first")
        return torch.where(torch.as_tensor(self.weight, device=self._mean.device) > 0, self._mean, torch.nan)

    def update(self, value: Tensor | float, weight: Tensor | float = 1.0) -> Tensor:
        """Takes one value in; returns the mean so far. weight: its share of the mean is in proportion to it.

        Raises DataError for a weight with `steps`, which say the share themselves, and for a value of another shape.
        """
        value = self._same(value)
        if self.steps is None:
            return self.update_sum(value * weight, weight)
        if not isinstance(weight, float) or weight != 1.0:
            raise DataError("a weight beside step sizes", where="RunningMean.update", remedy="give one or the other")
        self.updates += 1
        self.weight = self.weight + 1.0
        if self._mean is None:
            self._mean = value.clone()
        else:
            self._mean = self._mean + step_size(self.steps, self.updates) * (value - self._mean)
        return self.mean

    def update_sum(self, total: Tensor | float, number: Tensor | float) -> Tensor:
        """Takes in the sum of so many values at once (a batch); returns the mean so far. Of none, nothing changes.

        Raises DataError with `steps`, or for a sum of another shape.
        """
        if self.steps is not None:
            raise DataError("a sum beside step sizes", where="RunningMean.update_sum", remedy="give single values")
        total = self._same(total)
        self.updates += 1
        self.weight = self.weight + number
        before = torch.zeros_like(total) if self._mean is None else self._mean
        whole = torch.as_tensor(self.weight, dtype=total.dtype, device=total.device)
        share = torch.where(whole > 0, whole, 1)
        self._mean = before + (total - number * before) / share
        return self.mean

    def _same(self, value: Tensor | float) -> Tensor:
        value = _wide(value).detach()
        if self._mean is not None and value.shape != self._mean.shape:
            raise DataError(
                f"a value of shape {tuple(value.shape)} beside a mean of shape {tuple(self._mean.shape)}",
                remedy="keep a mean for each shape",
            )
        return value


@dataclass(frozen=True)
class Approximation:
    """What an iteration came to. last: x after the last step. average: the mean of x over the steps after `burn_in`
    (Polyak and Ruppert), which has the smallest variance that any step sizes reach, with steps larger than 1/n."""

    last: Tensor
    average: Tensor
    iterations: int


def iterates(gradient: Noisy, start: Tensor | float, steps: Steps) -> Iterator[Tensor]:
    """x_1, x_2, ... of x_n = x_{n−1} − a_n gradient(x_{n−1}), without end; each of them a tensor of its own.

    gradient: (...) -> (...), of the shape of `start`. Raises DataError for a step size that is negative or not finite,
    and a gradient of another shape; RunError where x ceases to be finite.
    """
    x = _wide(start).detach().clone()
    for n in count(1):
        seen = gradient(x)
        if seen.shape != x.shape:
            raise DataError(
                f"what was seen has shape {tuple(seen.shape)}, x {tuple(x.shape)}",
                remedy="return one value for each entry of x",
            )
        x = x - step_size(steps, n) * seen.detach()
        if not bool(x.isfinite().all()):
            raise RunError(
                f"x ceased to be finite at step {n}", remedy="take smaller steps, or larger shifts in their family"
            )
        yield x


def robbins_monro(
    noisy: Noisy,
    target: Tensor | float,
    start: Tensor | float,
    steps: Steps,
    *,
    iterations: int = 1000,
    burn_in: int = 0,
) -> Approximation:
    """The x at which the mean of noisy(x) is `target`: x_n = x_{n−1} + a_n (target − noisy(x_{n−1})).

    noisy: x (...) -> (...), a draw whose mean rises with x (negate it, and the target, where it falls); each entry is a
    problem of its own, or together they are a gradient. start: (...). steps: n -> a_n; `robbins_monro_conditions` says
    whether they lead to the root. burn_in: steps that the average leaves out. Raises DataError for counts that leave
    nothing to average, and what `iterates` raises. Source: Robbins and Monro 1951, Polyak and Juditsky
    1992.
    """
    goal = _wide(target)
    return run(iterates(lambda x: noisy(x) - goal.to(x), start, steps), iterations=iterations, burn_in=burn_in)


def sgd(
    gradient: Noisy, start: Tensor | float, steps: Steps, *, iterations: int = 1000, burn_in: int = 0
) -> Approximation:
    """Stochastic gradient descent: Robbins and Monro's search for the root 0 of the mean gradient.

    gradient: x (...) -> (...), a draw of the gradient at x. The rest is as in `robbins_monro`, which this calls.
    """
    return robbins_monro(gradient, 0.0, start, steps, iterations=iterations, burn_in=burn_in)


def kiefer_wolfowitz(
    noisy: Noisy,
    start: Tensor | float,
    steps: Steps,
    widths: Steps,
    *,
    iterations: int = 1000,
    burn_in: int = 0,
) -> Approximation:
    """The x at which the mean of noisy(x) is smallest, from values alone:

        x ← x − a_n (noisy(x + c_n) − noisy(x − c_n)) / 2 c_n

    noisy: x (d,) -> (), a draw of the function at x (negate it for the largest); of d entries each is moved in turn, so
    that a step has 2d draws. start: () or (d,). widths: n -> c_n > 0; `kiefer_wolfowitz_conditions` judges both; a
    usual choice is harmonic() and Power(power=1/4). Raises DataError as `robbins_monro`. Source: Kiefer and Wolfowitz
    1952; several entries Blum 1954.
    """
    turns = iter(range(1, iterations + 1))

    def slope(x: Tensor) -> Tensor:
        c = step_size(widths, next(turns))
        if c == 0:
            raise DataError("a difference over no width", where="widths", remedy="give positive widths")
        moved = c * torch.eye(x.numel(), dtype=x.dtype, device=x.device)
        pairs = [(noisy((x.flatten() + e).view_as(x)), noisy((x.flatten() - e).view_as(x))) for e in moved]
        return torch.stack([(up - down) / (2 * c) for up, down in pairs]).view_as(x)

    return run(iterates(slope, start, steps), iterations=iterations, burn_in=burn_in)


def run(path: Iterator[Tensor], *, iterations: int, burn_in: int = 0) -> Approximation:
    """Takes `iterations` steps of a path and averages those after the first `burn_in` (Polyak-Ruppert).

    Raises DataError unless 0 <= burn_in < iterations.
    """
    if not 0 <= burn_in < iterations:
        raise DataError(
            f"{iterations} iterations of which {burn_in} are left out", remedy="leave at least one to average"
        )
    average, last = RunningMean(), torch.empty(0)
    for n, last in enumerate(islice(path, iterations)):
        if n >= burn_in:
            average.update(last)
    return Approximation(last, average.mean, iterations)


def step_size(steps: Steps, n: int) -> float:
    """a_n. Raises DataError for one that is negative or not finite."""
    size = float(steps(n))
    if not 0 <= size < math.inf:
        raise DataError(f"step size {n} is {size}", where="steps", remedy="give finite numbers that are not negative")
    return size


def _wide(x: Tensor | float) -> Tensor:
    """Numbers and integers as float64, halves as float32."""
    if not isinstance(x, Tensor):
        return torch.tensor(x, dtype=torch.float64)
    if not x.is_floating_point():
        return x.double()
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
