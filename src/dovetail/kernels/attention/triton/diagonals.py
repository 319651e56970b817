"""The gradient of a table of distances: sums of ds along the diagonals of the scores, without atomic additions.

A tile whose keys begin `n` tiles behind its queries has the same distances as the next tile down that block diagonal.
So a program walks down one, adds up whole tiles entry by entry in its registers, and sums the diagonals of that one
tile in the end: row y is turned left by y columns, which puts each diagonal into a column, and two of them at most.
"""

# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from dovetail.kernels.attention.triton.tiles import added, entries, places, seen


@triton.jit
def _summed(at, total, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums along the diagonals of a tile: of those from its first row on, then of those that end in its last row."""
    x = tl.arange(0, TILE)
    turned = tl.gather(total, (x[None, :] + x[:, None]) % TILE, axis=1)
    plain = x[None, :] + x[:, None] < TILE
    tl.store(at + x, tl.sum(tl.where(plain, turned, 0.0), 0))
    tl.store(at + TILE + x, tl.sum(tl.where(plain, 0.0, turned), 0))


@triton.jit(do_not_specialize=["heads", "S", "before", "after", "sinks", "reach", "lowest", "count", "tiles", "share"])
def diagonals(  # type: ignore[no-untyped-def]
    q, k, v, d_out, level, delta, table, sums, heads, S, LENGTH, scale, before, after, sinks, reach,
    lowest, count, tiles, share,
    D: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr, FAN: tl.constexpr, PAD: tl.constexpr,
    BACK: tl.constexpr, AHEAD: tl.constexpr, SINKS: tl.constexpr, FAR: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """sums (parts,B·H,diagonals,2,TILE) fp32: of block diagonal n, whose first is `lowest`, at distances n·TILE + x and
    n·TILE + x - TILE. tiles: of queries; `share` of them to a program. Distances of `reach` or more are left to others."""
    n, row, part = tl.program_id(0) % count, tl.program_id(0) // count, tl.program_id(1)
    batch, head = row // heads, row % heads
    group, away = head // FAN, (lowest + n) * TILE
    table += head.to(tl.int64) * (2 * (reach + PAD) + 1) + reach + PAD
    level += row.to(tl.int64) * LENGTH
    delta += row.to(tl.int64) * LENGTH
    x = tl.arange(0, TILE)
    start = tl.maximum(part * share, -(lowest + n))
    stop = tl.minimum(tl.minimum((part + 1) * share, tiles), tl.cdiv(S, TILE) - (lowest + n))
    total = tl.zeros([TILE, TILE], tl.float32)
    for tile in tl.range(start, stop):
        first = tile * TILE
        other = first + away
        query = q.load([batch, head, first, 0]).reshape([TILE, D])
        given = d_out.load([batch, head, first, 0]).reshape([TILE, E])
        key = k.load([batch, group, other, 0]).reshape([TILE, D])
        value = v.load([batch, group, other, 0]).reshape([TILE, E])
        levels, change = tl.load(level + first + x), tl.load(delta + first + x)
        more = added(table, away, reach, TILE, TILE, False, ASSEMBLY)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        dp = tl.dot(given, tl.trans(value), input_precision=PRECISION)
        ds = tl.exp2(s * scale + more - levels[:, None]) * (dp - change[:, None])
        if SINKS or not EVEN:  # else what is not seen is a matter of the distance
            i, j, real = first + x, other + x, tl.where(other + x < S, 0, -1)
            shown = seen(
                i[:, None], j[None, :], real[:, None], real[None, :], before, after, sinks, BACK, AHEAD, SINKS, False
            )
            ds = tl.where(shown, ds, 0.0)
        total += ds
    distance = away + x[None, :] - x[:, None]
    if BACK and not SINKS:
        total = tl.where(distance >= -before, total, 0.0)
    if AHEAD:
        total = tl.where(distance <= after, total, 0.0)
    if FAR:
        total = tl.where((distance > -reach) & (distance < reach), total, 0.0)
    at = (part * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (2 * TILE)
    _summed(sums + at, total, TILE)


@triton.jit(
    do_not_specialize=[
        "q_step", "k_step", "heads", "T", "S", "before", "after", "sinks", "reach", "lowest", "count", "tiles", "share"
    ]
)  # fmt: skip
def placed_diagonals(  # type: ignore[no-untyped-def]
    q, k, v, d_out, level, delta, table, sums, d_table, q_at, k_at, q_step, k_step, heads, T, S, LENGTH, scale,
    before, after, sinks, reach, lowest, count, tiles, share,
    D: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr, FAN: tl.constexpr, PAD: tl.constexpr,
    BACK: tl.constexpr, AHEAD: tl.constexpr, SINKS: tl.constexpr, FAR: tl.constexpr, PRECISION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """The same where tokens have places. Pairs whose distance is not what their indices say, because padding lies between
    them, are added one by one to d_table (H,2·reach+1); tiles that show nothing near are passed over."""
    n, row, part = tl.program_id(0) % count, tl.program_id(0) // count, tl.program_id(1)
    batch, head = row // heads, row % heads
    group, away = head // FAN, (lowest + n) * TILE
    table += head.to(tl.int64) * (2 * (reach + PAD) + 1) + reach + PAD
    d_table += head.to(tl.int64) * (2 * reach + 1) + reach
    level += row.to(tl.int64) * LENGTH
    delta += row.to(tl.int64) * LENGTH
    q_at += batch * q_step
    k_at += batch * k_step
    x = tl.arange(0, TILE)
    start = tl.maximum(part * share, -(lowest + n))
    stop = tl.minimum(tl.minimum((part + 1) * share, tiles), tl.cdiv(S, TILE) - (lowest + n))
    total = tl.zeros([TILE, TILE], tl.float32)
    for tile in range(start, stop):
        first = tile * TILE
        other = first + away
        i, of_i = places(q_at, first + x, T, True)
        j, of_j = places(k_at, other + x, S, True)
        distance = j[None, :] - i[:, None]
        shown = seen(
            i[:, None], j[None, :], of_i[:, None], of_j[None, :], before, after, sinks, BACK, AHEAD, SINKS, True
        )
        if FAR:
            shown = shown & (distance > -reach) & (distance < reach)
        if tl.max(tl.max(shown.to(tl.int32), 1), 0) > 0:
            query = q.load([batch, head, first, 0]).reshape([TILE, D])
            given = d_out.load([batch, head, first, 0]).reshape([TILE, E])
            key = k.load([batch, group, other, 0]).reshape([TILE, D])
            value = v.load([batch, group, other, 0]).reshape([TILE, E])
            levels, change = tl.load(level + first + x), tl.load(delta + first + x)
            s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            dp = tl.dot(given, tl.trans(value), input_precision=PRECISION)
            s = s * scale + entries(table, i[:, None], j[None, :], reach, ASSEMBLY)
            ds = tl.where(shown, tl.exp2(s - levels[:, None]) * (dp - change[:, None]), 0.0)
            plain = distance == away + x[None, :] - x[:, None]
            total += tl.where(plain, ds, 0.0)
            astray = shown & (plain == 0)
            if tl.max(tl.max(astray.to(tl.int32), 1), 0) > 0:
                tl.atomic_add(d_table + distance, ds, mask=astray)
    at = (part * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (2 * TILE)
    _summed(sums + at, total, TILE)
