"""Shapes of what the kernels write."""

from __future__ import annotations

from torch import Tensor

BLOCK = 256  # keys of a row that have a pair of bounds: the first and the last of them that are seen


def like(x: Tensor, heads: int, width: int) -> Tensor:
    """An empty (B,heads,T,width) in the type of x (B,H,T,D); the heads of a token lie side by side, as models have them."""
    B, _, T, _ = x.shape
    return x.new_empty_strided((B, heads, T, width), (T * heads * width, width, heads * width, 1))
