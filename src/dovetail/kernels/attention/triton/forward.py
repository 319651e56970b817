"""The forward kernel: a program holds a tile of queries and walks the tiles of keys that they see.

softmax(s) v needs the maximum m and the sum of exp(s - m) over all keys; both are kept for the keys so far, and what is
summed is scaled down whenever m rises (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1). Scores are in units
of log 2, because the processor has exp2.

Tiles that are seen in part are walked with the others, in one loop: a loop of their own would wait for its first tiles.
"""

# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportCallIssue=false

# ruff: noqa: SIM102  of nested conditions the compiler drops those that are not asked for

from __future__ import annotations

import triton
import triton.language as tl

from dovetail.kernels.attention.triton.by_row import line, lines, term, term_at
from dovetail.kernels.attention.triton.tiles import looked_up, masked, met, near, places


@triton.jit
def _walk(  # type: ignore[no-untyped-def]
    acc, top, total, query, i, of_i, k, v, k_at, table, keyed, beyond, side, batch, group, first, shift, start, whole, end, stop, S,
    scale, before, after, sinks, reach, onward, unit,
    D: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NEAR: tl.constexpr, BACK: tl.constexpr,
    AHEAD: tl.constexpr, SINKS: tl.constexpr, PLACED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ASSEMBLY: tl.constexpr, CONTENT: tl.constexpr, KEYED: tl.constexpr,
):  # fmt: skip
    """Tiles of keys from start to stop, whole ones between `whole` and `end`. NEAR: the table adds to each score its entry,
    and otherwise to all alike `beyond`. i, of_i: order and segment of the queries, `first` the index of the first."""
    for tile in tl.range(start, stop):
        other = tile * COLUMNS
        off = other - first + shift
        key = k.load([batch, group, other, 0]).reshape([COLUMNS, D])
        if KEYED:
            others = lines(keyed, other + tl.arange(0, COLUMNS), S, reach, onward)
        if NEAR:  # before the product, so that both are on the way together
            more = term(table, off, reach, onward, unit, ROWS, COLUMNS, False, ASSEMBLY, CONTENT, False)
            if KEYED:
                more += term(others, off, reach, onward, unit, ROWS, COLUMNS, False, ASSEMBLY, True, True)
            if PLACED:
                if (tile < whole) | (tile >= end):
                    j, _ = places(k_at, other + tl.arange(0, COLUMNS), S, True)
                    more = term_at(table, i[:, None], j[None, :], reach, onward, unit, False, ASSEMBLY, CONTENT, False)
                    if KEYED:
                        more += term_at(
                            others, i[:, None], j[None, :], reach, onward, unit, False, ASSEMBLY, True, True
                        )
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if NEAR:
            s = s * scale + more
        elif KEYED:
            s = s * scale + line(others + side, unit, True)[None, :]
        s = masked(
            s, tile, whole, end, i, of_i, k_at, first, other, S, before, after, sinks,
            ROWS, COLUMNS, BACK, AHEAD, SINKS, PLACED, EVEN, False,
        )  # fmt: skip
        if NEAR:
            higher = tl.maximum(top, tl.max(s, 1))
            level = tl.where(higher == -float("inf"), 0.0, higher)  # a query that has seen no key yet
            p = tl.exp2(s - level[:, None])
        elif KEYED:
            higher = tl.maximum(top, tl.max(s, 1) + beyond)
            level = tl.where(higher == -float("inf"), 0.0, higher)
            p = tl.exp2(s - (level - beyond)[:, None])
        else:
            higher = tl.maximum(top, tl.max(s, 1) * scale + beyond)
            level = tl.where(higher == -float("inf"), 0.0, higher)
            p = tl.exp2(s * scale - (level - beyond)[:, None])
        keep = tl.exp2(top - level)
        total = total * keep + tl.sum(p, 1)
        acc *= keep[:, None]
        value = v.load([batch, group, other, 0]).reshape([COLUMNS, E])
        acc = tl.dot(p.to(value.dtype), value, acc=acc, input_precision=PRECISION)
        top = higher
    return acc, top, total


