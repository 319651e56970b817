"""Dequantising packed codes in one pass on a GPU: a byte and a constant read, two weights written, nothing between."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024  # bytes of codes for one program


def dequantise_packed(codes: Tensor, absmax: Tensor, levels: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """The reference's `dequantise_packed`, to the bit: (N,) in `dtype` of packed codes (N/2,) uint8, contiguous."""
    out = torch.empty(2 * codes.numel(), dtype=dtype, device=codes.device)
    with torch.cuda.device_of(codes):
        _packed[(triton.cdiv(codes.numel(), _TILE),)](codes, absmax, levels, out, codes.numel(), block // 2, _TILE)  # type: ignore[arg-type]
    return out


@triton.jit
def _packed(codes, absmax, levels, out, count, half: tl.constexpr, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.program_id(0).to(tl.int64) * tile
    at = first + tl.arange(0, tile)
    pair = tl.load(codes + at, mask=at < count, other=0).to(tl.int32)
    scale = tl.load(absmax + at // half, mask=at < count, other=0.0)
    both = tl.interleave(tl.load(levels + (pair >> 4)) * scale, tl.load(levels + (pair & 15)) * scale)
    where = 2 * first + tl.arange(0, 2 * tile)
    tl.store(out + where, both.to(out.dtype.element_ty), mask=where < 2 * tl.cast(count, tl.int64))
