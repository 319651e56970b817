"""Attention of few queries over many keys: each program takes a share of the keys, and what the shares give is merged.

While decoding there are as many tiles of queries as rows and key heads, fewer than a GPU has processors, and all of the
time is reading keys and values. So the keys are split too, as many times as fill the device (Dao et al. 2023,
Flash-Decoding); shares merge by their normalisers. Keys are read where they lie in the buffer of a decoding state, whose
length and number of splits are static, so that a CUDA graph replays it: how much of it is filled, `ranges` asks on the
device, once for all layers, and the splits share that out among themselves.
"""

# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.kernels.attention.coords import Span
from dovetail.kernels.attention.triton.launch import LOG2E, PRECISION
from dovetail.kernels.attention.triton.shapes import BLOCK
from dovetail.kernels.attention.triton.tiles import seen
from dovetail.kernels.chunks import ceil_div, padded, roomy
from dovetail.kernels.overlap import launched, pass_on

BLOCKS = 128  # of those of `ranges` that are looked up at a time
SPLITS = 128  # at most
MERGED = 16  # splits that `merge` holds at a time


class Tiles(NamedTuple):
    """rows: query heads of a group times tokens, at most; for what is beyond, keys are read again. columns: keys of a
    tile. warps; stages: tiles on the way at a time. resident: programs on one processor at a time."""

    rows: int
    columns: int
    warps: int
    stages: int
    resident: int


# By the widest of a head's vectors: in bf16 and fp16 on a processor with the shared memory of an H100, of fp32, and where
# there is less.
NARROW = {
    64: Tiles(64, 128, 4, 3, 2),
    128: Tiles(64, 64, 4, 3, 2),
    256: Tiles(64, 32, 4, 3, 2),
    512: Tiles(64, 32, 8, 2, 1),
}
WIDE = {64: Tiles(16, 32, 4, 2, 2), 128: Tiles(16, 32, 4, 2, 2), 256: Tiles(16, 16, 8, 2, 2)}
SMALL = {
    64: Tiles(16, 32, 4, 2, 2),
    128: Tiles(16, 32, 4, 2, 2),
    256: Tiles(16, 16, 4, 2, 2),
    512: Tiles(16, 16, 8, 2, 1),
}


@triton.jit
def _places(order, segment, row, n, real, order_step, segment_step, APART: tl.constexpr):  # type: ignore[no-untyped-def]
    """Order and segment of the tokens n of a row; no segment where they are not real. What is empty has an order beyond
    32 bits, which is made the last that kernels compute with."""
    far = tl.load(order + row * order_step + n, mask=real, other=0)
    i = tl.minimum(tl.maximum(far, -(2**30)), 2**30).to(tl.int32)
    of = tl.where(real, 0, -1)
    if APART:
        of = tl.load(segment + row * segment_step + n, mask=real, other=-1).to(tl.int32)
    return i, of


