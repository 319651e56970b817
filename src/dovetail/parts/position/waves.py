"""Cosines and sines of positions, whose products are functions of the distance: no table of distances is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.kernels.attention import Side
from dovetail.kernels.cos_sin import cos_sin


def waves(side: Side, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (B|1,N,width/2) of p / 10,000^(2n/width) at the positions p of a side; once a forward.

    Angles are in fp64, so that differences of large ones are as good as small ones.
    """
    key = ("waves", width, dtype)
    if key not in side.memo:
        assert side.positions is not None
        pair = torch.arange(0, width, 2, device=side.positions.device, dtype=torch.float64)
        angle = side.positions[..., :1] * 10_000.0 ** (-pair / width)
        cos, sin = cos_sin(angle)
        side.memo[key] = cos.to(dtype), sin.to(dtype)
    return side.memo[key]


def in_full(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own dtype under autocast too, which would round sums of waves to more than near tokens differ by."""
    device = a.device.type
    if a.is_meta or not torch.is_autocast_enabled(device):
        return a @ b
    with torch.autocast(device, enabled=False):
        return a @ b
