"""A weight whose codes lie along its rows, which a product can be taken with as it reads them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """W (N,K) in groups of `block` weights of a row: w = (level or code − zero) · scale · factor.

    codes: (N,K) int8, or uint8 of two codes to a byte, the first in the high half, (N, ceil(K/block) · block/2).
    scale (N, ceil(K/block)) floating. zero: like it, uint8; none is 0. levels (16,) fp32: what a packed code stands for;
    none is the code itself. block: K where a row is one group.
    """

    codes: Tensor
    scale: Tensor
    block: int
    zero: Tensor | None = None
    levels: Tensor | None = None
    factor: float = 1.0

    @property
    def packed(self) -> bool:
        """Two codes to a byte."""
        return self.codes.element_size() == 1 and not self.codes.dtype.is_signed
