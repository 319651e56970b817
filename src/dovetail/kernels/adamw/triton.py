"""AdamW's step on a GPU: one launch a tensor, one pass, all in fp32 between a read and a write.

Counted for the 1.236e9 parameters of Llama-3.2-1B's shape on one H200 (4.05 TB/s for copies): 14 bytes a parameter in
bf16, 17.3 GB, 4.3 ms; 28 in fp32, 8.5 ms. Its 65 large tensors are 65 launches; the smallest takes 15 µs, about as
long as its launch does on the host.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.kernels.chunks import ceil_div

TILE, WARPS = 1024, 4  # entries of one program: a thread reads 16 bytes at once of each tensor of 16-bit numbers


def step_(
    row: Any, lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float, divisor: Tensor | None
) -> None:
    """row: kernels.adamw.Row, contiguous tensors of one device. Its count is that with this step."""
    weight = row.weight
    stored = isinstance(lr, Tensor) and (lr.device == weight.device or lr.device.type != "cpu")
    rate = lr.to(weight.device, non_blocking=True) if stored else float(lr)  # type: ignore[union-attr]
    if divisor is not None:
        divisor = divisor.to(weight.device, non_blocking=True)
    logs = (math.log(beta) if beta else -math.inf for beta in betas)
    size = weight.numel()
    kernel: Any = _step
    with torch.cuda.device_of(weight):
        kernel[(ceil_div(size, TILE),)](
            *row, rate, divisor if divisor is not None else row.count, size, *(1.0 - beta for beta in betas), *logs,
            float(eps), float(weight_decay), stored, divisor is not None, TILE, num_warps=WARPS,
        )  # fmt: skip


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    weight, gradient, exp_avg, exp_avg_sq, count, lr, divisor, size, rest_1, rest_2, log_1, log_2, eps, decay,
    STORED: tl.constexpr, DIVIDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """rest, log: 1 - β and ln β. STORED: lr lies in memory."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < size
    x = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32)
    steps = tl.load(count).to(tl.float32)
    rate = tl.load(lr).to(tl.float32) if STORED else lr
    if DIVIDED:
        g *= 1.0 / tl.load(divisor).to(tl.float32)
    # By the difference, for β and 1 - β, each rounded to fp32, do not add up to one: with β = 0.999 v would go 1e-5 off.
    m += rest_1 * (g - m)
    v = tl.where(v == float("inf"), v, v + rest_2 * (g * g - v))
    step = rate / _less_exp(steps * log_1)
    root = tl.sqrt(v) * (1.0 / tl.sqrt(_less_exp(steps * log_2)))
    x = x - rate * decay * x - step * m / (root + eps)
    tl.store(weight + at, x.to(weight.dtype.element_ty), mask=inside)
    tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=inside)


@triton.jit
def _less_exp(x):  # type: ignore[no-untyped-def]
    """1 - eˣ for x <= 0, to fp32's relative accuracy: near 0 by its series, where the difference would lose it."""
    near = tl.maximum(x, -0.5)
    series = 1.0 + near * 0.1
    for i in tl.static_range(9, 1, -1):  # type: ignore[attr-defined]
        series = 1.0 + near * (1.0 / i) * series
    return tl.where(x > -0.5, -near * series, 1.0 - tl.exp(x))
