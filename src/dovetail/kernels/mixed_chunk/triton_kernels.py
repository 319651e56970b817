"""The Triton kernels of mixed chunk attention; `triton` launches them, and says what their roles are.

Rows of a program: queries i with keys j <= i, or in REVERSE keys i with queries j >= i. A program is of one span and
meets the span's tokens pair by pair, up to the `edge` of another; a state has what is beyond. Without RAGGED a span is
a chunk. With it chunks begin anywhere: pairs are of one chunk or of two chunks of a document, and are told apart by
`begin`, where a token's chunk begins.
"""

# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from dovetail.kernels.linear_attention.triton_kernels import tokens


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    edges, batch, n, first, T, N, span,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, REVERSE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """The span's end; the partners [low, high) of rows from `first` on; the state that they read, and whether one."""
    stop = tl.minimum(T, (n + 1) * span)
    edge = n + 1 if REVERSE else n
    if RAGGED:
        edge = tl.load(edges + batch * N + n)
    if not CAUSAL:
        low, high, index, known = n * span, stop, n * 0, n * 0 + 1
    elif REVERSE:
        low, high, index = first // KEYS * KEYS, tl.minimum(T, edge * span), N - edge
        known = tl.where(index > 0, 1, 0)
    else:
        low, high, index = edge * span, tl.minimum(first + ROWS, stop), edge
        known = tl.where(index > 0, 1, 0)
    return stop, edge, low, high, index, known


