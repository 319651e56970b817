"""x Wᵀ for a few vectors x, with W in codes: each byte is read once and becomes weights in registers.

One vector is a walk along the rows of W, multiplied and summed group by group in fp32. Several (up to 32) are products of
tiles of 16 or 32 vectors, a group at a time: a code less its zero is exact in bf16 and fp16 (|.| <= 127), so what is
rounded is x alone, and the group's scale is applied in fp32 to the sum. Where the tiles of W's rows are fewer than fill
the device, K is shared among programs too, and their sums are added in order, so that the result is the same each time.
A table of levels (NF4) is looked up for every code, and rounded to x's type in the products of tiles.
"""

# The type checker does not know Triton's own arithmetic.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.kernels.chunks import ceil_div, padded
from dovetail.kernels.operation import operation
from dovetail.kernels.quantise.rows import Rows


class Tiles(NamedTuple):
    """rows: of W in a program. bytes: of a row's codes at a time. stages: tiles that are on their way at once."""

    rows: int
    bytes: int
    warps: int
    stages: int


# Chosen by what the compiler makes of them for an H100 (registers, instructions a weight), not yet by time: see
# `python bench/quantised_linear.py --sweep`. fp32 has no tensor cores to go to, and takes small tiles.
VECTOR = {"int8": Tiles(4, 1024, 4, 3), "int4": Tiles(8, 1024, 4, 3), "levels": Tiles(4, 512, 4, 3)}
PRODUCT = {"int8": Tiles(32, 128, 4, 4), "int4": Tiles(32, 64, 4, 4), "levels": Tiles(32, 64, 4, 4)}
WIDE = Tiles(16, 16, 4, 3)
FILL = 512  # programs that a product should have: four for each multiprocessor of an H100
LEAST_STEPS = 4  # of a program's walk along K
_ONE = 0x3F800000  # the bits of 1.0


def linear(x: Tensor, rows: Rows, bias: Tensor | None = None) -> Tensor:
    """(..., K) -> (..., N) in x's dtype: bf16, fp16 or fp32, at most 32 vectors. No gradients."""
    flat = x.reshape(-1, x.shape[-1])
    y = _run(flat, rows.codes, rows.scale, rows.zero, rows.levels, bias, rows.block, rows.factor)
    return y.view(*x.shape[:-1], -1)


@operation("coded_linear")
def _run(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    levels: Tensor | None,
    bias: Tensor | None,
    block: int,
    factor: float,
) -> Tensor:
    rows = Rows(codes.contiguous(), scale.contiguous(), block, zero, levels, factor)
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = x.new_empty(len(x), len(codes))
    with torch.cuda.device_of(x):
        (_vector if len(x) == 1 else _product)(x, rows, bias, out)
    return out


@_run.register_fake
def _(x, codes, scale, zero, levels, bias, block, factor):  # type: ignore[no-untyped-def]
    return x.new_empty(len(x), len(codes))


def _vector(x: Tensor, rows: Rows, bias: Tensor | None, out: Tensor) -> None:
    (_, width), count = x.shape, len(rows.codes)
    group = _group(rows, width)
    tiles = VECTOR[_kind(rows)]
    step = min(tiles.bytes * (1 + rows.packed), padded(width))
    codes = rows.codes.view(torch.int32) if rows.packed else rows.codes
    _vector_kernel[(ceil_div(count, tiles.rows),)](
        x, codes, rows.scale, rows.zero, rows.levels, bias, out, count, width, codes.shape[1], rows.scale.shape[1],
        rows.factor, _ONE, group, step, min(group, step), tiles.rows, rows.packed, tiles.stages, num_warps=tiles.warps,
    )  # type: ignore[arg-type]  # fmt: skip


