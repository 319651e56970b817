"""Learning rates as functions of the step alone, so that nothing has to be saved to resume them."""

from __future__ import annotations

import math


def factor(schedule: str, step: int, steps: int, *, warmup: int = 0, decay: float = 0.2, final: float = 0.1) -> float:
    """The share of the peak rate at `step` (0-based) of `steps`.

    Rises linearly over `warmup` steps (the first is 1/warmup, never 0), then: "constant" stays; "linear" falls to
    `final` at the last step; "cosine" does so along half a cosine (Loshchilov and Hutter 2016, eq. 5, one cycle);
    "wsd" stays and falls linearly in the last `decay` share of the steps (Hu et al. 2024, MiniCPM, section 4).
    """
    if step < warmup:
        return (step + 1) / warmup
    last = max(1, steps - 1)
    if schedule == "constant":
        return 1.0
    if schedule == "wsd":
        start = max(warmup, round(steps * (1 - decay)))
        gone = 0.0 if step < start else (step - start + 1) / max(1, steps - start)
        return 1.0 - (1.0 - final) * min(1.0, gone)
    gone = min(1.0, (step - warmup) / max(1, last - warmup))
    if schedule == "linear":
        return 1.0 - (1.0 - final) * gone
    if schedule == "cosine":
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * gone))
    raise ValueError(f"no schedule {schedule!r}")
