"""What runs on the GPU for gated linear attention; `triton` says how the three kernels fit and launches them.

In all of them a program sees one chunk of L tokens of one head at a time. x (.., W) is read by its pointer and its
strides over batch, heads and tokens; its columns lie side by side. b (L,D) is Σ log α over the chunk up to and with
each token, G (D,) the whole sum, kept in `sums` (B·H,N,D). Numbers are fp32; factors of products are WIDE.
"""

from __future__ import annotations

import triton
import triton.language as tl

SUB = tl.constexpr(16)  # tokens of a block where a chunk forgets much
LIMIT = tl.constexpr(120.0)  # of -G: exp(±60) and its products with inputs and gradients stay inside fp32 and bf16
FLOOR = tl.constexpr(-40.0)  # of log α: exp(-40) is nothing beside 1, and sums over a chunk keep four digits of theirs

# pyright: basic, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportCallIssue=false


@triton.jit
def walk(  # type: ignore[no-untyped-def]
    x, y, g, begin, reset, added, faded, states, sums, end,
    x_strides, y_strides, g_strides, T, H, N, per, segments, scale,
    D: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
    BACK: tl.constexpr, LOCAL: tl.constexpr, HAS_BEGIN: tl.constexpr, HAS_RESET: tl.constexpr,
    EXACT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S <- exp(G) S + xᵀ y along a segment of `per` chunks, x faded until the chunk's end (BACK: since its beginning).

    LOCAL: from zero, and only what the segment adds and how much it fades is written. Else from `begin` and what the
    segments before it added, and `states` is what each chunk meets, `sums` its G. BACK: from the last chunk to
    the first.
    """
    head, tile, segment = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    d = (tile // tl.cdiv(DV, BV)) * BK + tl.arange(0, BK)
    e = (tile % tl.cdiv(DV, BV)) * BV + tl.arange(0, BV)
    cell = d[:, None] * DV + e[None, :]
    real = (d < D)[:, None] & (e < DV)[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    fade = tl.full([BK], 1.0, tl.float32)
    if not LOCAL:
        if HAS_BEGIN:
            S += tl.load(begin + head * D * DV + cell, mask=real, other=0.0)
        for i in range(segment):
            at = head * (segments - 1) + i
            left = tl.load(faded + at * D + d, mask=d < D, other=0.0)
            S = S * left[:, None] + tl.load(added + at * D * DV + cell, mask=real, other=0.0)
    for n in range(segment * per, tl.minimum(segment * per + per, N)):
        chunk = N - 1 - n if BACK else n
        if not LOCAL:
            tl.store(states + (head * N + chunk) * D * DV + cell, S.to(states.dtype.element_ty), mask=real)
        log = tl.maximum(_load(g, g_strides, chunk, head, H, T, d, D, L), FLOOR)
        G = tl.sum(log, 0)
        if not LOCAL:  # by the programs of all values alike
            tl.store(sums + (head * N + chunk) * D + d, G, mask=d < D)
        w = tl.exp(_running(log, L, not BACK, EXACT))
        whole = tl.exp(G)
        if HAS_RESET:
            number, last = _documents(reset, chunk, head, H, T, L)
            w = tl.where((number == 0 if BACK else number == last)[:, None], w, 0.0)
            whole = tl.where(last == 0, whole, 0.0)
        factor = (_load(x, x_strides, chunk, head, H, T, d, D, L) * scale * w).to(WIDE)
        values = _load(y, y_strides, chunk, head, H, T, e, DV, L).to(WIDE)
        S = tl.dot(tl.trans(factor), values, S * whole[:, None], input_precision=PRECISION)
        fade *= whole
    if LOCAL:
        at = head * (segments - 1) + segment
        tl.store(added + at * D * DV + cell, S, mask=real)
        tl.store(faded + at * D + d, fade, mask=d < D)
    elif segment == segments - 1:
        tl.store(end + head * D * DV + cell, S, mask=real)


@triton.jit
def forward(  # type: ignore[no-untyped-def]
    q, k, v, g, out, reset, states, sums, q_strides, k_strides, v_strides, g_strides, out_strides, T, H, N, scale,
    D: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
    APART: tl.constexpr, HAS_RESET: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o = (q exp(b)) S + tril(A) v of one chunk. APART: of the steep chunks, else of the others."""
    head, chunk = _head_of(N)
    d = tl.arange(0, BK)
    G = tl.load(sums + (head * N + chunk) * D + d, mask=d < D, other=0.0)
    if (tl.min(G) < -LIMIT) != APART:
        return
    b = _decay(g, g_strides, chunk, head, H, T, d, D, L, APART or EXACT)
    queries = _load(q, q_strides, chunk, head, H, T, d, D, L) * scale * _late(b, G, APART)
    keys = _load(k, k_strides, chunk, head, H, T, d, D, L) * _early(b, G, APART)
    seen, past = _causal(L), queries * _since(b, G, APART)
    if HAS_RESET:
        number, _ = _documents(reset, chunk, head, H, T, L)
        seen &= number[:, None] == number[None, :]
        past = tl.where((number == 0)[:, None], past, 0.0)
    past = past.to(WIDE)
    scores = tl.where(seen, _scores(queries, keys, b, L, BK, APART, WIDE, PRECISION), 0.0).to(WIDE)
    for begin in range(0, DV, BV):
        e = begin + tl.arange(0, BV)
        cell = (head * N + chunk) * D * DV + d[:, None] * DV + e[None, :]
        S = tl.load(states + cell, mask=(d < D)[:, None] & (e < DV)[None, :], other=0.0)
        values = _load(v, v_strides, chunk, head, H, T, e, DV, L).to(WIDE)
        o = tl.dot(past, S, input_precision=PRECISION)
        o = tl.dot(scores, values, o, input_precision=PRECISION)
        _store(out, out_strides, chunk, head, H, T, e, DV, L, o)


@triton.jit
def backward_values(  # type: ignore[no-untyped-def]
    q, k, g, d_out, dv, reset, d_states, sums, q_strides, k_strides, g_strides, d_out_strides, dv_strides,
    T, H, N, scale,
    D: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
    APART: tl.constexpr, HAS_RESET: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv = (k exp(G - b)) dS + tril(A)ᵀ do of one chunk, from the gradient dS of the state that it leaves."""
    head, chunk = _head_of(N)
    d = tl.arange(0, BK)
    G = tl.load(sums + (head * N + chunk) * D + d, mask=d < D, other=0.0)
    if (tl.min(G) < -LIMIT) != APART:
        return
    b = _decay(g, g_strides, chunk, head, H, T, d, D, L, APART or EXACT)
    queries = _load(q, q_strides, chunk, head, H, T, d, D, L) * scale * _late(b, G, APART)
    keys = _load(k, k_strides, chunk, head, H, T, d, D, L) * _early(b, G, APART)
    seen, future = _causal(L), keys * _until(b, G, APART)
    if HAS_RESET:
        number, last = _documents(reset, chunk, head, H, T, L)
        seen &= number[:, None] == number[None, :]
        future = tl.where((number == last)[:, None], future, 0.0)
    future = future.to(WIDE)
    scores = tl.where(seen, _scores(queries, keys, b, L, BK, APART, WIDE, PRECISION), 0.0).to(WIDE)
    for begin in range(0, DV, BV):
        e = begin + tl.arange(0, BV)
        cell = (head * N + chunk) * D * DV + d[:, None] * DV + e[None, :]
        dS = tl.load(d_states + cell, mask=(d < D)[:, None] & (e < DV)[None, :], other=0.0)
        up = _load(d_out, d_out_strides, chunk, head, H, T, e, DV, L).to(WIDE)
        d_values = tl.dot(future, dS, input_precision=PRECISION)
        d_values = tl.dot(tl.trans(scores), up, d_values, input_precision=PRECISION)
        _store(dv, dv_strides, chunk, head, H, T, e, DV, L, d_values)


@triton.jit
def backward_keys(  # type: ignore[no-untyped-def]
    q, k, v, g, d_out, dq, dk, dg, reset, states, d_states, sums,
    q_strides, k_strides, v_strides, g_strides, d_out_strides, dq_strides, dk_strides, dg_strides,
    T, H, N, scale,
    D: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
    APART: tl.constexpr, HAS_RESET: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dlog α of one chunk and BK columns, from the state S that it meets and dS of the one that it leaves."""
    part, chunk = _head_of(N)
    head, d = part // tl.cdiv(D, BK), (part % tl.cdiv(D, BK)).to(tl.int32) * BK + tl.arange(0, BK)
    G = tl.load(sums + (head * N + chunk) * D + d, mask=d < D, other=0.0)
    if (tl.min(G) < -LIMIT) != APART:
        return
    d_scores = tl.zeros([L, L], tl.float32)
    d_queries = tl.zeros([L, BK], tl.float32)
    d_keys = tl.zeros([L, BK], tl.float32)
    through = tl.zeros([BK], tl.float32)  # of log α from the state to the state
    for begin in range(0, DV, BV):
        e = begin + tl.arange(0, BV)
        cell = (head * N + chunk) * D * DV + d[:, None] * DV + e[None, :]
        real = (d < D)[:, None] & (e < DV)[None, :]
        S = tl.load(states + cell, mask=real, other=0.0)
        dS = tl.load(d_states + cell, mask=real, other=0.0)
        values = _load(v, v_strides, chunk, head, H, T, e, DV, L).to(WIDE)
        up = _load(d_out, d_out_strides, chunk, head, H, T, e, DV, L).to(WIDE)
        d_scores = tl.dot(up, tl.trans(values), d_scores, input_precision=PRECISION)
        d_queries = tl.dot(up, tl.trans(S), d_queries, input_precision=PRECISION)
        d_keys = tl.dot(values, tl.trans(dS), d_keys, input_precision=PRECISION)
        through += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
    b = _decay(g, g_strides, chunk, head, H, T, d, D, L, APART or EXACT)
    queries = _load(q, q_strides, chunk, head, H, T, d, D, L) * scale * _late(b, G, APART)
    keys = _load(k, k_strides, chunk, head, H, T, d, D, L) * _early(b, G, APART)
    d_queries *= _since(b, G, APART)
    d_keys *= _until(b, G, APART)
    seen, whole = _causal(L), tl.exp(G)
    if HAS_RESET:
        number, last = _documents(reset, chunk, head, H, T, L)
        seen &= number[:, None] == number[None, :]
        d_queries = tl.where((number == 0)[:, None], d_queries, 0.0)
        d_keys = tl.where((number == last)[:, None], d_keys, 0.0)
        whole = tl.where(last == 0, whole, 0.0)
    d_scores = tl.where(seen, d_scores, 0.0).to(WIDE)
    # Each product of a query, a key or a state with its gradient belongs to the log α of the tokens that it crosses:
    # from the state to a query i, all t <= i; from a key j to the next state, all t > j; from j to i, j < t <= i.
    d_queries = _near(d_queries, d_scores, keys, b, L, BK, False, APART, WIDE, PRECISION)
    back = queries * d_queries
    _store(dq, dq_strides, chunk, head, H, T, d, D, L, d_queries * _late(b, G, APART) * scale)
    onwards = keys * d_keys
    d_keys = _near(d_keys, d_scores, queries, b, L, BK, True, APART, WIDE, PRECISION)
    back += onwards - keys * d_keys
    _store(dk, dk_strides, chunk, head, H, T, d, D, L, d_keys * _early(b, G, APART))
    onwards -= back
    d_log = _running(onwards, L, False, APART or EXACT) - onwards
    d_log += (tl.sum(back, 0) + through * whole)[None, :]
    if HAS_RESET:  # what fades at the first token of a document is not there
        t = chunk * L + tl.arange(0, L)
        first = tl.load(reset + (head // H) * T + t, mask=t < T, other=0)
        d_log = tl.where((first == 0)[:, None], d_log, 0.0)
    _store(dg, dg_strides, chunk, head, H, T, d, D, L, d_log)


@triton.jit
def _head_of(N):  # type: ignore[no-untyped-def]
    """Which head (of `backward_keys`, which columns of which), and which of N chunks: the grid has its first axis alone."""
    heads = tl.num_programs(0) // N
    return (tl.program_id(0) % heads).to(tl.int64), tl.program_id(0) // heads


@triton.jit
def _scores(
    q, k, b, L: tl.constexpr, BD: tl.constexpr, APART: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr
):  # type: ignore[no-untyped-def]
    """A (L,L) of q and k as `_late` and `_early` have made them, true where i >= j; elsewhere anything."""
    if APART:
        A = _scores_apart(q, k, b, L, BD, WIDE, PRECISION)
    else:
        A = tl.dot(q.to(WIDE), tl.trans(k.to(WIDE)), input_precision=PRECISION)
    return A


@triton.jit
def _near(  # type: ignore[no-untyped-def]
    y, dA, x, b, L: tl.constexpr, BD: tl.constexpr, BACK: tl.constexpr, APART: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y and what dA (L,L), 0 where i < j, gives queries by keys x; BACK: gives keys by queries x."""
    if BACK:
        dA = tl.trans(dA)
    if APART:
        y += _near_apart(dA.to(tl.float32), x, b, L, BD, BACK, WIDE, PRECISION)
    else:
        y = tl.dot(dA, x.to(WIDE), y, input_precision=PRECISION)
    return y


# Queries and keys are seen from halfway through the chunk, where b = G/2, which bounds the factors of a chunk that is
# not steep by exp(60); what the state reads and writes is a constant from there. Steep chunks (APART) leave queries and
# keys as they are, and fade what the state reads and writes token by token.
@triton.jit
def _late(b, G, APART: tl.constexpr):  # type: ignore[no-untyped-def]
    factor = 1.0
    if not APART:
        factor = tl.exp(b - 0.5 * G[None, :])
    return factor


@triton.jit
def _early(b, G, APART: tl.constexpr):  # type: ignore[no-untyped-def]
    factor = 1.0
    if not APART:
        factor = tl.exp(0.5 * G[None, :] - b)
    return factor


@triton.jit
def _since(b, G, APART: tl.constexpr):  # type: ignore[no-untyped-def]
    """_late · _since = exp(b)."""
    return tl.exp(b) if APART else tl.exp(0.5 * G)[None, :]


@triton.jit
def _until(b, G, APART: tl.constexpr):  # type: ignore[no-untyped-def]
    """_early · _until = exp(G - b)."""
    return tl.exp(G[None, :] - b) if APART else tl.exp(0.5 * G)[None, :]


@triton.jit
def _scores_apart(q, k, b, L: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `_scores` where a chunk forgets too much for one product: no factor is above 1."""
    i, A = tl.arange(0, L), tl.zeros([L, L], tl.float32)
    for block in range(L // SUB - 1):  # of keys, and all queries behind it
        late, early = _from(b, block, L)
        P = tl.dot((q * late).to(WIDE), tl.trans((k * early).to(WIDE)), input_precision=PRECISION)
        A += tl.where((i // SUB > block)[:, None] & (i // SUB == block)[None, :], P, 0.0)
    q, k, b = _blocks(q, L, BD), _blocks(k, L, BD), _blocks(b, L, BD)
    for j in range(SUB):  # a key of every block, and the queries of that block
        weight = q * _pick(k, j) * tl.exp(tl.minimum(b - _pick(b, j), 0.0))
        column = tl.reshape(tl.sum(weight, 2), [L])
        A += tl.where((i // SUB * SUB + j)[:, None] == i[None, :], column[:, None], 0.0)
    return A


@triton.jit
def _near_apart(
    dA, x, b, L: tl.constexpr, BD: tl.constexpr, BACK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr
):  # type: ignore[no-untyped-def]
    """As `_near` where a chunk forgets too much for one product."""
    i, y = tl.arange(0, L), tl.zeros([L, BD], tl.float32)
    for block in range(L // SUB - 1):
        late, early = _from(b, block, L)
        if BACK:
            P = tl.where((i // SUB == block)[:, None] & (i // SUB > block)[None, :], dA, 0.0).to(WIDE)
            y += early * tl.dot(P, (x * late).to(WIDE), input_precision=PRECISION)
        else:
            P = tl.where((i // SUB > block)[:, None] & (i // SUB == block)[None, :], dA, 0.0).to(WIDE)
            y += late * tl.dot(P, (x * early).to(WIDE), input_precision=PRECISION)
    x, b, near = _blocks(x, L, BD), _blocks(b, L, BD), _blocks(tl.zeros_like(y), L, BD)
    for j in range(SUB):
        weight = tl.sum(tl.where((i // SUB * SUB + j)[:, None] == i[None, :], dA, 0.0), 1)
        gap = _pick(b, j) - b if BACK else b - _pick(b, j)
        near += tl.reshape(weight, [L // SUB, SUB, 1]) * tl.exp(tl.minimum(gap, 0.0)) * _pick(x, j)
    return y + tl.reshape(near, [L, BD])


@triton.jit
def _from(b, block, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Decays from the end of a block to later tokens, and to it from the block's own; 1 for the others."""
    border = _row(b, block * SUB + SUB - 1, L)[None, :]
    return tl.exp(tl.minimum(b - border, 0.0)), tl.exp(tl.minimum(border - b, 0.0))


@triton.jit
def _row(x, i, L: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.sum(tl.where((tl.arange(0, L) == i)[:, None], x, 0.0), 0)


@triton.jit
def _blocks(x, L: tl.constexpr, BD: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.reshape(x, [L // SUB, SUB, BD])


@triton.jit
def _pick(x, j):  # type: ignore[no-untyped-def]
    """Token j of every block: (n,SUB,BD) -> (n,1,BD)."""
    return tl.sum(tl.where((tl.arange(0, SUB) == j)[None, :, None], x, 0.0), 1, keep_dims=True)


@triton.jit
def _causal(L: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.arange(0, L)[:, None] >= tl.arange(0, L)[None, :]


@triton.jit
def _decay(g, strides, chunk, head, H, T, d, D: tl.constexpr, L: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """b (L,BD)."""
    return _running(tl.maximum(_load(g, strides, chunk, head, H, T, d, D, L), FLOOR), L, False, EXACT)


@triton.jit
def _running(x, L: tl.constexpr, BEHIND: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Σ of x (L,W) over the tokens up to and with each; BEHIND: over those behind it.

    Not EXACT: by products with x in two pieces of bf16, true to 2^-17 of each x, at a quarter of the instructions.
    """
    if EXACT:
        total = tl.cumsum(x, 0, reverse=True) - x if BEHIND else tl.cumsum(x, 0)
    else:
        i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
        ones = (i < j if BEHIND else i >= j).to(tl.bfloat16)
        high = x.to(tl.bfloat16)
        total = tl.dot(ones, (x - high.to(tl.float32)).to(tl.bfloat16), tl.dot(ones, high))
    return total


@triton.jit
def _documents(reset, chunk, head, H, T, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Documents begun in the chunk up to and with each token (L,), and in all of it."""
    t = chunk * L + tl.arange(0, L)
    new = tl.load(reset + (head // H) * T + t, mask=t < T, other=0).to(tl.int32)
    return tl.cumsum(new, 0), tl.sum(new, 0)


@triton.jit
def _load(x, strides, chunk, head, H, T, column, W: tl.constexpr, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """(L, columns) in fp32, zeros behind the row's last token and column."""
    at, real = _place(strides, chunk, head, H, T, column, W, L)
    return tl.load(x + at, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _store(x, strides, chunk, head, H, T, column, W: tl.constexpr, L: tl.constexpr, value):  # type: ignore[no-untyped-def]
    at, real = _place(strides, chunk, head, H, T, column, W, L)
    tl.store(x + at, value.to(x.dtype.element_ty), mask=real)


@triton.jit
def _place(strides, chunk, head, H, T, column, W: tl.constexpr, L: tl.constexpr):  # type: ignore[no-untyped-def]
    t = chunk * L + tl.arange(0, L)
    row = (head // H) * strides[0] + (head % H) * strides[1] + t.to(tl.int64) * strides[2]
    return row[:, None] + column[None, :], (t < T)[:, None] & (column < W)[None, :]