def _product(x: Tensor, rows: Rows, bias: Tensor | None, out: Tensor) -> None:
    (vectors, width), count = x.shape, len(rows.codes)
    tiles, group = WIDE if x.dtype == torch.float32 else PRODUCT[_kind(rows)], _group(rows, width)
    step = min(group, tiles.bytes * (1 + rows.packed))
    programs = ceil_div(count, tiles.rows)
    shares = max(min(FILL // programs, width // (LEAST_STEPS * step)), 1)
    share = ceil_div(ceil_div(width, step), shares) * step
    shares = ceil_div(width, share)
    sums = out if shares == 1 else torch.empty(shares, vectors, count, dtype=torch.float32, device=x.device)
    _product_kernel[(programs, shares)](
        x, rows.codes, rows.scale, rows.zero, rows.levels, bias, sums, vectors, count, width, share, x.stride(0),
        rows.codes.shape[1], rows.scale.shape[1], rows.factor, group, padded(vectors), tiles.rows,
        step, rows.packed, shares == 1, tiles.stages, num_warps=tiles.warps,
    )  # type: ignore[arg-type]  # fmt: skip
    if shares > 1:
        _sum_kernel[(ceil_div(vectors * count, 512),)](sums, bias, out, vectors * count, count, shares, 512)


def _kind(rows: Rows) -> str:
    return "levels" if rows.levels is not None else "int4" if rows.packed else "int8"


def _group(rows: Rows, width: int) -> int:
    """Weights of a group, a power of two: more than there are where a row is one group."""
    return padded(width) if rows.block == width else rows.block


@triton.jit
def _nibble(word, place: tl.constexpr, one, plain: tl.constexpr):  # type: ignore[no-untyped-def]
    """The code q at bit `place` of a word; unless `plain`, the bits of 1 + q/16, which takes no conversion."""
    if plain:
        return (word >> place) & 15
    moved = word << (19 - place) if place < 19 else word >> (place - 19)
    return moved & 0x780000 | one


@triton.jit
def _eight(word, one, levels):  # type: ignore[no-untyped-def]
    """Words (..., n) of eight codes q as 1 + q/16 or levels, (..., 8n): of each byte, lowest first, the high half first."""
    plain: tl.constexpr = levels is not None
    first = tl.interleave(_nibble(word, 4, one, plain), _nibble(word, 20, one, plain))
    second = tl.interleave(_nibble(word, 0, one, plain), _nibble(word, 16, one, plain))
    third = tl.interleave(_nibble(word, 12, one, plain), _nibble(word, 28, one, plain))
    fourth = tl.interleave(_nibble(word, 8, one, plain), _nibble(word, 24, one, plain))
    codes = tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))
    if plain:
        table = tl.load(levels + tl.arange(0, 16))
        return tl.gather(tl.broadcast_to(table[None, None, :], (codes.shape[0], codes.shape[1], 16)), codes, 2)
    return codes.to(tl.float32, bitcast=True)