@triton.jit
def _rows_of(begin, queries, keys, i, stop, edge, span, T, REVERSE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of rows i: where their chunks begin, their documents, and whether the state at `edge` is of these."""
    chunk = tl.load(begin + i, mask=i < stop, other=0)
    document = tl.load(keys + i, mask=i < stop, other=-1)
    document = tl.where(document < 0, -2, document)  # padding is no partner of padding
    last = tl.minimum(edge * span, T - 1) if REVERSE else tl.maximum(edge * span - 1, 0)
    return chunk, document, document == tl.load(queries + last)


@triton.jit
def _pairs(  # type: ignore[no-untyped-def]
    begin, keys, i, chunk, document, j, high, CAUSAL: tl.constexpr, REVERSE: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """Which partners j are in the row's chunk, and seen; and which in another of its document (RAGGED)."""
    near = (i[:, None] >= 0) & (j[None, :] >= 0)
    if CAUSAL:
        near = i[:, None] <= j[None, :] if REVERSE else i[:, None] >= j[None, :]
    across = near
    if RAGGED:
        of = tl.load(begin + j, mask=j < high, other=0)
        same = document[:, None] == tl.load(keys + j, mask=j < high, other=-1)[None, :]
        near &= same & (chunk[:, None] == of[None, :])
        across = same & (chunk[:, None] < of[None, :] if REVERSE else chunk[:, None] > of[None, :])
    return near, across


@triton.jit(do_not_specialize=["T", "N", "M"])
def reads(  # type: ignore[no-untyped-def]
    a, b, c, la, lb, states, out, begin, queries, keys, edges,
    a_b, a_t, b_b, b_t, c_b, c_t, la_b, la_t, lb_b, lb_t, o_b, o_t, T, N, M, span, factor, shrink,
    D: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, CAUSAL: tl.constexpr, REVERSE: tl.constexpr, RAGGED: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i = Σ_{j near i} relu(factor · a_i·b_j)² c_j + shrink · la_i (S + Σ_{j across, paired} lb_j c_jᵀ).

    A program has ROWS of `out` and COLUMNS of its values, so the scores of a pair are made E / COLUMNS times: that is
    D / COLUMNS of the products with values beside them (half at 128 and 256), without a program that holds all E.
    """
    SLICES: tl.constexpr = (E + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    part, program = program % SLICES, program // SLICES
    tiles = tl.cdiv(span, ROWS)
    tile, program = program % tiles, program // tiles
    n, batch = program % N, (program // N).to(tl.int64)
    first = n * span + tile * ROWS
    stop, edge, low, high, index, known = _place(
        edges, batch, n, first, T, N, span, ROWS, KEYS, CAUSAL, REVERSE, RAGGED
    )
    if first >= stop:
        return
    a += batch * a_b
    b += batch * b_b
    c += batch * c_b
    la += batch * la_b
    lb += batch * lb_b
    i, x, y = first + tl.arange(0, ROWS), tl.arange(0, WIDE), part * COLUMNS + tl.arange(0, COLUMNS)
    chunk, document = i, i
    if RAGGED:
        begin += batch * T
        queries += batch * T
        keys += batch * T
        chunk, document, enter = _rows_of(begin, queries, keys, i, stop, edge, span, T, REVERSE)

    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    states += (batch * M + index) * D * E
    for d in range(0, D * known, DEPTH):
        z = d + tl.arange(0, DEPTH)
        la_part = tokens(la, la_t, first, stop, z, D, D % DEPTH == 0, ROWS, EVEN)
        state = tl.load(states + z[:, None] * E + y[None, :], mask=(z < D)[:, None] & (y < E)[None, :], other=0.0)
        acc = tl.dot(la_part, (state * shrink).to(la_part.dtype), acc=acc, input_precision=PRECISION)
    a_tile = tokens(a, a_t, first, stop, x, D, D == WIDE, ROWS, EVEN)
    if RAGGED:
        acc = tl.where(enter[:, None], acc, 0.0)
        la_tile = tokens(la, la_t, first, stop, x, D, D == WIDE, ROWS, EVEN)

    for step in range(tl.cdiv(high - low, KEYS)):
        at = low + step * KEYS
        near, across = _pairs(
            begin, keys, i, chunk, document, at + tl.arange(0, KEYS), high, CAUSAL, REVERSE, RAGGED
        )  # fmt: skip
        b_tile = tokens(b, b_t, at, high, x, D, D == WIDE, KEYS, EVEN)
        c_tile = tokens(c, c_t, at, high, y, E, E % COLUMNS == 0, KEYS, EVEN)
        scores = tl.maximum(tl.dot(a_tile, tl.trans(b_tile), input_precision=PRECISION) * factor, 0.0)
        weights = tl.where(near, scores * scores, 0.0)
        if RAGGED:
            lb_tile = tokens(lb, lb_t, at, high, x, D, D == WIDE, KEYS, EVEN)
            linear = tl.dot(la_tile, tl.trans(lb_tile), input_precision=PRECISION) * shrink
            weights += tl.where(across, linear, 0.0)
        acc = tl.dot(weights.to(c_tile.dtype), c_tile, acc=acc, input_precision=PRECISION)
    where = out + batch * o_b + i.to(tl.int64)[:, None] * o_t + y[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), mask=(i < stop)[:, None] & (y < E)[None, :])


@triton.jit(do_not_specialize=["T", "N", "M"])
def slopes(  # type: ignore[no-untyped-def]
    a, b, lb, up, c, states, da, dla, begin, queries, keys, edges,
    a_b, a_t, b_b, b_t, lb_b, lb_t, up_b, up_t, c_b, c_t, da_b, da_t, dla_b, dla_t,
    T, N, M, span, factor, shrink,
    D: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, REVERSE: tl.constexpr, RAGGED: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a and la in `reads` from `up`, that of its output.

    da_i = Σ_{j near i} 2 factor relu(factor · a_i·b_j) (up_i·c_j) b_j; dla_i = shrink (S up_i + Σ_{j across} (up_i·c_j) lb_j).
    A program has whole vectors, since each pair's up·c is a sum over all of E.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(span, ROWS)
    tile, program = program % tiles, program // tiles
    n, batch = program % N, (program // N).to(tl.int64)
    first = n * span + tile * ROWS
    stop, edge, low, high, index, known = _place(
        edges, batch, n, first, T, N, span, ROWS, KEYS, CAUSAL, REVERSE, RAGGED
    )
    if first >= stop:
        return
    a += batch * a_b
    b += batch * b_b
    c += batch * c_b
    up += batch * up_b
    lb += batch * lb_b
    i, x, y = first + tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, COLUMNS)
    chunk, document = i, i
    if RAGGED:
        begin += batch * T
        queries += batch * T
        keys += batch * T
        chunk, document, enter = _rows_of(begin, queries, keys, i, stop, edge, span, T, REVERSE)

    slope = tl.zeros([ROWS, WIDE], tl.float32)
    states += (batch * M + index) * D * E
    for e in range(0, E * known, COLUMNS):
        up_tile = tokens(up, up_t, first, stop, e + y, E, E % COLUMNS == 0, ROWS, EVEN)
        mask = (x < D)[None, :] & (e + y < E)[:, None]
        state = tl.load(states + x[None, :] * E + (e + y)[:, None], mask=mask, other=0.0)
        slope = tl.dot(up_tile, (state * shrink).to(up_tile.dtype), acc=slope, input_precision=PRECISION)
    where = dla + batch * dla_b + i.to(tl.int64)[:, None] * dla_t + x[None, :]
    real = (i < stop)[:, None] & (x < D)[None, :]
    if RAGGED:
        slope = tl.where(enter[:, None], slope, 0.0)
    else:  # before the next sum, so that only one is held
        tl.store(where, slope.to(dla.dtype.element_ty), mask=real)

    a_tile = tokens(a, a_t, first, stop, x, D, D == WIDE, ROWS, EVEN)
    acc = tl.zeros([ROWS, WIDE], tl.float32)
    for step in range(tl.cdiv(high - low, KEYS)):
        at = low + step * KEYS
        given = tl.zeros([ROWS, KEYS], tl.float32)
        for e in range(0, E, COLUMNS):
            up_tile = tokens(up, up_t, first, stop, e + y, E, E % COLUMNS == 0, ROWS, EVEN)
            c_tile = tokens(c, c_t, at, high, e + y, E, E % COLUMNS == 0, KEYS, EVEN)
            given = tl.dot(up_tile, tl.trans(c_tile), acc=given, input_precision=PRECISION)
        near, across = _pairs(
            begin, keys, i, chunk, document, at + tl.arange(0, KEYS), high, CAUSAL, REVERSE, RAGGED
        )  # fmt: skip
        b_tile = tokens(b, b_t, at, high, x, D, D == WIDE, KEYS, EVEN)
        scores = tl.maximum(tl.dot(a_tile, tl.trans(b_tile), input_precision=PRECISION) * factor, 0.0)
        pull = tl.where(near, 2.0 * factor * scores * given, 0.0).to(b_tile.dtype)
        acc = tl.dot(pull, b_tile, acc=acc, input_precision=PRECISION)
        if RAGGED:
            lb_tile = tokens(lb, lb_t, at, high, x, D, D == WIDE, KEYS, EVEN)
            pull = tl.where(across, given * shrink, 0.0).to(lb_tile.dtype)
            slope = tl.dot(pull, lb_tile, acc=slope, input_precision=PRECISION)
    if RAGGED:
        tl.store(where, slope.to(dla.dtype.element_ty), mask=real)
    where = da + batch * da_b + i.to(tl.int64)[:, None] * da_t + x[None, :]
    tl.store(where, acc.to(da.dtype.element_ty), mask=real)