@triton.jit(
    do_not_specialize=["blocks", "T", "S", "before", "after", "sinks", "q_step", "q_of_step", "k_step", "k_of_step"]
)
def ranges(  # type: ignore[no-untyped-def]
    found, q_order, q_segment, k_order, k_segment, q_step, q_of_step, k_step, k_of_step, blocks, T, S, before, after, sinks,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr, AHEAD: tl.constexpr, SINKS: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """found (rows,blocks,2): the first of a block's keys that some query sees, and one past the last; S and 0 for none."""
    block, row = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    m, n = tl.arange(0, QUERIES), block * BLOCK + tl.arange(0, BLOCK)
    i, of_i = _places(q_order, q_segment, row, m, m < T, q_step, q_of_step, APART)
    j, of_j = _places(k_order, k_segment, row, n, n < S, k_step, k_of_step, APART)
    shown = seen(i[:, None], j[None, :], of_i[:, None], of_j[None, :], before, after, sinks, BACK, AHEAD, SINKS, APART)
    shown = tl.max((shown & (m < T)[:, None]).to(tl.int32), 0) > 0
    at = found + (row * blocks + block) * 2
    tl.store(at, tl.min(tl.where(shown, n, S), 0))
    tl.store(at + 1, tl.max(tl.where(shown, n + 1, 0), 0))


@triton.jit(
    do_not_specialize=["S", "splits", "blocks", "each", "rows", "range_step", "before", "after", "sinks", "q_step", "q_of_step", "k_step", "k_of_step"]
)  # fmt: skip
def attend(  # type: ignore[no-untyped-def]
    q, k, v, out, lse, found, q_order, q_segment, k_order, k_segment,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    q_step, q_of_step, k_step, k_of_step, range_step, blocks, each, rows, groups, T, S, splits, scale, cap, before, after, sinks,
    WIDTH: tl.constexpr, VALUES: tl.constexpr, D: tl.constexpr, REST: tl.constexpr, E: tl.constexpr,
    SHARED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAN: tl.constexpr, BLOCKS: tl.constexpr, PARTIAL: tl.constexpr, PLACED: tl.constexpr,
    BACK: tl.constexpr, AHEAD: tl.constexpr, SINKS: tl.constexpr, APART: tl.constexpr, CAP: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One split of the keys of one row and key head, for its FAN query heads and T tokens, ROWS of these at a time.

    q (B,H,T,WIDTH), k, v (B,G,S,...) by their strides. out (splits,B,T,H,VALUES) and lse (splits,B,T,H), natural; of a
    split that shows nothing only its normaliser is written where there are others (PARTIAL). found: from `ranges`.
    scale: with log2(e), or as cap has that, divided by the cap. A key is D numbers and REST more; SHARED: the first D
    are its value, as those of latents are (DeepSeek-AI 2024, section 2.1).
    """
    if EARLY:
        pass_on()
    within, row, split = tl.program_id(0) % each, (tl.program_id(0) // each).to(tl.int64), tl.program_id(1)
    group, block = within % groups, within // groups
    r = block * ROWS + tl.arange(0, ROWS)
    real, head, token = r < FAN * T, group * FAN + r // T, r % T
    d, e, column = tl.arange(0, D), tl.arange(0, E), tl.arange(0, COLUMNS)
    q += row * q_row
    q_at = head.to(tl.int64)[:, None] * q_head + token[:, None] * q_token
    query = tl.load(q + q_at + d[None, :], mask=real[:, None] & (d < WIDTH)[None, :], other=0.0)
    if REST:
        more = D + tl.arange(0, REST)
        rest = tl.load(q + q_at + more[None, :], mask=real[:, None] & (more < WIDTH)[None, :], other=0.0)
    if PLACED:
        i, of_i = _places(q_order, q_segment, row, token, real, q_step, q_of_step, APART)
        start, stop = S, S * 0
        for first in range(0, blocks, BLOCKS):
            n = first + tl.arange(0, BLOCKS)
            at = found + row * range_step + n * 2
            start = tl.minimum(start, tl.min(tl.load(at, mask=n < blocks, other=2**30), 0))
            stop = tl.maximum(stop, tl.max(tl.load(at + 1, mask=n < blocks, other=0), 0))
    else:
        start, stop = S * 0, S
    tiles = tl.cdiv(tl.maximum(stop - start, 0), COLUMNS)

    acc = tl.zeros([ROWS, E], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = total - float("inf")
    k += row * k_row + group.to(tl.int64) * k_head
    v += row * v_row + group.to(tl.int64) * v_head
    for tile in tl.range(tiles * split // splits, tiles * (split + 1) // splits):
        first = start + tile * COLUMNS
        there = first + column < stop
        k_at = k + first.to(tl.int64) * k_token + column.to(tl.int64)[:, None] * k_token
        key = tl.load(k_at + d[None, :], mask=there[:, None] & (d < WIDTH)[None, :], other=0.0)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if REST:
            other = tl.load(k_at + more[None, :], mask=there[:, None] & (more < WIDTH)[None, :], other=0.0)
            s = tl.dot(rest, tl.trans(other), acc=s, input_precision=PRECISION)
        s *= scale
        if CAP:
            s = cap - 2 * cap / (tl.exp2(s * 2.8853900817779268) + 1)  # cap·tanh(s)
        shown = there[None, :]
        if PLACED:
            j, of_j = _places(k_order, k_segment, row, first + column, there, k_step, k_of_step, APART)
            shown = seen(
                i[:, None], j[None, :], of_i[:, None], of_j[None, :], before, after, sinks, BACK, AHEAD, SINKS, APART
            )
        s = tl.where(shown, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        level = tl.where(higher == -float("inf"), 0.0, higher)  # a query that has seen no key yet
        p = tl.exp2(s - level[:, None])
        keep = tl.exp2(top - level)
        total = total * keep + tl.sum(p, 1)
        if SHARED:
            value = key
        else:
            v_at = v + first.to(tl.int64) * v_token + column.to(tl.int64)[:, None] * v_token
            value = tl.load(v_at + e[None, :], mask=there[:, None] & (e < VALUES)[None, :], other=0.0)
        acc = tl.dot(p.to(value.dtype), value, acc=acc * keep[:, None], input_precision=PRECISION)
        top = higher

    some = total > 0
    total = tl.where(some, total, 1.0)
    at = ((split * rows + row) * T + token) * (groups * FAN) + head
    tl.store(lse + at, (top + tl.log2(total)) * 0.6931471805599453, mask=real)
    written = real & some if PARTIAL else real
    tl.store(
        out + at[:, None] * VALUES + e[None, :], acc / total[:, None], mask=written[:, None] & (e < VALUES)[None, :]
    )


@triton.jit(do_not_specialize=["splits"])
def merge(  # type: ignore[no-untyped-def]
    parts, levels, out, lse, splits, VALUES: tl.constexpr, E: tl.constexpr, SPLITS: tl.constexpr, MERGED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One query of one head: out (N,VALUES) and lse (N,) from parts (splits,N,VALUES) and levels (splits,N), N = B·T·H."""
    if EARLY:
        pass_on()
    n, N = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    split, e = tl.arange(0, SPLITS), tl.arange(0, E)
    level = tl.load(levels + split * N + n, mask=split < splits, other=-float("inf"))
    top = tl.max(level, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp2((level - top) * 1.4426950408889634), 0)
    acc = tl.zeros([E], tl.float32)
    for first in range(0, splits, MERGED):
        at = first + tl.arange(0, MERGED)
        levels_at = tl.load(levels + at * N + n, mask=at < splits, other=-float("inf"))
        shown = (levels_at != -float("inf"))[:, None] & (e < VALUES)[None, :]  # nothing else has been written
        part = tl.load(parts + (at * N + n)[:, None] * VALUES + e[None, :], mask=shown, other=0.0)
        acc += tl.sum(tl.exp2((levels_at - top) * 1.4426950408889634)[:, None] * part, 0)
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    tl.store(lse + n, tl.where(empty, -float("inf"), top + tl.log2(total) * 0.6931471805599453))
    tl.store(out + n * VALUES + e, acc / total, mask=e < VALUES)


class Sides(NamedTuple):
    """What a mask goes by: order (B|1,N) int64 of queries and keys, and their segments where they keep apart."""

    q_order: Tensor
    k_order: Tensor
    q_segments: Tensor | None = None
    k_segments: Tensor | None = None

    def given(self) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
        """Tensors as kernels take them (queries' order and segments, then keys'), and what leads to their next row."""
        tensors = self.q_order, self.q_segments, self.k_order, self.k_segments
        lines = [None if t is None else t if t.shape[1] == 1 or t.stride(1) == 1 else t.contiguous() for t in tensors]
        return tuple(lines), tuple(0 if t is None or t.shape[0] == 1 else t.stride(0) for t in lines)


def shown(sides: Sides, span: Span) -> Tensor:
    """(B|1,blocks,2) int32: for each BLOCK of keys the first that some query of the row sees, and one past the last."""
    (T, S), rows = (sides.q_order.shape[1], sides.k_order.shape[1]), _rows(sides)
    tensors, steps = sides.given()
    found = sides.k_order.new_empty(rows, ceil_div(S, BLOCK), 2, dtype=torch.int32)
    with torch.cuda.device_of(sides.k_order):
        ranges[(found.shape[1] * rows,)](
            found, *tensors, *steps, found.shape[1], T, S, span.before or 0, span.after or 0, span.sinks,
            QUERIES=1 << (T - 1).bit_length(), BLOCK=BLOCK, **_bounds(span, sides),
        )  # fmt: skip
    return found


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sides: Sides | None,
    found: Tensor | None,
    span: Span,
    scale: float,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B,H,T,E) in q's type and lse (B,H,T) in fp32; the heads of a token lie side by side in both.

    q (B,H,T,D), k (B,G,S,D), v (B,G,S,E), in one type and with any strides. sides and what `shown` found of them: None
    where every query sees every key. cap: scores are cap·tanh(scale·qk / cap).
    """
    (B, H, T, width), (G, S), values = q.shape, k.shape[1:3], v.shape[3]
    if not q.numel():
        empty = q.new_empty(B, T, H, values), q.new_empty(B, T, H, dtype=torch.float32)
        return empty[0].transpose(1, 2), empty[1].transpose(1, 2)
    (D, rest), E, fan = parts(width), padded(values), H // G
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    tile = (WIDE if q.dtype == torch.float32 else NARROW if roomy(q.device) else SMALL)[max(64, D, E)]
    alike = all(a == b or n == 1 for n, a, b in zip(k.shape, k.stride(), v.stride(), strict=True))
    shared = v.data_ptr() == k.data_ptr() and alike and values == E == D
    rows = min(tile.rows, padded(fan * T))
    programs = B * G * ceil_div(fan * T, rows)
    splits = divided(programs, ceil_div(S, tile.columns), tile.resident * _processors(q.device))
    out, lse = q.new_empty(B, T, H, values), q.new_empty(B, T, H, dtype=torch.float32)
    part, level = (out, lse) if splits == 1 else (lse.new_empty(splits, *out.shape), lse.new_empty(splits, *lse.shape))
    tensors, steps = ((None,) * 4, (0,) * 4) if sides is None else sides.given()
    step = 0 if found is None or found.shape[0] == 1 else found.stride(0)
    with torch.cuda.device_of(q):
        attend[(programs, splits)](  # rows in the first axis: the others end at 65,535
            q, k, v, part, level, found, *tensors, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *steps,
            step, 0 if found is None else found.shape[1], programs // B, B, G, T, S, splits,
            scale / cap if cap else scale * LOG2E, (cap or 0.0) * LOG2E,
            span.before or 0, span.after or 0, span.sinks, WIDTH=width, VALUES=values, D=D, REST=rest, E=E,
            SHARED=shared, ROWS=rows, COLUMNS=tile.columns, FAN=fan, BLOCKS=BLOCKS, PARTIAL=splits > 1, PLACED=sides is not None,
            CAP=bool(cap), PRECISION=PRECISION, num_warps=tile.warps, num_stages=tile.stages, **_bounds(span, sides),
            **launched(),
        )  # fmt: skip
        if splits > 1:
            merge[(B * T * H,)](
                part, level, out, lse, splits, VALUES=values, E=E, SPLITS=SPLITS, MERGED=MERGED, num_warps=4, **launched()
            )  # fmt: skip
    return out.transpose(1, 2), lse.transpose(1, 2)


def divided(programs: int, tiles: int, slots: int) -> int:
    """Splits of each program's tiles: the fewest that keep `slots` programs that run at a time nearly as busy as any.

    With few programs a wave of them is to be full; where one split fills it, there is nothing to merge.
    """

    def busy(splits: int) -> float:
        waves = programs * splits / slots
        return waves / -(-programs * splits // slots)

    most = max(1, min(tiles, SPLITS, max(6, slots // programs)))
    best = max(busy(n) for n in range(1, most + 1))
    return next(n for n in range(1, most + 1) if busy(n) >= 0.9 * best)


def parts(width: int) -> tuple[int, int]:
    """Two powers of two, or one and 0, that hold `width` numbers: 96 as 64 and 32, 576 as 512 and 64, 100 as 128."""
    most = max(16, 1 << width.bit_length() - 1)
    rest = 0 if width <= most else padded(width - most)
    return (most, rest) if rest < most else (2 * most, 0)


def _bounds(span: Span, sides: Sides | None) -> dict[str, bool]:
    return {
        "BACK": span.before is not None, "AHEAD": span.after is not None, "SINKS": span.sinks > 0,
        "APART": sides is not None and sides.q_segments is not None,
    }  # fmt: skip


def _rows(sides: Sides) -> int:
    return max(1 if t is None else t.shape[0] for t in sides)


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter, which runs one program after the other, as if there were few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