@triton.jit
def _keys(  # type: ignore[no-untyped-def]
    acc, top, total, q, k, v, table, keyed, q_at, k_at, cuts, q_step, k_step, cut_step, batch, head, block, T, S, scale,
    before, after, sinks, reach, onward, unit,
    D: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAN: tl.constexpr, PAD: tl.constexpr,
    BACK: tl.constexpr, AHEAD: tl.constexpr, SINKS: tl.constexpr, TABLE: tl.constexpr, FAR: tl.constexpr,
    EVEN: tl.constexpr, PLACED: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr, CONTENT: tl.constexpr, KEYED: tl.constexpr,
):  # fmt: skip
    """All keys that a tile of queries sees."""
    group, first, shift = head // FAN, block * ROWS, 0
    query = q.load([batch, head, first, 0]).reshape([ROWS, D])
    i, of_i = places(q_at + batch * q_step if PLACED else q_at, first + tl.arange(0, ROWS), T, PLACED)
    if PLACED:
        k_at += batch * k_step
        start, whole, end, stop, shift = looked_up(cuts, batch, block, cut_step)
    else:
        start, whole, end, stop = met(first, S, before, after, ROWS, COLUMNS, BACK, AHEAD)
    lead, begin, close, tail, left, right = start, start, stop, stop, 0.0, 0.0
    if CONTENT:
        table = lines(table, first + tl.arange(0, ROWS), T, reach, onward)
    elif TABLE:
        table += head.to(tl.int64) * (2 * (reach + PAD) + 1) + reach + PAD
    if FAR:
        left, right = line(table - reach, unit, CONTENT), line(table + onward, unit, CONTENT)
        if PLACED:  # what is not seen whole is at any distance
            lead, tail = whole, end
        begin, close = near(first - shift, reach, onward, lead, tail, ROWS, COLUMNS)
    if SINKS and not PLACED:
        acc, top, total = _walk(
            acc, top, total, query, i, of_i, k, v, k_at, table, keyed, 0.0, 0, batch, group, first, shift,
            0, whole, end, tl.minimum(start, tl.cdiv(sinks, COLUMNS)), S, scale, before, after, sinks, reach, onward, unit,
            D, E, ROWS, COLUMNS, TABLE, BACK, AHEAD, SINKS, PLACED, EVEN, PRECISION, ASSEMBLY, CONTENT, KEYED,
        )  # fmt: skip
    if FAR and PLACED:
        acc, top, total = _walk(
            acc, top, total, query, i, of_i, k, v, k_at, table, keyed, 0.0, 0, batch, group, first, shift,
            start, whole, end, lead, S, scale, before, after, sinks, reach, onward, unit,
            D, E, ROWS, COLUMNS, True, BACK, AHEAD, SINKS, PLACED, EVEN, PRECISION, ASSEMBLY, CONTENT, KEYED,
        )  # fmt: skip
    if FAR:
        acc, top, total = _walk(
            acc, top, total, query, i, of_i, k, v, k_at, table, keyed, left, -reach, batch, group, first, shift,
            lead, whole, end, begin, S, scale, before, after, sinks, reach, onward, unit,
            D, E, ROWS, COLUMNS, False, BACK, AHEAD, SINKS, PLACED, EVEN, PRECISION, ASSEMBLY, CONTENT, KEYED,
        )  # fmt: skip
    acc, top, total = _walk(
        acc, top, total, query, i, of_i, k, v, k_at, table, keyed, 0.0, 0, batch, group, first, shift,
        begin, whole, end, close, S, scale, before, after, sinks, reach, onward, unit,
        D, E, ROWS, COLUMNS, TABLE, BACK, AHEAD, SINKS, PLACED, EVEN, PRECISION, ASSEMBLY, CONTENT, KEYED,
    )  # fmt: skip
    if FAR:
        acc, top, total = _walk(
            acc, top, total, query, i, of_i, k, v, k_at, table, keyed, right, onward, batch, group, first, shift,
            close, whole, end, tail, S, scale, before, after, sinks, reach, onward, unit,
            D, E, ROWS, COLUMNS, False, BACK, AHEAD, SINKS, PLACED, EVEN, PRECISION, ASSEMBLY, CONTENT, KEYED,
        )  # fmt: skip
    if FAR and PLACED:
        acc, top, total = _walk(
            acc, top, total, query, i, of_i, k, v, k_at, table, keyed, 0.0, 0, batch, group, first, shift,
            tail, whole, end, stop, S, scale, before, after, sinks, reach, onward, unit,
            D, E, ROWS, COLUMNS, True, BACK, AHEAD, SINKS, PLACED, EVEN, PRECISION, ASSEMBLY, CONTENT, KEYED,
        )  # fmt: skip
    return acc, top, total


