"""The plain twin: AdamW's step as the formula says."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def step_(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    count: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    divisor: Tensor | None = None,
) -> None:
    """In place, in fp32 or wider, each number rounded once. count: () how many steps were taken with this one."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    x, g, m, v = (t.to(wide) for t in (weight, gradient, exp_avg, exp_avg_sq))
    if divisor is not None:
        g = g / divisor
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    unbiased_m, unbiased_v = (t / (1 - beta ** count.double()).to(wide) for t, beta in zip((m, v), betas, strict=True))
    x = x - lr * weight_decay * x - lr * unbiased_m / (unbiased_v.sqrt() + eps)
    for into, made in ((weight, x), (exp_avg, m), (exp_avg_sq, v)):
        into.copy_(made)
