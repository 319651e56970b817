"""Step sizes of stochastic approximation, and what is known of them as n goes to infinity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dovetail.errors import DataError


@dataclass(frozen=True)
class Order:
    """How a sequence falls: a_n is between two multiples of ratio^n · n^-power for large n. ratio 0: a_n = 0."""

    ratio: float
    power: float

    def times(self, other: Order, power: float = 1.0) -> Order:
        """Of a_n · b_n^power. Raises DataError where that divides by nothing but zeros."""
        if not other.ratio and power < 0:
            raise DataError("a sequence of zeros divides another", remedy="give one that is positive")
        return Order(self.ratio * other.ratio**power, self.power + power * other.power)

    @property
    def vanishes(self) -> bool:
        """a_n -> 0."""
        return self.ratio < 1 or (self.ratio == 1 and self.power > 0)

    @property
    def summable(self) -> bool:
        """Σ a_n < ∞: by the root test, or that of the hyperharmonic series where the ratio is 1."""
        return self.ratio < 1 or (self.ratio == 1 and self.power > 1)


@dataclass(frozen=True)
class Power:
    """a_n = scale / (n + shift)^power, n = 1, 2, ...; by default 1/n, whose mean is the arithmetic one.

    Raises DataError for a negative scale, a shift of -1 or less, or a number that is not finite.
    """

    scale: float = 1.0
    power: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.scale, self.power, self.shift))) or self.scale < 0 or self.shift <= -1:
            raise DataError(f"no step sizes: {self}", remedy="give a scale >= 0 and a shift > -1")

    def __call__(self, n: int) -> float:
        return self.scale / (n + self.shift) ** self.power

    @property
    def order(self) -> Order:
        return Order(1.0 if self.scale else 0.0, self.power)


def harmonic(scale: float = 1.0, shift: float = 0.0) -> Power:
    """a_n = scale / (n + shift)."""
    return Power(scale, 1.0, shift)


def constant(value: float) -> Power:
    """a_n = value: an exponential moving average forgets with it, and an iteration hovers about its root."""
    return Power(value, 0.0)


@dataclass(frozen=True)
class Geometric:
    """a_n = scale · ratio^n. Raises DataError for a negative scale or ratio."""

    scale: float
    ratio: float

    def __post_init__(self) -> None:
        if not (0 <= self.scale < math.inf and 0 <= self.ratio < math.inf):
            raise DataError(f"no step sizes: {self}", remedy="give a scale and a ratio >= 0")

    def __call__(self, n: int) -> float:
        return self.scale * self.ratio**n

    @property
    def order(self) -> Order:
        return Order(self.ratio if self.scale else 0.0, 0.0)


Steps = Callable[[int], float]  # n = 1, 2, ... -> a_n


@dataclass(frozen=True)
class Condition:
    """One condition of a theorem; holds is None where nobody can say."""

    text: str
    holds: bool | None


@dataclass(frozen=True)
class Verdict:
    """The conditions of a theorem on given sequences."""

    theorem: str
    conditions: tuple[Condition, ...]

    @property
    def holds(self) -> bool | None:
        """True: all hold. False: one fails. None: none is known to fail, and of one or more nothing is known."""
        found = [c.holds for c in self.conditions]
        return False if False in found else None if None in found else True

    def __str__(self) -> str:
        said = {True: "holds", False: "fails", None: "unknown: a function has no order; give a family"}
        return "\n".join([self.theorem, *(f"  {c.text}: {said[c.holds]}" for c in self.conditions)])


def robbins_monro_conditions(steps: Steps) -> Verdict:
    """Σ a_n = ∞ and Σ a_n² < ∞ (Robbins and Monro 1951; Blum 1954 for almost sure convergence).

    steps: n -> a_n. Decided by the order of `Power` (so `harmonic` and `constant`) and `Geometric`. No finite number
    of values decides it for any other function: unknown.
    """
    a = _order(steps)
    return Verdict(
        "Robbins and Monro 1951",
        (_said("Σ a_n = ∞", "infinite", a), _said("Σ a_n² < ∞", "finite", a and a.times(a))),
    )


def kiefer_wolfowitz_conditions(steps: Steps, widths: Steps) -> Verdict:
    """c_n -> 0, Σ a_n = ∞, Σ a_n c_n < ∞ and Σ a_n² / c_n² < ∞ (Kiefer and Wolfowitz 1952).

    steps, widths: n -> a_n and n -> c_n.
    """
    a, c = _order(steps), _order(widths)
    return Verdict(
        "Kiefer and Wolfowitz 1952",
        (
            _said("c_n -> 0", "vanishes", c),
            _said("Σ a_n = ∞", "infinite", a),
            _said("Σ a_n c_n < ∞", "finite", a and c and a.times(c)),
            _said("Σ a_n² / c_n² < ∞", "finite", a and c and a.times(a).times(c, -2.0)),
        ),
    )


def dvoretzky_conditions(alpha: Steps, beta: Steps, gamma: Steps, variance: Steps) -> Verdict:
    """Dvoretzky 1956, theorem 1: x_{n+1} = T_n(x_1, ..., x_n) + y_n converges to θ, almost surely and in mean square,
    if E[y_n | x_1, ..., x_n] = 0, |T_n - θ| <= max(α_n, (1 + β_n) |x_n - θ| - γ_n), and

        α_n -> 0,  Σ β_n < ∞,  Σ γ_n = ∞,  Σ E[y_n²] < ∞.

    These four are judged; that they bound T_n and y_n is the caller's to know. Robbins and Monro's iteration, on a
    function of slopes of at least m > 0, has any α_n -> 0 that is slow enough for Σ a_n α_n = ∞, with γ_n = m a_n α_n,
    β_n = 0 and a variance of the order of a_n².
    """
    orders = [_order(sequence) for sequence in (alpha, beta, gamma, variance)]
    texts = ("α_n -> 0", "Σ β_n < ∞", "Σ γ_n = ∞", "Σ E[y_n²] < ∞")
    asked: tuple[_Asked, ...] = ("vanishes", "finite", "infinite", "finite")
    return Verdict("Dvoretzky 1956", tuple(_said(*each) for each in zip(texts, asked, orders, strict=True)))


_Asked = Literal["vanishes", "finite", "infinite"]


def _said(text: str, asked: _Asked, order: Order | None) -> Condition:
    if order is None:
        return Condition(text, None)
    holds = {"vanishes": order.vanishes, "finite": order.summable, "infinite": not order.summable}
    return Condition(text, holds[asked])


def _order(steps: Steps) -> Order | None:
    return steps.order if isinstance(steps, (Power, Geometric)) else None