@triton.jit(
    do_not_specialize=[
        "q_step", "k_step", "cut_step", "heads", "T", "S", "before", "after", "sinks", "reach", "onward", "before2", "after2", "sinks2",
    ]
)  # fmt: skip
def attend(  # type: ignore[no-untyped-def]
    q, k, v, out, lse, table, keyed, q_at, k_at, cuts, q_step, k_step, cut_step, heads, T, S, scale, before, after, sinks, reach, onward, unit,
    q2, k2, cuts2, before2, after2, sinks2,
    D: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAN: tl.constexpr, PAD: tl.constexpr,
    BACK: tl.constexpr, AHEAD: tl.constexpr, SINKS: tl.constexpr, TABLE: tl.constexpr, FAR: tl.constexpr,
    EVEN: tl.constexpr, PLACED: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr, CONTENT: tl.constexpr, KEYED: tl.constexpr,
    PAIR: tl.constexpr, BACK2: tl.constexpr, AHEAD2: tl.constexpr, SINKS2: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. q, k, v, out: descriptors of (B,heads,T,D) and so on. lse (B,H,T), natural.

    scale: with log2(e). table (H, 2·(reach + PAD) + 1), with log2(e), by distance. FAR: whether some are beyond its reach.
    CONTENT: table (B,H,T,reach+onward+1) has a row a query, in units of `unit` (`by_row`). KEYED: so has keyed (B,H,S,...) a key.
    PLACED: tokens have places (B|1,2,T), order and segment, and steps lead from row to row of them and of their `cuts`.
    PAIR: the same tokens have queries and keys in a second form too, in which they see each other within other bounds.
    """
    blocks = tl.cdiv(T, ROWS)
    block = blocks - 1 - tl.program_id(0) % blocks  # where masks are causal, the longest first
    row = tl.program_id(0) // blocks
    batch, head = row // heads, row % heads
    acc = tl.zeros([ROWS, E], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = total - float("inf")
    if CONTENT:
        table += row.to(tl.int64) * T * (reach + onward + 1)
        if KEYED:
            keyed += row.to(tl.int64) * S * (reach + onward + 1)
    else:
        onward = reach
    acc, top, total = _keys(
        acc, top, total, q, k, v, table, keyed, q_at, k_at, cuts, q_step, k_step, cut_step, batch, head, block, T, S, scale,
        before, after, sinks, reach, onward, unit, D, E, ROWS, COLUMNS, FAN, PAD, BACK, AHEAD, SINKS, TABLE, FAR, EVEN, PLACED,
        PRECISION, ASSEMBLY, CONTENT, KEYED,
    )  # fmt: skip
    if PAIR:
        acc, top, total = _keys(
            acc, top, total, q2, k2, v, table, keyed, q_at, k_at, cuts2, q_step, k_step, cut_step, batch, head, block, T, S, scale,
            before2, after2, sinks2, reach, onward, unit, D, E, ROWS, COLUMNS, FAN, PAD, BACK2, AHEAD2, SINKS2, TABLE, FAR, EVEN, PLACED,
            PRECISION, ASSEMBLY, CONTENT, KEYED,
        )  # fmt: skip
    first = block * ROWS
    n = first + tl.arange(0, ROWS)
    total = tl.where(total > 0, total, 1.0)  # an empty row's maximum is -inf, and so is its normaliser
    tl.store(lse + row.to(tl.int64) * T + n, (top + tl.log2(total)) * 0.6931471805599453, mask=n < T)
    acc /= total[:, None]
    out.store([batch, head, first, 0], acc.to(q.dtype).reshape([1, 1, ROWS, E]))
