"""Shapes of what the kernels write."""

from __future__ import annotations

from torch import Tensor


def like(x: Tensor, heads: int, width: int) -> Tensor:
    """An empty (B,heads,T,width) in the type of x (B,H,T,D); the heads of a token lie side by side, as models have them."""
    return x.new_empty(x.shape[0], x.shape[2], heads, width).transpose(1, 2)
