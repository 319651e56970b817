"""AdamW's step (Loshchilov and Hutter 2017, algorithm 2), in place: one pass over weights, gradients and both moments.

On CUDA a large tensor has a launch of its own, which reads four numbers an entry and writes three. Nothing is read on
the host, so that a CUDA graph can hold it: the count of steps, and the rate where it is a tensor, are read from memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dovetail.kernels import twins
from dovetail.kernels.adamw import reference
from dovetail.kernels.counted import device_type
from dovetail.kernels.installed import TRITON
from dovetail.kernels.plan import Plan

LEAST = 2**16  # entries; what is smaller is cheaper together, as torch's fused step has it
_UNIT = 16  # of which sizes are multiples, so that 16 bytes are read at once
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TYPES = (Tensor, nn.Parameter)  # and not what only looks like one: a share of one, or a fake one


class Row(NamedTuple):
    """A weight and what torch.optim.AdamW keeps of it. count: () fp32, how many steps were taken."""

    weight: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    count: Tensor


@torch.no_grad()
def step_(
    rows: Sequence[Row],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    divisor: Tensor | None = None,
) -> list[Row]:
    """Takes a step with those of `rows` that the kernel serves, counts it, and returns the others, untouched.

    It computes in fp32 and rounds each number that it writes once; gradients are divided by `divisor` () as they are
    read, and stay as they are. Served are fp32, bf16 and fp16, contiguous, of LEAST entries or more, the gradient in the
    type of its weight.
    """
    served, others = [], []
    for row in rows:
        (served if _serves(row) else others).append(row)
    if served:
        from dovetail.kernels.adamw import triton

        torch._foreach_add_([row.count for row in served], 1)
        for row in served:
            triton.step_(row, lr, betas, eps, weight_decay, divisor)
        torch.autograd.graph.increment_version([row.weight for row in served])
    return others


def plan(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Plan:
    """The path of large tensors and why. "plain": as torch.optim.AdamW takes it."""
    if twins.asked():
        return Plan("plain", twins.WHY)
    if device != "cuda":
        return Plan("plain", "not on CUDA: torch's own step")
    if not TRITON or dtype not in _DTYPES:
        return Plan("plain", f"{dtype if TRITON else 'Triton is not installed'}: torch's own step")
    return Plan("triton", "on CUDA: a pass for each large tensor, the small ones together in torch's own")


def serves(weight: Tensor, gradient: Tensor) -> bool:
    """Whether the kernel steps a weight, given moments that lie as it does."""
    size, device = weight.numel(), weight.device
    if size < LEAST or size % _UNIT or gradient.dtype != weight.dtype:
        return False
    if plan(device_type(weight), weight.dtype).path != "triton":
        return False
    return all(_plain(t, device) for t in (weight, gradient))


def _serves(row: Row) -> bool:
    device = row.weight.device
    if not serves(row.weight, row.gradient) or row.count.device != device:
        return False
    return all(_plain(t, device) for t in (row.exp_avg, row.exp_avg_sq))


def _plain(t: Tensor, device: torch.device) -> bool:
    return type(t) in _TYPES and t.device == device and t.dtype in _DTYPES and t.is_contiguous()


__all__ = ["LEAST", "Row", "plan", "reference", "serves", "step_"]
