"""The backward kernels: probabilities are made again, tile by tile, from the normalisers that the forward kept.

With p = exp(s - lse), dp = do vᵀ and ds = p (dp - Σ do·out): dv = pᵀ do, dk = dsᵀ q, dq = ds k, and each entry of a table
gets the sum of ds over its distance (Dao et al. 2022, algorithm 4). `level` is lse in units of log 2, and infinite where
a query sees nothing and beyond the last query, so that p is zero there.
"""

# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportCallIssue=false

# ruff: noqa: SIM102  of nested conditions the compiler drops those that are not asked for

from __future__ import annotations

import triton
import triton.language as tl

from dovetail.kernels.attention.triton.by_row import ended, kept, line, lines, term, term_at
from dovetail.kernels.attention.triton.tiles import looked_up, masked, met, near, places


@triton.jit(do_not_specialize=["heads", "T"])
def deltas(  # type: ignore[no-untyped-def]
    out, d_out, lse, d_lse, level, delta, heads, T, LENGTH, E: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """level and delta (B,H,LENGTH), LENGTH a multiple of ROWS: see above; delta = Σ do·out, less d_lse if there is one."""
    blocks = LENGTH // ROWS
    first, row = tl.program_id(0) % blocks * ROWS, tl.program_id(0) // blocks
    batch, head = row // heads, row % heads
    i = first + tl.arange(0, ROWS)
    given = d_out.load([batch, head, first, 0]).reshape([ROWS, E]).to(tl.float32)
    change = tl.sum(given * out.load([batch, head, first, 0]).reshape([ROWS, E]).to(tl.float32), 1)
    at = row.to(tl.int64) * T + i
    if LEVELS:
        change -= tl.load(d_lse + at, mask=i < T, other=0.0)
    found = tl.load(lse + at, mask=i < T, other=-float("inf"))
    at = row.to(tl.int64) * LENGTH + i
    tl.store(level + at, tl.where(found == -float("inf"), float("inf"), found * 1.4426950408889634))
    tl.store(delta + at, change)


@triton.jit
def _over_keys(  # type: ignore[no-untyped-def]
    acc, left, right, query, given, level, delta, i, of_i, k, v, k_at, table, d_lines, keyed, beyond, batch, group, first, shift,
    start, whole, end, stop, S, scale, before, after, sinks, reach, onward, unit,
    D: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr,
    SIDE: tl.constexpr, BACK: tl.constexpr, AHEAD: tl.constexpr, SINKS: tl.constexpr, PLACED: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr, CONTENT: tl.constexpr, KEYED: tl.constexpr,
):  # fmt: skip
    """Adds ds k of the tiles of keys from start to stop; and where the table ends (FAR) to left and right the ds that are
    `reach` or more away. SIDE: 1 where all are on the left, 2 on the right, 0 where it is to be asked."""
    for tile in tl.range(start, stop):
        other = tile * COLUMNS
        off = other - first + shift
        key = k.load([batch, group, other, 0]).reshape([COLUMNS, D])
        value = v.load([batch, group, other, 0]).reshape([COLUMNS, E])
        if KEYED:
            others = lines(keyed, other + tl.arange(0, COLUMNS), S, reach, onward)
        if NEAR:
            more = term(table, off, reach, onward, unit, ROWS, COLUMNS, False, ASSEMBLY, CONTENT, False)
            if KEYED:
                more += term(others, off, reach, onward, unit, ROWS, COLUMNS, False, ASSEMBLY, True, True)
        if FAR and SIDE == 0:
            away = tl.arange(0, COLUMNS)[None, :] - tl.arange(0, ROWS)[:, None] + off
        if NEAR and PLACED:
            if (tile < whole) | (tile >= end):
                j, _ = places(k_at, other + tl.arange(0, COLUMNS), S, True)
                more = term_at(table, i[:, None], j[None, :], reach, onward, unit, False, ASSEMBLY, CONTENT, False)
                if KEYED:
                    more += term_at(others, i[:, None], j[None, :], reach, onward, unit, False, ASSEMBLY, True, True)
                if FAR:
                    away = j[None, :] - i[:, None]
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        dp = tl.dot(given, tl.trans(value), input_precision=PRECISION)
        if NEAR:
            s = s * scale + more
        elif KEYED:
            s = s * scale + line(others + (-reach if SIDE == 1 else onward), unit, True)[None, :]
        s = masked(
            s, tile, whole, end, i, of_i, k_at, first, other, S, before, after, sinks,
            ROWS, COLUMNS, BACK, AHEAD, SINKS, PLACED, EVEN, False,
        )  # fmt: skip
        if NEAR:
            p = tl.exp2(s - level[:, None])
        elif KEYED:
            p = tl.exp2(s - (level - beyond)[:, None])
        else:
            p = tl.exp2(s * scale - (level - beyond)[:, None])
        ds = p * (dp - delta[:, None])
        if SIDE == 1:
            left += tl.sum(ds, 1)
        elif SIDE == 2:
            right += tl.sum(ds, 1)
        elif FAR:
            left += tl.sum(tl.where(away <= -reach, ds, 0.0), 1)
            right += tl.sum(tl.where(away >= onward, ds, 0.0), 1)
            if CONTENT:
                kept(d_lines, ds, away, reach, onward, unit)
        acc = tl.dot(ds.to(key.dtype), key, acc=acc, input_precision=PRECISION)
    return acc, left, right


@triton.jit
def _query(  # type: ignore[no-untyped-def]
    q, k, v, d_q, given, levels, change, table, d_table, keyed, q_at, k_at, cuts, q_step, k_step, cut_step, batch, head, block, T, S,
    scale, natural, before, after, sinks, reach, onward, unit,
    D: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAN: tl.constexpr, PAD: tl.constexpr,
    BACK: tl.constexpr, AHEAD: tl.constexpr, SINKS: tl.constexpr, TABLE: tl.constexpr, FAR: tl.constexpr,
    EVEN: tl.constexpr, PLACED: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr, CONTENT: tl.constexpr, KEYED: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, written; and its part of both ends of the table's gradient, a row each."""
    group, first, shift = head // FAN, block * ROWS, 0
    query = q.load([batch, head, first, 0]).reshape([ROWS, D])
    acc = tl.zeros([ROWS, D], tl.float32)
    left = tl.zeros([ROWS], tl.float32)
    right = tl.zeros([ROWS], tl.float32)
    i, of_i = places(q_at + batch * q_step if PLACED else q_at, first + tl.arange(0, ROWS), T, PLACED)
    if PLACED:
        k_at += batch * k_step
        start, whole, end, stop, shift = looked_up(cuts, batch, block, cut_step)
    else:
        start, whole, end, stop = met(first, S, before, after, ROWS, COLUMNS, BACK, AHEAD)
    lead, begin, close, tail, low, high = start, start, stop, stop, 0.0, 0.0
    d_lines = d_table
    if CONTENT:
        d_lines = lines(d_table, first + tl.arange(0, ROWS), T, reach, onward)
        table = lines(table, first + tl.arange(0, ROWS), T, reach, onward)
    elif TABLE:
        table += head.to(tl.int64) * (2 * (reach + PAD) + 1) + reach + PAD
    if FAR:
        low, high = line(table - reach, unit, CONTENT), line(table + onward, unit, CONTENT)
        if PLACED:  # what is not seen whole is at any distance
            lead, tail = whole, end
        begin, close = near(first - shift, reach, onward, lead, tail, ROWS, COLUMNS)
    if SINKS and not PLACED:
        acc, left, right = _over_keys(
            acc, left, right, query, given, levels, change, i, of_i, k, v, k_at, table, d_lines, keyed, 0.0, batch, group, first, shift,
            0, whole, end, tl.minimum(start, tl.cdiv(sinks, COLUMNS)), S, scale, before, after, sinks, reach, onward, unit,
            D, E, ROWS, COLUMNS, TABLE, FAR, 0, BACK, AHEAD, SINKS, PLACED, EVEN, PRECISION, ASSEMBLY, CONTENT, KEYED,
        )  # fmt: skip
    if FAR and PLACED:
        acc, left, right = _over_keys(
            acc, left, right, query, given, levels, change, i, of_i, k, v, k_at, table, d_lines, keyed, 0.0, batch, group, first, shift,
            start, whole, end, lead, S, scale, before, after, sinks, reach, onward, unit,
            D, E, ROWS, COLUMNS, True, FAR, 0, BACK, AHEAD, SINKS, PLACED, EVEN, PRECISION, ASSEMBLY, CONTENT, KEYED,
        )  # fmt: skip
    if FAR:
        acc, left, right = _over_keys(
            acc, left, right, query, given, levels, change, i, of_i, k, v, k_at, table, d_lines, keyed, low, batch, group, first, shift,
            lead, whole, end, begin, S, scale, before, after, sinks, reach, onward, unit,
            D, E, ROWS, COLUMNS, False, FAR, 1, BACK, AHEAD, SINKS, PLACED, EVEN, PRECISION, ASSEMBLY, CONTENT, KEYED,
        )  # fmt: skip
    acc, left, right = _over_keys(
        acc, left, right, query, given, levels, change, i, of_i, k, v, k_at, table, d_lines, keyed, 0.0, batch, group, first, shift,
        begin, whole, end, close, S, scale, before, after, sinks, reach, onward, unit,
        D, E, ROWS, COLUMNS, TABLE, FAR, 0, BACK, AHEAD, SINKS, PLACED, EVEN, PRECISION, ASSEMBLY, CONTENT, KEYED,
    )  # fmt: skip
    if FAR:
        acc, left, right = _over_keys(
            acc, left, right, query, given, levels, change, i, of_i, k, v, k_at, table, d_lines, keyed, high, batch, group, first, shift,
            close, whole, end, tail, S, scale, before, after, sinks, reach, onward, unit,
            D, E, ROWS, COLUMNS, False, FAR, 2, BACK, AHEAD, SINKS, PLACED, EVEN, PRECISION, ASSEMBLY, CONTENT, KEYED,
        )  # fmt: skip
    if FAR and PLACED:
        acc, left, right = _over_keys(
            acc, left, right, query, given, levels, change, i, of_i, k, v, k_at, table, d_lines, keyed, 0.0, batch, group, first, shift,
            tail, whole, end, stop, S, scale, before, after, sinks, reach, onward, unit,
            D, E, ROWS, COLUMNS, True, FAR, 0, BACK, AHEAD, SINKS, PLACED, EVEN, PRECISION, ASSEMBLY, CONTENT, KEYED,
        )  # fmt: skip
    if CONTENT:
        ended(d_lines, left, right, first + tl.arange(0, ROWS) < T, reach, onward, unit)
    d_q.store([batch, head, first, 0], (acc * natural).to(q.dtype).reshape([1, 1, ROWS, D]))
    return left, right


@triton.jit(
    do_not_specialize=[
        "q_step", "k_step", "cut_step", "heads", "T", "S", "before", "after", "sinks", "reach", "onward", "before2", "after2", "sinks2",
    ]
)  # fmt: skip
def queries(  # type: ignore[no-untyped-def]
    q, k, v, d_out, d_q, level, delta, table, d_table, keyed, q_at, k_at, cuts, q_step, k_step, cut_step, heads, T, S, LENGTH,
    scale, natural, before, after, sinks, reach, onward, unit, d_q2, q2, k2, cuts2, before2, after2, sinks2,
    D: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAN: tl.constexpr, PAD: tl.constexpr,
    BACK: tl.constexpr, AHEAD: tl.constexpr, SINKS: tl.constexpr, TABLE: tl.constexpr, FAR: tl.constexpr,
    EVEN: tl.constexpr, PLACED: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr, CONTENT: tl.constexpr, KEYED: tl.constexpr,
    PAIR: tl.constexpr, BACK2: tl.constexpr, AHEAD2: tl.constexpr, SINKS2: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries of one head; and into d_table (2,B·H,tiles) its part of both ends of the table's gradient.
    PAIR: of the second form of queries too."""
    blocks = tl.cdiv(T, ROWS)
    block = blocks - 1 - tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks
    batch, head = row // heads, row % heads
    first = block * ROWS
    given = d_out.load([batch, head, first, 0]).reshape([ROWS, E])
    at = row.to(tl.int64) * LENGTH + first + tl.arange(0, ROWS)
    levels, change = tl.load(level + at), tl.load(delta + at)
    if CONTENT:
        table += row.to(tl.int64) * T * (reach + onward + 1)
        d_table += row.to(tl.int64) * T * (reach + onward + 1)
        if KEYED:
            keyed += row.to(tl.int64) * S * (reach + onward + 1)
    else:
        onward = reach
    left, right = _query(
        q, k, v, d_q, given, levels, change, table, d_table, keyed, q_at, k_at, cuts, q_step, k_step, cut_step, batch, head, block, T, S,
        scale, natural, before, after, sinks, reach, onward, unit,
        D, E, ROWS, COLUMNS, FAN, PAD, BACK, AHEAD, SINKS, TABLE, FAR, EVEN, PLACED, PRECISION, ASSEMBLY, CONTENT, KEYED,
    )  # fmt: skip
    if PAIR:
        _query(
            q2, k2, v, d_q2, given, levels, change, table, d_table, keyed, q_at, k_at, cuts2, q_step, k_step, cut_step, batch, head, block,
            T, S, scale, natural, before2, after2, sinks2, reach, onward, unit,
            D, E, ROWS, COLUMNS, FAN, PAD, BACK2, AHEAD2, SINKS2, TABLE, FAR, EVEN, PLACED, PRECISION, ASSEMBLY, CONTENT, KEYED,
        )  # fmt: skip
    if FAR and not CONTENT:
        tl.store(d_table + row * blocks + block, tl.sum(left, 0))
        tl.store(d_table + tl.num_programs(0) + row * blocks + block, tl.sum(right, 0))


@triton.jit
def _over_queries(  # type: ignore[no-untyped-def]
    d_key, d_value, left, right, key, value, j, of_j, q, d_out, q_at, level, delta, table, keyed, d_keyed, beyond, batch, head, first, shift,
    start, whole, end, stop, T, scale, before, after, sinks, reach, onward, unit,
    D: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NEAR: tl.constexpr, SIDE: tl.constexpr, BACK: tl.constexpr,
    AHEAD: tl.constexpr, SINKS: tl.constexpr, PLACED: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr, CONTENT: tl.constexpr, KEYED: tl.constexpr,
):  # fmt: skip
    """Adds pᵀ do and dsᵀ q of the tiles of queries from start to stop; all is turned, (keys, queries). CONTENT: `beyond`
    is the distance whose term all keys get, where not NEAR. KEYED: keys have `lines` too, whose gradient arises here; SIDE: as
    `_over_keys` has it."""
    for tile in tl.range(start, stop):
        other = tile * COLUMNS
        off = first - other + shift
        query = q.load([batch, head, other, 0]).reshape([COLUMNS, D])
        given = d_out.load([batch, head, other, 0]).reshape([COLUMNS, E])
        n = other + tl.arange(0, COLUMNS)
        levels, change = tl.load(level + n), tl.load(delta + n)
        own, less = table, beyond
        if CONTENT:
            own = lines(table, n, T, reach, onward)
            if not NEAR:
                less = line(own + beyond, unit, True)
        if KEYED and NEAR:
            away = tl.arange(0, ROWS)[:, None] - tl.arange(0, COLUMNS)[None, :] + off
        if NEAR:
            more = term(own, off, reach, onward, unit, ROWS, COLUMNS, True, ASSEMBLY, CONTENT, False)
            if KEYED:
                more += term(keyed, off, reach, onward, unit, ROWS, COLUMNS, True, ASSEMBLY, True, True)
            if PLACED:
                if (tile < whole) | (tile >= end):
                    i, _ = places(q_at, n, T, True)
                    more = term_at(own, i[None, :], j[:, None], reach, onward, unit, True, ASSEMBLY, CONTENT, False)
                    if KEYED:
                        more += term_at(keyed, i[None, :], j[:, None], reach, onward, unit, True, ASSEMBLY, True, True)
                        away = j[:, None] - i[None, :]
        s = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        dp = tl.dot(value, tl.trans(given), input_precision=PRECISION)
        if NEAR:
            s = s * scale + more
        elif KEYED:
            s = s * scale + line(keyed + beyond, unit, True)[:, None]
        s = masked(
            s, tile, whole, end, j, of_j, q_at, first, other, T, before, after, sinks,
            ROWS, COLUMNS, BACK, AHEAD, SINKS, PLACED, True, True,
        )  # fmt: skip
        if NEAR:
            p = tl.exp2(s - levels[None, :])
        elif KEYED:
            p = tl.exp2(s - (levels - less)[None, :])
        else:
            p = tl.exp2(s * scale - (levels - less)[None, :])
        d_value = tl.dot(p.to(given.dtype), given, acc=d_value, input_precision=PRECISION)
        ds = p * (dp - change[None, :])
        if KEYED:
            if SIDE == 1:
                left += tl.sum(ds, 1)
            elif SIDE == 2:
                right += tl.sum(ds, 1)
            else:
                left += tl.sum(tl.where(away <= -reach, ds, 0.0), 1)
                right += tl.sum(tl.where(away >= onward, ds, 0.0), 1)
                kept(d_keyed, tl.where(of_j[:, None] >= 0, ds, 0.0), away, reach, onward, unit)
        d_key = tl.dot(ds.to(query.dtype), query, acc=d_key, input_precision=PRECISION)
    return d_key, d_value, left, right


@triton.jit
def _key(  # type: ignore[no-untyped-def]
    d_value, q, k, value, d_out, d_k, level, delta, table, keyed, d_keyed, q_at, k_at, cuts, q_step, k_step, cut_step, heads, batch, group,
    block, T, S, LENGTH, scale, natural, before, after, sinks, reach, onward, unit,
    D: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAN: tl.constexpr, PAD: tl.constexpr,
    BACK: tl.constexpr, AHEAD: tl.constexpr, SINKS: tl.constexpr, TABLE: tl.constexpr, FAR: tl.constexpr,
    PLACED: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr, CONTENT: tl.constexpr, KEYED: tl.constexpr,
):  # fmt: skip
    """dk of one tile of keys, written, and what it adds to dv."""
    first, shift = block * ROWS, 0
    key = k.load([batch, group, first, 0]).reshape([ROWS, D])
    d_key = tl.zeros([ROWS, D], tl.float32)
    j, of_j = places(k_at + batch * k_step if PLACED else k_at, first + tl.arange(0, ROWS), S, PLACED)
    if PLACED:
        q_at += batch * q_step
        start, whole, end, stop, shift = looked_up(cuts, batch, block, cut_step)
    else:
        start, whole, end, stop = met(first, T, after, before, ROWS, COLUMNS, AHEAD, BACK)
        if SINKS:
            if first < sinks:
                stop = tl.cdiv(T, COLUMNS)
    lead, begin, close, tail = start, start, stop, stop
    if FAR:
        if PLACED:
            lead, tail = whole, end
        begin, close = near(first + shift, onward, reach, lead, tail, ROWS, COLUMNS)
    for member in range(FAN):
        head = group * FAN + member
        at = (batch * heads + head).to(tl.int64) * LENGTH
        centre, low, high, own, d_own = table, 0.0, 0.0, keyed, d_keyed
        left, right = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        if KEYED:
            ours = (batch * heads + head).to(tl.int64) * S * (reach + onward + 1)
            own = lines(keyed + ours, first + tl.arange(0, ROWS), S, reach, onward)
            d_own = lines(d_keyed + ours, first + tl.arange(0, ROWS), S, reach, onward)
        if CONTENT:
            centre, low, high = table + (batch * heads + head).to(tl.int64) * T * (reach + onward + 1), -reach, onward
        elif TABLE:
            centre = table + head.to(tl.int64) * (2 * (reach + PAD) + 1) + reach + PAD
            if FAR:
                low, high = tl.load(centre - reach), tl.load(centre + reach)
        if FAR and PLACED:
            d_key, d_value, left, right = _over_queries(
                d_key, d_value, left, right, key, value, j, of_j, q, d_out, q_at, level + at, delta + at, centre, own, d_own, 0.0, batch, head,
                first, shift, start, whole, end, lead, T, scale, before, after, sinks, reach, onward, unit,
                D, E, ROWS, COLUMNS, True, 0, BACK, AHEAD, SINKS, PLACED, PRECISION, ASSEMBLY, CONTENT, KEYED,
            )  # fmt: skip
        if FAR:
            d_key, d_value, left, right = _over_queries(
                d_key, d_value, left, right, key, value, j, of_j, q, d_out, q_at, level + at, delta + at, centre, own, d_own, high, batch, head,
                first, shift, lead, whole, end, begin, T, scale, before, after, sinks, reach, onward, unit,
                D, E, ROWS, COLUMNS, False, 2, BACK, AHEAD, SINKS, PLACED, PRECISION, ASSEMBLY, CONTENT, KEYED,
            )  # fmt: skip
        d_key, d_value, left, right = _over_queries(
            d_key, d_value, left, right, key, value, j, of_j, q, d_out, q_at, level + at, delta + at, centre, own, d_own, 0.0, batch, head,
            first, shift, begin, whole, end, close, T, scale, before, after, sinks, reach, onward, unit,
            D, E, ROWS, COLUMNS, TABLE, 0, BACK, AHEAD, SINKS, PLACED, PRECISION, ASSEMBLY, CONTENT, KEYED,
        )  # fmt: skip
        if FAR:
            d_key, d_value, left, right = _over_queries(
                d_key, d_value, left, right, key, value, j, of_j, q, d_out, q_at, level + at, delta + at, centre, own, d_own, low, batch, head,
                first, shift, close, whole, end, tail, T, scale, before, after, sinks, reach, onward, unit,
                D, E, ROWS, COLUMNS, False, 1, BACK, AHEAD, SINKS, PLACED, PRECISION, ASSEMBLY, CONTENT, KEYED,
            )  # fmt: skip
        if FAR and PLACED:
            d_key, d_value, left, right = _over_queries(
                d_key, d_value, left, right, key, value, j, of_j, q, d_out, q_at, level + at, delta + at, centre, own, d_own, 0.0, batch, head,
                first, shift, tail, whole, end, stop, T, scale, before, after, sinks, reach, onward, unit,
                D, E, ROWS, COLUMNS, True, 0, BACK, AHEAD, SINKS, PLACED, PRECISION, ASSEMBLY, CONTENT, KEYED,
            )  # fmt: skip
        if KEYED:
            ended(d_own, left, right, first + tl.arange(0, ROWS) < S, reach, onward, unit)
    d_k.store([batch, group, first, 0], (d_key * natural).to(k.dtype).reshape([1, 1, ROWS, D]))
    return d_value


@triton.jit(
    do_not_specialize=[
        "q_step", "k_step", "cut_step", "heads", "T", "S", "before", "after", "sinks", "reach", "onward", "before2", "after2", "sinks2",
    ]
)  # fmt: skip
def keys(  # type: ignore[no-untyped-def]
    q, k, v, d_out, d_k, d_v, level, delta, table, keyed, d_keyed, q_at, k_at, cuts, q_step, k_step, cut_step, heads, T, S, LENGTH,
    scale, natural, before, after, sinks, reach, onward, unit, d_k2, q2, k2, cuts2, before2, after2, sinks2,
    D: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAN: tl.constexpr, PAD: tl.constexpr,
    BACK: tl.constexpr, AHEAD: tl.constexpr, SINKS: tl.constexpr, TABLE: tl.constexpr, FAR: tl.constexpr,
    PLACED: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr, CONTENT: tl.constexpr, KEYED: tl.constexpr,
    PAIR: tl.constexpr, BACK2: tl.constexpr, AHEAD2: tl.constexpr, SINKS2: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, from the FAN heads of queries that read it. PAIR: dk of the second form of keys too,
    and dv of both."""
    blocks = tl.cdiv(S, ROWS)
    block, row = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    groups = heads // FAN
    batch, group = row // groups, row % groups
    value = v.load([batch, group, block * ROWS, 0]).reshape([ROWS, E])
    d_value = tl.zeros([ROWS, E], tl.float32)
    if not CONTENT:
        onward = reach
    d_value = _key(
        d_value, q, k, value, d_out, d_k, level, delta, table, keyed, d_keyed, q_at, k_at, cuts, q_step, k_step, cut_step, heads, batch,
        group, block, T, S, LENGTH, scale, natural, before, after, sinks, reach, onward, unit,
        D, E, ROWS, COLUMNS, FAN, PAD, BACK, AHEAD, SINKS, TABLE, FAR, PLACED, PRECISION, ASSEMBLY, CONTENT, KEYED,
    )  # fmt: skip
    if PAIR:
        d_value = _key(
            d_value, q2, k2, value, d_out, d_k2, level, delta, table, keyed, d_keyed, q_at, k_at, cuts2, q_step, k_step, cut_step, heads,
            batch, group, block, T, S, LENGTH, scale, natural, before2, after2, sinks2, reach, onward, unit,
            D, E, ROWS, COLUMNS, FAN, PAD, BACK2, AHEAD2, SINKS2, TABLE, FAR, PLACED, PRECISION, ASSEMBLY, CONTENT, KEYED,
        )  # fmt: skip
    d_v.store([batch, group, block * ROWS, 0], d_value.to(v.dtype).reshape([1, 1, ROWS, E]))
