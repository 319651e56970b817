"""The delta rule's Triton kernels, forward: one program a chunk of L tokens, or one that walks a row's chunks.

Names are those of `chunked`: Γ, what is left of token j at token i; γ (`since`), of the state that a chunk began with at
token i; `left`, of token i at the chunk's end; `whole`, of the state there. E (`errors`) is what tokens write. Rows of
what lives between kernels are whole chunks (B·H, chunks·L, ...); tokens behind a row's last read as zeros, and write
nothing. Products are made in the type of k, and added up in fp32 ("tf32x3": of fp32 too, at nearly its precision).
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# (Triton's language in Python's clothes: its loops, tiles and constants are not what a type checker takes them for)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_of(program, T, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which chunk of its sequence a program has, which sequence (row · heads + head), and which of all chunks that is.

    Grids have their first axis alone: the others end at 65,535."""
    chunks = tl.cdiv(T, L)
    return program % chunks, (program // chunks).to(tl.int64), program.to(tl.int64)


@triton.jit
def at(sequence, heads, of_row, of_head, of_token, begin):  # type: ignore[no-untyped-def]
    """Where token `begin` of sequence (row · heads + head) lies, for strides of rows, heads and tokens."""
    return (sequence // heads) * of_row + (sequence % heads) * of_head + tl.cast(begin, tl.int64) * of_token


@triton.jit
def read(x, step, count, width, L: tl.constexpr, W: tl.constexpr, column=0):  # type: ignore[no-untyped-def]
    """(L,W) from columns `column` on of rows `step` apart; zero from row `count` and column `width` on."""
    i, j = tl.arange(0, L), column + tl.arange(0, W)
    return tl.load(x + i[:, None] * step + j[None, :], mask=(i < count)[:, None] & (j < width)[None, :], other=0.0)


@triton.jit
def write(x, value, step, count, width, L: tl.constexpr, W: tl.constexpr, column=0):  # type: ignore[no-untyped-def]
    """`read`'s converse."""
    i, j = tl.arange(0, L), column + tl.arange(0, W)
    mask = (i < count)[:, None] & (j < width)[None, :]
    tl.store(x + i[:, None] * step + j[None, :], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b):  # type: ignore[no-untyped-def]
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def ratio(g, documents, sequence, row, begin, T, gated: tl.constexpr, packed: tl.constexpr, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Γ (L,L): zero where token j comes later or is of another document. Its exponents are sums over what lies between."""
    i = tl.arange(0, L)
    out = tl.where(i[:, None] >= i[None, :], 1.0, 0.0)
    if gated:
        step = tl.load(g + sequence * T + begin + i, mask=begin + i < T, other=0.0)
        out *= tl.exp(tl.cumsum(tl.where(i[:, None] > i[None, :], step[:, None], 0.0), 0))
    if packed:
        document = tl.load(documents + row * T + tl.minimum(begin + i, T - 1))
        out = tl.where(document[:, None] == document[None, :], out, 0.0)
    return out


@triton.jit
def system(  # type: ignore[no-untyped-def]
    k, beta, g, documents, a, since, left, whole, k_row, k_head, k_token, H, T, D, gated: tl.constexpr,
    packed: tl.constexpr, L: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """A = β (K Kᵀ ⊙ Γ) below its diagonal (fp32), and γ, left and whole of a chunk."""
    chunk, sequence, block = chunk_of(tl.program_id(0), T, L)
    begin, row, i = chunk * L, sequence // H, tl.arange(0, L)
    keys = read(k + at(sequence, H, k_row, k_head, k_token, begin), k_token, T - begin, D, L, W)
    rate = tl.load(beta + sequence * T + begin + i, mask=begin + i < T, other=0.0)
    between = ratio(g, documents, sequence, row, begin, T, gated, packed, L)
    scores = product(keys, tl.trans(keys)) * between * rate[:, None]
    write(a + block * L * L, tl.where(i[:, None] > i[None, :], scores, 0.0), L, L, L, L, L)
    to_here, to_end, through = tl.full((L,), 1.0, tl.float32), tl.full((L,), 1.0, tl.float32), 1.0
    if gated:
        step = tl.load(g + sequence * T + begin + i, mask=begin + i < T, other=0.0)
        after = tl.load(g + sequence * T + begin + i + 1, mask=(i + 1 < L) & (begin + i + 1 < T), other=0.0)
        to_here, to_end = tl.exp(tl.cumsum(step, 0)), tl.exp(tl.cumsum(after, 0, reverse=True))
        through = tl.exp(tl.sum(step, 0))
    if packed:
        document = tl.load(documents + row * T + tl.minimum(begin + i, T - 1))
        last = tl.load(documents + row * T + tl.minimum(begin + L, T) - 1)
        before = tl.load(documents + row * T + tl.maximum(begin, 1) - 1)
        before = tl.where(begin == 0, 0, before)
        to_here, to_end = tl.where(document == before, to_here, 0.0), tl.where(document == last, to_end, 0.0)
        through = tl.where(last == before, through, 0.0)
    tl.store(since + block * L + i, to_here)
    tl.store(left + block * L + i, to_end)
    tl.store(whole + block, through)


@triton.jit
def invert(a, inverse, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """(I + A)⁻¹ of a chunk: blocks of 16 row by row, then pairs of blocks by [[P,0],[C,Q]]⁻¹ = [[P⁻¹,0],[-Q⁻¹CP⁻¹,Q⁻¹]].

    In fp32 in the place of A, and a copy in the type of `inverse`. Powers of A, which may be huge, are never made.
    """
    block = tl.program_id(0).to(tl.int64) * (L * L)
    a += block
    n, i, j = tl.arange(0, L // 16)[:, None, None], tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    diagonal = a + (n * 16 + i) * L + n * 16 + j
    below = tl.load(diagonal)
    solved = tl.where(i == j, 1.0, 0.0) + tl.zeros_like(below)
    for r in range(1, 16):
        known = tl.sum(tl.where(i == r, below, 0.0), 1)  # row r of A
        line = tl.sum(known[:, :, None] * solved, 1)
        solved -= tl.where(i == r, line[:, None, :], 0.0)
    tl.store(diagonal, solved)
    tl.debug_barrier()
    for pair in tl.static_range(L // 32):
        corner = a + pair * 32 * (L + 1)
        first, second = read(corner, L, 16, 16, 16, 16), read(corner + 16 * (L + 1), L, 16, 16, 16, 16)
        middle = read(corner + 16 * L, L, 16, 16, 16, 16)
        write(corner + 16 * L, -product(second, product(middle, first)), L, 16, 16, 16, 16)
    tl.debug_barrier()
    if L == 64:
        first, second = read(a, L, 32, 32, 32, 32), read(a + 32 * (L + 1), L, 32, 32, 32, 32)
        middle = read(a + 32 * L, L, 32, 32, 32, 32)
        write(a + 32 * L, -product(second, product(middle, first)), L, 32, 32, 32, 32)
        tl.debug_barrier()
    write(inverse + block, read(a, L, L, L, L, L), L, L, L, L, L)


@triton.jit
def prepare(  # type: ignore[no-untyped-def]
    k, v, beta, inverse, since, w, u, k_row, k_head, k_token, v_row, v_head, v_token, H, T, D, Dv,
    L: tl.constexpr, W: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """W = (I + A)⁻¹ (β γ K) and U = (I + A)⁻¹ (β V)."""
    chunk, sequence, block = chunk_of(tl.program_id(0), T, L)
    begin, i = chunk * L, tl.arange(0, L)
    solve = read(inverse + block * L * L, L, L, L, L, L)
    rate = tl.load(beta + sequence * T + begin + i, mask=begin + i < T, other=0.0)
    fade = rate * tl.load(since + block * L + i)
    keys = read(k + at(sequence, H, k_row, k_head, k_token, begin), k_token, T - begin, D, L, W)
    write(w + block * L * D, product(solve, (keys * fade[:, None]).to(solve.dtype)), D, L, D, L, W)
    values = v + at(sequence, H, v_row, v_head, v_token, begin)
    for column in range(0, Dv, V):
        piece = read(values, v_token, T - begin, Dv, L, V, column)
        write(u + block * L * Dv, product(solve, (piece * rate[:, None]).to(solve.dtype)), Dv, L, Dv, L, V, column)


@triton.jit
def walk(  # type: ignore[no-untyped-def]
    k, w, u, start, left, whole, states, errors, end, k_row, k_head, k_token, H, T, D, Dv, chunks,
    L: tl.constexpr, W: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """S before each chunk, E = U - W S of each, and S at the end, for V columns of values."""
    columns = tl.cdiv(Dv, V)
    column, sequence = tl.program_id(0) % columns * V, (tl.program_id(0) // columns).to(tl.int64)
    i = tl.arange(0, L)
    state = read(start + sequence * D * Dv, Dv, D, Dv, W, V, column)
    for chunk in range(chunks):
        block = sequence * chunks + chunk
        narrow = state.to(states.dtype.element_ty)
        write(states + block * D * Dv, narrow, Dv, D, Dv, W, V, column)
        keys = read(k + at(sequence, H, k_row, k_head, k_token, chunk * L), k_token, T - chunk * L, D, L, W)
        error = read(u + block * L * Dv, Dv, L, Dv, L, V, column).to(tl.float32)
        error -= product(read(w + block * L * D, D, L, D, L, W), narrow)
        write(errors + block * L * Dv, error, Dv, L, Dv, L, V, column)
        error *= tl.load(left + block * L + i)[:, None]
        state = state * tl.load(whole + block) + product(tl.trans(keys), error.to(narrow.dtype))
    write(end + sequence * D * Dv, state, Dv, D, Dv, W, V, column)


@triton.jit
def outputs(  # type: ignore[no-untyped-def]
    q, k, g, documents, since, states, errors, o, q_row, q_head, q_token, k_row, k_head, k_token, o_row, o_head, o_token,
    scale, H, T, D, Dv, gated: tl.constexpr, packed: tl.constexpr, L: tl.constexpr, W: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """o = scale (γ Q S + (Q Kᵀ ⊙ Γ) E) of a chunk, for V columns of values."""
    columns = tl.cdiv(Dv, V)
    chunk, sequence, block = chunk_of(tl.program_id(0) // columns, T, L)
    begin, column = chunk * L, tl.program_id(0) % columns * V
    queries = read(q + at(sequence, H, q_row, q_head, q_token, begin), q_token, T - begin, D, L, W)
    keys = read(k + at(sequence, H, k_row, k_head, k_token, begin), k_token, T - begin, D, L, W)
    state = read(states + block * D * Dv, Dv, D, Dv, W, V, column)
    out = product(queries, state) * tl.load(since + block * L + tl.arange(0, L))[:, None]
    scores = product(queries, tl.trans(keys)) * ratio(g, documents, sequence, sequence // H, begin, T, gated, packed, L)
    out += product(scores.to(keys.dtype), read(errors + block * L * Dv, Dv, L, Dv, L, V, column))
    write(o + at(sequence, H, o_row, o_head, o_token, begin), out * scale, o_token, T - begin, Dv, L, V, column)
