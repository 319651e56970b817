"""The coefficient that holds a measured quantity at its target: a stochastic approximation that never ends."""

from __future__ import annotations

import math

from dovetail.errors import DataError


class AdaptiveKL:
    """The adaptive coefficient β of a KL penalty. Ziegler et al. 2019, section 2.2:

        e = clip((KL − target) / target, −0.2, 0.2),  β ← β (1 + gain · e)

    It is Robbins and Monro's iteration on log β with a constant step: where the measured KL is too large β grows. A
    constant step follows a policy that moves, and so hovers about the root. start: β at first. target: the KL to hold,
    in the units in which it is measured (nats a token, or a sequence). gain: K_β (0.1 in the paper). clip: the largest
    |e|. Raises DataError for numbers that are not positive, and a gain · clip of 1 or more, which could turn β's sign.
    """

    def __init__(self, start: float = 0.2, *, target: float, gain: float = 0.1, clip: float = 0.2):
        if not all(0 < value < math.inf for value in (start, target, gain, clip)) or gain * clip >= 1:
            raise DataError(
                f"start {start}, target {target}, gain {gain}, clip {clip}",
                where="AdaptiveKL",
                remedy="give positive numbers, gain times clip below 1",
            )
        self.coefficient, self.target, self.gain, self.clip = start, target, gain, clip

    def update(self, kl: float) -> float:
        """Takes in the KL of the newest batch; returns the coefficient for the next. An estimate may be negative.

        Raises DataError for one that is not finite.
        """
        if not math.isfinite(kl):
            raise DataError(f"a KL of {kl}", where="AdaptiveKL.update", remedy="look at the log-probabilities")
        error = min(self.clip, max(-self.clip, (kl - self.target) / self.target))
        self.coefficient *= 1 + self.gain * error
        return self.coefficient
