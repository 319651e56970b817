"""What every kernel asks about a tile: which others it meets, who in it sees whom, what the table adds.

A query i and a key j are `j - i` apart. Queries see keys from `before` behind them to `after` ahead of them: BACK and
AHEAD say which of the two bounds there are. SINKS: keys below `sinks`, which the bound behind does not hide.
"""

# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

# ruff: noqa: SIM102  of nested conditions the compiler drops those that are not asked for

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def met(first, length, before, after, TILE: tl.constexpr, STEP: tl.constexpr, BACK: tl.constexpr, AHEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tiles of STEP among `length` keys that TILE queries from `first` on meet: from start to stop some of them sees
    some of each. Tiles before `whole` are cut by the bound behind, those from `end` on by the bound ahead or by the last
    key; a narrow band has tiles that are both. (Of queries that keys meet, with both bounds exchanged.)"""
    last = first + TILE - 1
    start, whole = first * 0, first * 0
    stop, end = tl.cdiv(length, STEP), length // STEP
    if BACK:
        start = tl.maximum(first - before, 0) // STEP
        whole = tl.cdiv(tl.maximum(last - before, 0), STEP)
    if AHEAD:
        stop = tl.minimum(stop, tl.cdiv(tl.maximum(last + after + 1, 0), STEP))
        end = tl.minimum(end, tl.maximum(first + after + 1, 0) // STEP)
    return tl.minimum(start, stop), whole, end, stop


@triton.jit
def near(first, reach, onward, start, stop, TILE: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which of the tiles from start to stop hold a distance between -reach and onward, both left out: those before hold none
    beyond the one, those behind none below the other. (Of queries that keys meet, with both exchanged.)"""
    begin = tl.maximum(first - reach + 1, 0) // STEP
    begin = tl.minimum(tl.maximum(begin, start), stop)
    end = tl.cdiv(tl.maximum(first + TILE - 1 + onward, 0), STEP)
    return begin, tl.minimum(tl.maximum(end, begin), stop)


@triton.jit
def places(at, n, N, PLACED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Order and segment of tokens n, of which there are N; no segment beyond them. Not PLACED: all of one, in order."""
    if PLACED:
        order = tl.load(at + n, mask=n < N, other=0)
        segment = tl.load(at + N + n, mask=n < N, other=-1)
    else:
        order = n
        segment = tl.where(n < N, 0, -1)
    return order, segment


@triton.jit
def seen(  # type: ignore[no-untyped-def]
    i, j, of_i, of_j, before, after, sinks, BACK: tl.constexpr, AHEAD: tl.constexpr, SINKS: tl.constexpr,
    PLACED: tl.constexpr,
):  # fmt: skip
    """Whether queries of order i in segments of_i see keys j in of_j; all broadcast against each other."""
    shown = of_j >= 0
    if PLACED:
        shown = shown & (of_i == of_j)
    if AHEAD:
        shown = shown & (j - i <= after)
    if BACK:
        close = i - j <= before
        shown = shown & ((close | (j < sinks)) if SINKS else close)
    return shown


@triton.jit
def masked(  # type: ignore[no-untyped-def]
    s, tile, whole, end, i, of_i, at, first, other, N, before, after, sinks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BACK: tl.constexpr, AHEAD: tl.constexpr, SINKS: tl.constexpr,
    PLACED: tl.constexpr, EVEN: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Scores s of ROWS queries from `first` on and COLUMNS of N keys from `other` on, -inf where a key is not seen.

    Asked of tiles before `whole` and from `end` on alone, and of each of these no more than the bound that cuts it: a
    comparison of a column's number with one number a row. i, of_i: order and segment of the rows, `at` of the columns.
    TURNED: (keys, queries), whose bounds are exchanged; queries beyond the last one have no share in anything anyway.
    """
    if PLACED:
        if (tile < whole) | (tile >= end):
            j, of_j = places(at, other + tl.arange(0, COLUMNS), N, True)
            if TURNED:
                shown = seen(
                    j[None, :], i[:, None], of_j[None, :], of_i[:, None], before, after, sinks, BACK, AHEAD, SINKS, True
                )
            else:
                shown = seen(
                    i[:, None], j[None, :], of_i[:, None], of_j[None, :], before, after, sinks, BACK, AHEAD, SINKS, True
                )
            s = tl.where(shown, s, -float("inf"))
    else:
        x, y = tl.arange(0, ROWS) + (first - other), tl.arange(0, COLUMNS)
        if TURNED:
            if AHEAD:
                if tile < whole:
                    s = tl.where(y[None, :] >= (x - after)[:, None], s, -float("inf"))
            if BACK:
                if tile >= end:
                    last = x + before
                    if SINKS:
                        last = tl.where(x + other < sinks, COLUMNS, last)
                    s = tl.where(y[None, :] <= last[:, None], s, -float("inf"))
        else:
            if BACK:
                if tile < whole:
                    shown = y[None, :] >= (x - before)[:, None]
                    if SINKS:
                        shown = shown | (y[None, :] < sinks - other)
                    s = tl.where(shown, s, -float("inf"))
            if AHEAD or not EVEN:
                if tile >= end:
                    last = x * 0 + (N - 1 - other)
                    if AHEAD:
                        last = tl.minimum(last, x + after)
                    s = tl.where(y[None, :] <= last[:, None], s, -float("inf"))
    return s


@triton.jit
def _read(entry, ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """What stands there. A load of Triton's own would go through shared memory to where the product's scores are."""
    if ASSEMBLY:
        found = tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [entry.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        found = tl.load(entry)
    return found


@triton.jit
def added(table, away, reach, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr, ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """The table's entries for a tile (ROWS queries, COLUMNS keys; TURNED: keys, queries) whose first key is `away`
    from its first query. `table` points at distance 0, and is constant from `reach` on, ROWS + COLUMNS entries on.

    Offsets are 64 bits wide so that a thread's addresses are one and constants, which loads add for nothing.
    """
    rows, columns = tl.arange(0, ROWS).to(tl.int64), tl.arange(0, COLUMNS).to(tl.int64)
    if TURNED:
        away = tl.minimum(tl.maximum(away, -reach - ROWS), reach + COLUMNS)
        entry = table + away + (rows[:, None] - columns[None, :])
    else:
        away = tl.minimum(tl.maximum(away, -reach - COLUMNS), reach + ROWS)
        entry = table + away + (columns[None, :] - rows[:, None])
    return _read(entry, ASSEMBLY)


@triton.jit
def extremes(x, real):  # type: ignore[no-untyped-def]
    """The smallest x and the largest of those that are real."""
    return tl.min(tl.where(real, x, 2**30), 0), tl.max(tl.where(real, x, -(2**30)), 0)


@triton.jit(do_not_specialize=["N", "M", "own_step", "other_step", "before", "after", "sinks"])
def cuts(  # type: ignore[no-untyped-def]
    own, other, found, N, M, own_step, other_step, before, after, sinks, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TURNED: tl.constexpr, BACK: tl.constexpr, AHEAD: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """`met` of tokens with places: found (rows,tiles,5) start, whole, end, stop, and by how much less keys are behind queries
    between whole and end than their indices say. TURNED: `own` are keys, and `other` queries."""
    blocks = tl.cdiv(N, ROWS)
    block, batch = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    n = block * ROWS + tl.arange(0, ROWS)
    order, segment = places(own + batch * own_step, n, N, True)
    low, high = extremes(order, n < N)
    first, last = extremes(segment, n < N)
    slip, slid = extremes(order - n, n < N)
    tiles = tl.cdiv(M, COLUMNS)
    start, stop, whole, end, count = tiles, tiles * 0, tiles, tiles * 0, tiles * 0
    shift, shifts = tiles * 0 + 2**30, tiles * 0 - 2**30
    for tile in range(tiles):
        m = tile * COLUMNS + tl.arange(0, COLUMNS)
        orders, segments = places(other + batch * other_step, m, M, True)
        bottom, top = extremes(orders, m < M)
        one, another = extremes(segments, m < M)
        drift, drifted = extremes(orders - m, m < M)
        some = (first <= another) & (one <= last) & (another >= 0) & (last >= 0)
        every = (first == last) & (one == another) & (first == one) & (slip == slid) & (drift == drifted)
        if not TURNED:
            every = every & ((tile + 1) * COLUMNS <= M)
        query, queries, key, keys = low, high, bottom, top
        between = drift - slip
        if TURNED:
            query, queries, key, keys = bottom, top, low, high
            between = slip - drift
        if AHEAD:
            some = some & (key - queries <= after)
            every = every & (keys - query <= after)
        if BACK:
            close = query - keys <= before
            some = some & ((close | (key < sinks)) if SINKS else close)
            every = every & (queries - key <= before)
        every = every & some
        start, stop = tl.where(some, tl.minimum(start, tile), start), tl.where(some, tile + 1, stop)
        whole, end = tl.where(every, tl.minimum(whole, tile), whole), tl.where(every, tile + 1, end)
        shift, shifts = (
            tl.where(every, tl.minimum(shift, between), shift),
            tl.where(every, tl.maximum(shifts, between), shifts),
        )
        count += tl.where(every, 1, 0)
    together = (count > 0) & (end - whole == count) & (shift == shifts)
    at = found + (batch * blocks + block) * 5
    tl.store(at, tl.minimum(start, stop))
    tl.store(at + 1, tl.where(together, whole, stop))
    tl.store(at + 2, tl.where(together, end, stop))
    tl.store(at + 3, stop)
    tl.store(at + 4, tl.where(together, shift, 0))


@triton.jit
def looked_up(cuts, batch, block, step):  # type: ignore[no-untyped-def]
    """What `cuts` found for a tile; step: tiles of a row, or 0 where rows are alike."""
    at = cuts + (batch * step + block) * 5
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)


@triton.jit
def entries(table, i, j, reach, ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """The table's entries for any i and j that broadcast against each other."""
    return _read(table + tl.minimum(tl.maximum(j - i, -reach), reach), ASSEMBLY)
