"""The delta rule's Triton kernels, backward. With Y = (I + A)⁻ᵀ dE: dA = -Y Eᵀ, dV = β Y, and of β γ K it is -Y Sᵀ.

Gradients of the logarithms of decays come as those of their running sums within a chunk (`dlog`), in shares.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# (Triton's language in Python's clothes: its loops, tiles and constants are not what a type checker takes them for)

from __future__ import annotations

import triton
import triton.language as tl

from dovetail.kernels.delta_rule.tiles import at, chunk_of, product, ratio, read, write


@triton.jit
def local(  # type: ignore[no-untyped-def]
    q, k, do, g, documents, de, q_row, q_head, q_token, k_row, k_head, k_token, o_row, o_head, o_token,
    scale, H, T, D, Dv, gated: tl.constexpr, packed: tl.constexpr, L: tl.constexpr, W: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """What a chunk's own outputs add to dE: scale (Q Kᵀ ⊙ Γ)ᵀ dO."""
    chunk, sequence, block = chunk_of(tl.program_id(0), T, L)
    begin = chunk * L
    queries = read(q + at(sequence, H, q_row, q_head, q_token, begin), q_token, T - begin, D, L, W)
    keys = read(k + at(sequence, H, k_row, k_head, k_token, begin), k_token, T - begin, D, L, W)
    scores = product(queries, tl.trans(keys)) * ratio(g, documents, sequence, sequence // H, begin, T, gated, packed, L)
    turned = tl.trans((scores * scale).to(keys.dtype))
    ups = do + at(sequence, H, o_row, o_head, o_token, begin)
    for column in range(0, Dv, V):
        up = read(ups, o_token, T - begin, Dv, L, V, column)
        write(de + block * L * Dv, product(turned, up), Dv, L, Dv, L, V, column)


@triton.jit
def walk_back(  # type: ignore[no-untyped-def]
    q, k, w, do, since, left, whole, dend, de, dstates, dstart, q_row, q_head, q_token, k_row, k_head, k_token,
    o_row, o_head, o_token, scale, H, T, D, Dv, chunks, L: tl.constexpr, W: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """dE whole (in place of its local part), the gradient of S after each chunk, and that of the start."""
    columns = tl.cdiv(Dv, V)
    column, sequence = tl.program_id(0) % columns * V, (tl.program_id(0) // columns).to(tl.int64)
    i = tl.arange(0, L)
    state = read(dend + sequence * D * Dv, Dv, D, Dv, W, V, column)
    for done in range(chunks):
        chunk = chunks - 1 - done
        begin, block = chunk * L, sequence * chunks + chunk
        narrow = state.to(dstates.dtype.element_ty)
        write(dstates + block * D * Dv, narrow, Dv, D, Dv, W, V, column)
        keys = read(k + at(sequence, H, k_row, k_head, k_token, begin), k_token, T - begin, D, L, W)
        error = read(de + block * L * Dv, Dv, L, Dv, L, V, column).to(tl.float32)
        error += product(keys, narrow) * tl.load(left + block * L + i)[:, None]
        short = error.to(narrow.dtype)
        write(de + block * L * Dv, short, Dv, L, Dv, L, V, column)
        queries = read(q + at(sequence, H, q_row, q_head, q_token, begin), q_token, T - begin, D, L, W)
        up = read(do + at(sequence, H, o_row, o_head, o_token, begin), o_token, T - begin, Dv, L, V, column)
        up = (up * (tl.load(since + block * L + i) * scale)[:, None]).to(narrow.dtype)
        state = state * tl.load(whole + block) + product(tl.trans(queries), up)
        state -= product(tl.trans(read(w + block * L * D, D, L, D, L, W)), short)
    write(dstart + sequence * D * Dv, state, Dv, D, Dv, W, V, column)


@triton.jit
def scores_back(  # type: ignore[no-untyped-def]
    q, k, v, beta, inverse, errors, de, do, g, documents, y, dv, dscores, dsystem, dbeta, dlog, q_row, q_head, q_token,
    k_row, k_head, k_token, v_row, v_head, v_token, o_row, o_head, o_token, scale, H, T, D, Dv, gated: tl.constexpr,
    packed: tl.constexpr, L: tl.constexpr, W: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Y and dV of a chunk, the gradients of Q Kᵀ and of K Kᵀ (L,L), and the shares of dβ and dlog that come by them."""
    chunk, sequence, block = chunk_of(tl.program_id(0), T, L)
    begin, i = chunk * L, tl.arange(0, L)
    rate = tl.load(beta + sequence * T + begin + i, mask=begin + i < T, other=0.0)
    turned = tl.trans(read(inverse + block * L * L, L, L, L, L, L))
    to_scores, to_system = tl.zeros((L, L), tl.float32), tl.zeros((L, L), tl.float32)
    to_beta = tl.zeros((L,), tl.float32)
    values, ups = at(sequence, H, v_row, v_head, v_token, begin), at(sequence, H, o_row, o_head, o_token, begin)
    for column in range(0, Dv, V):
        row = product(turned, read(de + block * L * Dv, Dv, L, Dv, L, V, column))
        write(y + block * L * Dv, row, Dv, L, Dv, L, V, column)
        write(dv + values, row * rate[:, None], v_token, T - begin, Dv, L, V, column)
        to_beta += tl.sum(row * read(v + values, v_token, T - begin, Dv, L, V, column), 1)
        error = tl.trans(read(errors + block * L * Dv, Dv, L, Dv, L, V, column))
        to_scores += product(read(do + ups, o_token, T - begin, Dv, L, V, column), error)
        to_system -= product(row.to(error.dtype), error)
    queries = read(q + at(sequence, H, q_row, q_head, q_token, begin), q_token, T - begin, D, L, W)
    keys = read(k + at(sequence, H, k_row, k_head, k_token, begin), k_token, T - begin, D, L, W)
    between = ratio(g, documents, sequence, sequence // H, begin, T, gated, packed, L)
    to_scores *= between * scale
    to_system = tl.where(i[:, None] > i[None, :], to_system * between, 0.0)
    through = to_system * product(keys, tl.trans(keys))
    tl.store(dbeta + block * L + i, to_beta + tl.sum(through, 1))
    through = through * rate[:, None] + to_scores * product(queries, tl.trans(keys))
    tl.store(dlog + block * L + i, tl.sum(through, 1) - tl.sum(through, 0))
    write(dscores + block * L * L, to_scores, L, L, L, L, L)
    write(dsystem + block * L * L, to_system * rate[:, None], L, L, L, L, L)


@triton.jit
def widths_back(  # type: ignore[no-untyped-def]
    q, k, beta, since, left, whole, states, dstates, errors, y, do, dscores, dsystem, dq, dk, dbeta, dlog,
    q_row, q_head, q_token, k_row, k_head, k_token, o_row, o_head, o_token, scale, H, T, D, Dv, L: tl.constexpr,
    W: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """dQ and dK of a chunk for W of their columns, and the shares of dβ and dlog that come by these."""
    parts = tl.cdiv(D, W)
    part = tl.program_id(0) % parts
    chunk, sequence, block = chunk_of(tl.program_id(0) // parts, T, L)
    begin, column, i = chunk * L, part * W, tl.arange(0, L)
    by_query, by_write, by_key = (
        tl.zeros((L, W), tl.float32),
        tl.zeros((L, W), tl.float32),
        tl.zeros((L, W), tl.float32),
    )
    kept = tl.zeros((W,), tl.float32)
    ups = do + at(sequence, H, o_row, o_head, o_token, begin)
    for c in range(0, Dv, V):
        state = read(states + block * D * Dv + column * Dv, Dv, D - column, Dv, W, V, c)
        after = read(dstates + block * D * Dv + column * Dv, Dv, D - column, Dv, W, V, c)
        kept += tl.sum(state.to(tl.float32) * after.to(tl.float32), 1)
        turned = tl.trans(state)
        by_query += product(read(ups, o_token, T - begin, Dv, L, V, c), turned)
        by_write += product(read(y + block * L * Dv, Dv, L, Dv, L, V, c), turned)
        by_key += product(read(errors + block * L * Dv, Dv, L, Dv, L, V, c), tl.trans(after))
    rate = tl.load(beta + sequence * T + begin + i, mask=begin + i < T, other=0.0)
    to_here, to_end = tl.load(since + block * L + i), tl.load(left + block * L + i)
    by_query, by_write, by_key = (
        by_query * (to_here * scale)[:, None],
        by_write * to_here[:, None],
        by_key * to_end[:, None],
    )
    q_at, k_at = at(sequence, H, q_row, q_head, q_token, begin), at(sequence, H, k_row, k_head, k_token, begin)
    queries = read(q + q_at, q_token, T - begin, D, L, W, column)
    keys = read(k + k_at, k_token, T - begin, D, L, W, column)
    of_query, of_write, of_key = tl.sum(queries * by_query, 1), tl.sum(keys * by_write, 1), tl.sum(keys * by_key, 1)
    share = part * (tl.num_programs(0) // parts) + block
    tl.store(dbeta + share * L + i, -of_write)
    at_end = tl.sum(of_key, 0) + tl.load(whole + block) * tl.sum(kept, 0)
    tl.store(dlog + share * L + i, of_query - rate * of_write - of_key + tl.where(i == L - 1, at_end, 0.0))
    scores, pairs = read(dscores + block * L * L, L, L, L, L, L), read(dsystem + block * L * L, L, L, L, L, L)
    write(dq + q_at, by_query + product(scores, keys), q_token, T - begin, D, L, W, column)
    by_key += product(tl.trans(scores), queries) - by_write * rate[:, None]
    by_key += product(pairs, keys) + product(tl.trans(pairs), keys)
    write(dk + k_at, by_key, k_token, T - begin, D, L, W, column)
