"""Quantising and dequantising in plain torch, in pieces, so that no float copy of a whole large weight is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.kernels.quantise.rows import Rows

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


def quantise_int4(weight: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes (N, G · block) uint8, scale (N,G) bf16, zero (N,G) uint8) of weight (N,K), G = ceil(K/block).

    Each group of a row has 16 even steps from min(w, 0) to max(w, 0), and zero has a code of its own: scale =
    (max − min)/15, zero = round(−min/scale), code = clamp(round(w/scale) + zero, 0, 15) (Frantar et al. 2023). The
    scale is rounded to bf16 first, so that the codes are right for what is kept. The last group is filled up with
    zeros. A NaN or an infinity shows in its scale.
    """
    (count, width), device = weight.shape, weight.device
    groups = -(-width // block)
    codes = torch.empty(count, groups * block, dtype=torch.uint8, device=device)
    scale = torch.empty(count, groups, dtype=torch.bfloat16, device=device)
    zero = torch.empty(count, groups, dtype=torch.uint8, device=device)
    run = max(_PIECE.get(device.type, 2**25) // (groups * block), 1)
    for start in range(0, count, run):
        rows = slice(start, start + run)
        piece = F.pad(weight[rows].float(), (0, groups * block - width)).view(-1, groups, block)
        least, most = piece.amin(2).clamp_max(0), piece.amax(2).clamp_min(0)
        scale[rows] = most / 15 - least / 15
        step = scale[rows].float().clamp_min(_LEAST)
        zero[rows] = offset = (-least / step).round_().clamp_(0, 15)
        codes[rows] = (piece / step[..., None]).round_().add_(offset[..., None]).clamp_(0, 15).flatten(1)
    return codes, scale, zero


def dequantise_rows(rows: Rows, width: int, dtype: torch.dtype) -> Tensor:
    """The weight (N, width) in `dtype`, taken in fp32, of codes that lie along its rows."""
    count, run = len(rows.codes), max(_PIECE.get(rows.codes.device.type, 2**25) // max(width, 1), 1)

    def part(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        if rows.packed:
            codes = torch.stack([codes >> 4, codes & 15], -1)
        value = codes.float() if rows.levels is None else F.embedding(codes.int(), rows.levels[:, None])
        value = value.reshape(len(codes), scale.shape[1], rows.block)
        value = value if zero is None else value - zero[..., None]
        return (value * (scale.float() * rows.factor)[..., None]).flatten(1)[:, :width].to(dtype)

    if torch.compiler.is_compiling() or count <= run:
        return part(rows.codes, rows.scale, rows.zero)
    out = torch.empty(count, width, dtype=dtype, device=rows.codes.device)
    for start in range(0, count, run):
        at = slice(start, start + run)
        out[at] = part(rows.codes[at], rows.scale[at], None if rows.zero is None else rows.zero[at])
    return out


def linear(x: Tensor, rows: Rows, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, (..., K) -> (..., N) in x's dtype, as it is written: the whole weight in fp32 or better, then the product."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ dequantise_rows(rows, x.shape[-1], wide).t()
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


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
