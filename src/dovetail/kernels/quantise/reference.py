"""Quantising and dequantising in plain torch, in pieces, so that no float copy of a whole large weight is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

_LEAST = 1e-36  # the smallest absolute maximum that is divided by: 127/1e-36 is finite in fp32
_PIECE = {"cpu": 2**18, "cuda": 2**25}  # weights at a time: on a CPU what its cache holds


def quantise_levels(values: Tensor, levels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(codes (N,) uint8, absmax (N/block,) fp32) of values (n,); N is n filled up to whole blocks.

    A code is the number of the level nearest to value/absmax; halfway between two it is the lower one, as
    bitsandbytes decides for NF4. A NaN or an infinity shows in the absmax of its block.
    levels (L,) fp32, ascending, L <= 256.
    """
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.empty(_padded(values, block), dtype=torch.uint8, device=values.device)
    absmax = torch.empty(len(codes) // block, dtype=torch.float32, device=values.device)
    for start, piece in _pieces(values, block):
        blocks, numbers = _places(start, piece, block)
        absmax[blocks] = piece.abs().amax(1)
        scaled = piece * (1.0 / absmax[blocks].clamp_min(_LEAST))[:, None]
        codes[numbers] = torch.bucketize(scaled, middles, out_int32=True).flatten()
    return codes, absmax


def dequantise_levels(codes: Tensor, absmax: Tensor, levels: Tensor, block: int) -> Tensor:
    """level · absmax, (N,) fp32, of codes (N,) uint8 and absmax (N/block,) fp32. All at once: for constants, which are few."""
    return (levels[codes.int()].view(-1, block) * absmax[:, None]).flatten()


def quantise_int8(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(codes (N,) int8, absmax (N/block,) fp32): round(127/absmax · value), halves to even (Dettmers et al. 2023, eq. 1)."""
    codes = torch.empty(_padded(values, block), dtype=torch.int8, device=values.device)
    absmax = torch.empty(len(codes) // block, dtype=torch.float32, device=values.device)
    for start, piece in _pieces(values, block):
        blocks, numbers = _places(start, piece, block)
        absmax[blocks] = piece.abs().amax(1)
        codes[numbers] = (piece * (127.0 / absmax[blocks].clamp_min(_LEAST))[:, None]).round_().flatten()
    return codes, absmax


def dequantise_int8(codes: Tensor, absmax: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """code · absmax/127, (N,) in `dtype`, taken in fp32, of codes (N,) int8 (Dettmers et al. 2023, eq. 2)."""

    def part(codes: Tensor, absmax: Tensor) -> Tensor:
        return codes.view(-1, block).float() * (absmax / 127.0)[:, None]

    return _in_pieces(part, codes, absmax, block, dtype)


def pack(codes: Tensor) -> Tensor:
    """Codes (N,) below 16, two to a byte: (N/2,), the first of a pair in the high half."""
    high, low = codes.view(-1, 2).unbind(1)
    return high << 4 | low


def dequantise_packed(codes: Tensor, absmax: Tensor, levels: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """level · absmax, (N,) in `dtype`, taken in fp32, of packed codes (N/2,) and 16 levels. `block` is even."""
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)  # what each byte stands for, (256, 2)

    def part(codes: Tensor, absmax: Tensor) -> Tensor:
        return F.embedding(codes.int(), pairs).view(-1, block) * absmax[:, None]

    return _in_pieces(part, codes, absmax, block, dtype)


def _padded(values: Tensor, block: int) -> int:
    return -(-values.numel() // block) * block


def _pieces(values: Tensor, block: int) -> Iterator[tuple[int, Tensor]]:
    """(number of its first block, piece (blocks, block) in fp32), the last block filled up with zeros."""
    size = _size(values, block)
    for start in range(0, values.numel(), size):
        piece = values[start : start + size].float()
        short = -len(piece) % block
        yield start // block, (F.pad(piece, (0, short)) if short else piece).view(-1, block)


def _places(start: int, piece: Tensor, block: int) -> tuple[slice, slice]:
    """Where the constants and the codes of a piece stand."""
    stop = start + len(piece)
    return slice(start, stop), slice(start * block, stop * block)


def _in_pieces(
    part: Callable[[Tensor, Tensor], Tensor], codes: Tensor, absmax: Tensor, block: int, dtype: torch.dtype
) -> Tensor:
    """`part` over runs of blocks, so that its fp32 values are few at a time. A compiler fuses the whole instead."""
    blocks, run = len(absmax), _size(codes, block) // block
    if torch.compiler.is_compiling() or blocks <= run:
        return part(codes, absmax).to(dtype).flatten()
    rows, out = codes.view(blocks, -1), torch.empty(blocks, block, dtype=dtype, device=codes.device)
    for start in range(0, blocks, run):
        out[start : start + run] = part(rows[start : start + run].flatten(), absmax[start : start + run])
    return out.flatten()


def _size(t: Tensor, block: int) -> int:
    """Numbers at a time: whole blocks."""
    return max(_PIECE.get(t.device.type, 2**25) // block, 1) * block