@triton.jit
def _vector_kernel(  # type: ignore[no-untyped-def]
    x, codes, scale, zero, levels, bias, out, count, width, pitch, groups, factor, one,
    group: tl.constexpr, step: tl.constexpr, inner: tl.constexpr, tile: tl.constexpr, packed: tl.constexpr,
    stages: tl.constexpr,
):  # fmt: skip
    """y (count,) of one x (width,). Of `tile` rows, `step` weights at a time, as step/inner parts of one group each.

    codes: bytes, or (packed) words of eight codes, whose Σ x q is 16 (Σ x (1 + q/16) − Σ x). one: the bits of 1.0, and no
    constant, so that the compiler keeps them in a register, where "and" and "or" are one instruction together.
    """
    each: tl.constexpr = 8 if packed else 1
    rows = tl.program_id(0) * tile + tl.arange(0, tile)
    parts = tl.arange(0, step // inner)
    within = rows < count
    column = parts[:, None] * inner + tl.arange(0, inner)[None, :]
    place = parts[:, None] * (inner // each) + tl.arange(0, inner // each)[None, :]
    lines = codes + rows.to(tl.int64)[:, None, None] * pitch
    found = tl.zeros((tile,), tl.float32)
    for start in tl.range(0, width, step, num_stages=stages):
        at = start // each + place
        read = tl.load(lines + at[None], mask=within[:, None, None] & (at < pitch)[None], other=0)
        value = tl.load(x + start + column, mask=start + column < width, other=0.0).to(tl.float32)
        weight = _eight(read, one, levels) if packed else read.to(tl.float32)
        product, total = tl.sum(weight * value[None], 2), tl.sum(value, 1)[None]
        index = (start + parts * inner) // group
        known = within[:, None] & (index < groups)[None]
        where = rows.to(tl.int64)[:, None] * groups + index[None]
        if packed and levels is None:
            product = 16 * (product - total)
        if zero is not None:
            product -= tl.load(zero + where, mask=known, other=0).to(tl.float32) * total
        found += tl.sum(product * tl.load(scale + where, mask=known, other=0.0).to(tl.float32), 1)
    found *= factor
    if bias is not None:
        found += tl.load(bias + rows, mask=within, other=0.0).to(tl.float32)
    tl.store(out + rows, found.to(out.dtype.element_ty), mask=within)


@triton.jit
def _halves(read, levels, zero, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bytes (n,m) of two codes as (n,2m) in `dtype`: the codes less their zeros (n,), which is exact, or their levels.

    A code q in the last bits of 128 (bf16) or 1024 (fp16) is 128 + q or 1024 + q, without a conversion.
    """
    if levels is not None:
        table = tl.broadcast_to(tl.load(levels + tl.arange(0, 16))[None, :], (read.shape[0], 16))
        return tl.gather(table, tl.interleave(read >> 4, read & 15).to(tl.int32), 1).to(dtype)
    if dtype == tl.float32:
        weight = tl.interleave(read >> 4, read & 15).to(tl.float32)
        base = 0.0
    else:
        bits: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
        base: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
        wide = read.to(tl.int16)
        high, low = (wide >> 4) | bits, (wide & 15) | bits
        weight = tl.interleave(high, low).to(dtype, bitcast=True)
    return weight - (base + zero.to(tl.float32)).to(dtype)[:, None]


@triton.jit
def _product_kernel(  # type: ignore[no-untyped-def]
    x, codes, scale, zero, levels, bias, out, vectors, count, width, share, between, pitch, groups, factor,
    group: tl.constexpr, tall: tl.constexpr, tile: tl.constexpr, step: tl.constexpr, packed: tl.constexpr,
    whole: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """(tall, tile) of x Wᵀ over one share of K, a part of one group at a time; `whole`: the share is all of it."""
    halves: tl.constexpr = 2 if packed else 1
    rows = tl.program_id(0) * tile + tl.arange(0, tile)
    vector = tl.arange(0, tall)
    first = tl.program_id(1) * share
    within, there = rows < count, vector < vectors
    column, place = tl.arange(0, step), tl.arange(0, step // halves)
    lines = codes + rows.to(tl.int64)[:, None] * pitch
    vectors_at = x + vector.to(tl.int64)[:, None] * between  # which lie as far apart as a view of longer rows has them
    found = tl.zeros((tall, tile), tl.float32)
    for start in tl.range(first, tl.minimum(first + share, width), step, num_stages=stages):
        at = start // halves + place
        read = tl.load(lines + at[None, :], mask=within[:, None] & (at < pitch)[None, :], other=0)
        some = there[:, None] & (start + column < width)[None, :]
        value = tl.load(vectors_at + (start + column)[None, :], mask=some, other=0.0)
        where = rows.to(tl.int64) * groups + start // group
        if packed:
            origin = tl.load(zero + where, mask=within, other=0) if zero is not None else tl.zeros((tile,), tl.uint8)
            weight = _halves(read, levels, origin, value.dtype)
        else:
            weight = read.to(value.dtype)
        product = tl.dot(value, tl.trans(weight), input_precision="ieee")
        found += product * tl.load(scale + where, mask=within, other=0.0).to(tl.float32)[None, :]
    found *= factor
    if whole and bias is not None:
        found += tl.load(bias + rows, mask=within, other=0.0).to(tl.float32)[None, :]
    line = (0 if whole else tl.program_id(1).to(tl.int64) * vectors) + vector
    target = out + line.to(tl.int64)[:, None] * count + rows[None, :]
    tl.store(target, found.to(out.dtype.element_ty), mask=there[:, None] & within[None, :])


@triton.jit
def _sum_kernel(sums, bias, out, numbers, count, shares, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    """out (numbers,) = the shares (shares, numbers) added in order, and the bias (count,)."""
    at = tl.program_id(0) * tile + tl.arange(0, tile)
    within = at < numbers
    found = tl.zeros((tile,), tl.float32)
    line = sums + at
    for _ in range(shares):
        found += tl.load(line, mask=within, other=0.0)
        line += numbers
    if bias is not None:
        found += tl.load(bias + at % count, mask=within, other=0.0).to(tl.float32)
    tl.store(out + at, found.to(out.dtype.element_ty), mask=within)
