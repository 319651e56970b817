"""The forward kernel: a program holds a tile of queries and walks the tiles of keys that they see.

softmax(s) v needs the maximum m and the sum of exp(s - m) over all keys; both are kept for the keys so far, and what is
summed is scaled down whenever m rises (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1). Scores are in units
of log 2, because the processor has exp2.
"""

# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from dovetail.kernels.attention.triton.tiles import added, entries, looked_up, met, near, places, seen


@triton.jit
def _walk(  # type: ignore[no-untyped-def]
    acc, top, total, query, i, of_i, k, v, k_at, table, beyond, batch, group, first, start, stop, S, scale,
    before, after, sinks, reach,
    D: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, NEAR: tl.constexpr,
    BACK: tl.constexpr, AHEAD: tl.constexpr, SINKS: tl.constexpr, PLACED: tl.constexpr, PRECISION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Tiles of keys from start to stop. MASKED: not all are seen. NEAR: the table adds to each score its entry, and
    otherwise to all alike `beyond`. i, of_i: order and segment of the queries, `first` the index of the first of them,
    less what order is ahead of it where nothing is MASKED."""
    for tile in tl.range(start, stop):
        other = tile * COLUMNS
        key = k.load([batch, group, other, 0]).reshape([COLUMNS, D])
        if MASKED:
            j, of_j = places(k_at, other + tl.arange(0, COLUMNS), S, PLACED)
        if NEAR and MASKED and PLACED:
            more = entries(table, i[:, None], j[None, :], reach, ASSEMBLY)
        elif NEAR:
            more = added(table, other - first, reach, ROWS, COLUMNS, False, ASSEMBLY)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if NEAR:
            s = s * scale + more
        elif MASKED:
            s = s * scale + beyond
        if MASKED:
            shown = seen(
                i[:, None], j[None, :], of_i[:, None], of_j[None, :], before, after, sinks, BACK, AHEAD, SINKS, PLACED
            )
            s = tl.where(shown, s, -float("inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            level = tl.where(higher == -float("inf"), 0.0, higher)  # a query that has seen no key yet
            p = tl.exp2(s - level[:, None])
        elif NEAR:
            higher = tl.maximum(top, tl.max(s, 1))
            level = higher
            p = tl.exp2(s - level[:, None])
        else:
            higher = tl.maximum(top, tl.max(s, 1) * scale + beyond)
            level = higher
            p = tl.exp2(s * scale - (level - beyond)[:, None])
        keep = tl.exp2(top - level)
        total = total * keep + tl.sum(p, 1)
        acc *= keep[:, None]
        value = v.load([batch, group, other, 0]).reshape([COLUMNS, E])
        acc = tl.dot(p.to(value.dtype), value, acc=acc, input_precision=PRECISION)
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=["q_step", "k_step", "cut_step", "heads", "T", "S", "before", "after", "sinks", "reach"])
def attend(  # type: ignore[no-untyped-def]
    q, k, v, out, lse, table, q_at, k_at, cuts, q_step, k_step, cut_step, heads, T, S, scale, before, after, sinks, reach,
    D: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAN: tl.constexpr, PAD: tl.constexpr,
    BACK: tl.constexpr, AHEAD: tl.constexpr, SINKS: tl.constexpr, TABLE: tl.constexpr, FAR: tl.constexpr,
    EVEN: tl.constexpr, PLACED: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. q, k, v, out: descriptors of (B,heads,T,D) and so on. lse (B,H,T), natural.

    scale: with log2(e). table (H, 2·(reach + PAD) + 1), with log2(e), by distance. FAR: whether some are beyond its reach.
    PLACED: tokens have places (B|1,2,T), order and segment, and steps lead from row to row of them and of their `cuts`.
    """
    blocks = tl.cdiv(T, ROWS)
    block = blocks - 1 - tl.program_id(0) % blocks  # where masks are causal, the longest first
    row = tl.program_id(0) // blocks
    batch, head = row // heads, row % heads
    group, first = head // FAN, block * ROWS
    left, right = 0.0, 0.0
    if TABLE:
        table += head.to(tl.int64) * (2 * (reach + PAD) + 1) + reach + PAD
        if FAR:
            left, right = tl.load(table - reach), tl.load(table + reach)
    query = q.load([batch, head, first, 0]).reshape([ROWS, D])
    acc = tl.zeros([ROWS, E], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = total - float("inf")

    i, of_i = places(q_at + batch * q_step if PLACED else q_at, first + tl.arange(0, ROWS), T, PLACED)
    if PLACED:
        k_at += batch * k_step
        start, whole, end, stop, shift = looked_up(cuts, batch, block, cut_step)
        first -= shift
    else:
        start, whole, end, stop = met(first, S, before, after, ROWS, COLUMNS, BACK, AHEAD)
    begin, close = whole, end
    if FAR:
        begin, close = near(first, reach, whole, end, ROWS, COLUMNS)
    if SINKS and not PLACED:
        acc, top, total = _walk(
            acc, top, total, query, i, of_i, k, v, k_at, table, 0.0, batch, group, first, 0, tl.minimum(start, tl.cdiv(sinks, COLUMNS)),
            S, scale, before, after, sinks, reach, D, E, ROWS, COLUMNS, True, TABLE, BACK, AHEAD, SINKS, PLACED, PRECISION, ASSEMBLY,
        )  # fmt: skip
    if BACK or PLACED:
        acc, top, total = _walk(
            acc, top, total, query, i, of_i, k, v, k_at, table, 0.0, batch, group, first, start, whole,
            S, scale, before, after, sinks, reach, D, E, ROWS, COLUMNS, True, TABLE, BACK, AHEAD, SINKS, PLACED, PRECISION, ASSEMBLY,
        )  # fmt: skip
    if FAR:
        acc, top, total = _walk(
            acc, top, total, query, i, of_i, k, v, k_at, table, left, batch, group, first, whole, begin,
            S, scale, before, after, sinks, reach, D, E, ROWS, COLUMNS, False, False, BACK, AHEAD, SINKS, PLACED, PRECISION, ASSEMBLY,
        )  # fmt: skip
    acc, top, total = _walk(
        acc, top, total, query, i, of_i, k, v, k_at, table, 0.0, batch, group, first, begin, close,
        S, scale, before, after, sinks, reach, D, E, ROWS, COLUMNS, False, TABLE, BACK, AHEAD, SINKS, PLACED, PRECISION, ASSEMBLY,
    )  # fmt: skip
    if FAR:
        acc, top, total = _walk(
            acc, top, total, query, i, of_i, k, v, k_at, table, right, batch, group, first, close, end,
            S, scale, before, after, sinks, reach, D, E, ROWS, COLUMNS, False, False, BACK, AHEAD, SINKS, PLACED, PRECISION, ASSEMBLY,
        )  # fmt: skip
    if AHEAD or PLACED or not EVEN:
        acc, top, total = _walk(
            acc, top, total, query, i, of_i, k, v, k_at, table, 0.0, batch, group, first, end, stop,
            S, scale, before, after, sinks, reach, D, E, ROWS, COLUMNS, True, TABLE, BACK, AHEAD, SINKS, PLACED, PRECISION, ASSEMBLY,
        )  # fmt: skip

    first = block * ROWS
    n = first + tl.arange(0, ROWS)
    total = tl.where(total > 0, total, 1.0)  # an empty row's maximum is -inf, and so is its normaliser
    tl.store(lse + row.to(tl.int64) * T + n, (top + tl.log2(total)) * 0.6931471805599453, mask=n < T)
    acc /= total[:, None]
    out.store([batch, head, first, 0], acc.to(q.dtype).reshape([1, 1, ROWS, E]))
