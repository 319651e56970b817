"""The kernel of a diagonal state space: sums of decaying waves, by matrix products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dovetail.kernels import twins
from dovetail.kernels.ssm_convolution import reference


def diagonal_kernel(weight: Tensor, exponent: Tensor, length: int) -> Tensor:
    """K_t = 2 Re Σ_n weight_n exp(exponent_n t), t = 0..length-1, (D,length) real, for complex (D,N).

    Time is split, t = step·i + j: exp(e t) = exp(e step i) exp(e j), so that two tables of √length entries and one
    product a channel are all. The tables are made in fp64: a wave of many turns has no digits left in fp32.
    """
    if twins.asked():
        return reference.diagonal_kernel(weight, exponent, length).to(weight.real.dtype)
    step = int(math.sqrt(max(1, length - 1))) + 1  # no isqrt, which compilers do not know of a length that varies
    rows = -(-length // step)
    wide, fine = exponent.to(torch.complex128), torch.arange(step, device=exponent.device, dtype=torch.float64)
    coarse = step * torch.arange(rows, device=exponent.device, dtype=torch.float64)
    left = weight.to(torch.complex128)[:, None] * torch.exp(coarse[:, None] * wide[:, None])  # (D,rows,N)
    right = torch.exp(fine * wide[..., None])  # (D,N,step)
    real = weight.real.dtype
    left = torch.cat([left.real, -left.imag], -1).to(real)
    right = torch.cat([right.real, right.imag], 1).to(real)
    return 2 * torch.bmm(left, right).flatten(1)[:, :length]
