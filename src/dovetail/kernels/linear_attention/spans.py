"""How the GPU kernel cuts rows: into spans, that programs walk side by side, and those into tiles, that are products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WIDEST = 256  # features, values: what one program's state may be wide
BUSY = 512  # programs that keep a GPU busy: about four for each of its processors


class Sizes(NamedTuple):
    """span, tile: tokens; tile divides span. columns: of a state that one program holds, half as many where its rows are
    more than 128. warps, stages: of a program, and tiles on the way to it at a time."""

    span: int
    tile: int
    columns: int
    warps: int
    stages: int


def sizes(rows: int, tokens: int, widest: int, dtype: torch.dtype) -> Sizes:
    """For `rows` of `tokens` (batch times heads), of features or values at most `widest`."""
    span = 2048
    while span > 256 and rows * -(-tokens // span) < BUSY:
        span //= 2
    if dtype == torch.float32:  # not on tensor cores: tiles whose factors fit the registers
        return Sizes(span, 16, 32, 4, 2)
    if dtype == torch.float16:  # its products with a state are in tf32
        return Sizes(span, 64, 64, 4, 2)
    return Sizes(span, 64, 128, 8 if widest > 64 else 4, 2)


def like(x: Tensor, heads: int, width: int) -> Tensor:
    """An empty (B,heads,T,width) in the type of x (B,H,T,D); the heads of a token lie side by side, as models have them."""
    return x.new_empty(x.shape[0], x.shape[2], heads, width).transpose(1, 2)
