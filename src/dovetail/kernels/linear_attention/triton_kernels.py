"""The Triton kernels of causal linear attention; `triton` launches them. "Before" is what a walk has passed: the left, or
in REVERSE the right."""

# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(-40.0)  # of a logarithm of decay: exp(-40) is nothing beside 1, and sums over a tile stay small


@triton.jit
def tokens(at, stride, first, T, y, WIDTH: tl.constexpr, FULL: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns y of tokens from `first` on; zeros beyond T and, unless FULL, WIDTH."""
    t = tl.arange(0, TILE)
    where = at + first.to(tl.int64) * stride + t.to(tl.int64)[:, None] * stride + y[None, :]
    if EVEN and FULL:
        x = tl.load(where)
    elif EVEN:
        x = tl.load(where, mask=y[None, :] < WIDTH, other=0.0)
    elif FULL:
        x = tl.load(where, mask=first + t[:, None] < T, other=0.0)
    else:
        x = tl.load(where, mask=(first + t[:, None] < T) & (y[None, :] < WIDTH), other=0.0)
    return x


@triton.jit
def _gates(  # type: ignore[no-untyped-def]
    decay, queries, keys, first, T, TILE: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr, DOCUMENTS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """What is left on the way in a tile: from before it to a token, from a token to its end, all through, and between.

    These are exponentials of differences of running sums, which are wrong by 2^-24 of the sums: of a tile that forgets all,
    by about 1.5e-4 at most, less than narrow types round by. EXACT: sums are in fp64, and nothing is lost.
    """
    t = tl.arange(0, TILE)
    inside = first + t < T
    seen = (t[:, None] >= t[None, :]) if REVERSE else (t[:, None] <= t[None, :])
    pairs = seen.to(tl.float32)
    enter = tl.full([TILE], 1.0, tl.float32)
    leave = enter
    through = tl.sum(tl.where(t == 0, enter, 0.0), 0)
    if DECAY:
        step = tl.load(decay + first + t, mask=inside, other=0.0)
        step = tl.maximum(step, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        if EXACT:
            step = step.to(tl.float64)
        level, last = tl.cumsum(step, 0), tl.sum(step, 0)
        since, until = tl.exp(level.to(tl.float32)), tl.exp((last - level).to(tl.float32))
        through = tl.exp(last.to(tl.float32))
        if REVERSE:
            enter, leave = until, since
            between = level[:, None] - level[None, :]
        else:
            enter, leave = since, until
            between = level[None, :] - level[:, None]
        pairs = tl.where(seen, tl.exp(between.to(tl.float32)), 0.0)
    if DOCUMENTS:
        of_query = tl.load(queries + first + t, mask=inside, other=-2)
        of_key = tl.load(keys + first + t, mask=inside, other=-1)
        if REVERSE:
            before = tl.load(queries + tl.minimum(first + TILE, T - 1))
            after = tl.load(queries + first)
            pairs = tl.where(of_query[:, None] == of_key[None, :], pairs, 0.0)
            enter, leave = tl.where(of_key == before, enter, 0.0), tl.where(of_query == after, leave, 0.0)
        else:
            before = tl.load(queries + tl.maximum(first - 1, 0))
            after = tl.load(queries + tl.minimum(first + TILE, T) - 1)
            pairs = tl.where(of_key[:, None] == of_query[None, :], pairs, 0.0)
            enter, leave = tl.where(of_query == before, enter, 0.0), tl.where(of_key == after, leave, 0.0)
        through = tl.where(before == after, through, 0.0)
    return enter, leave, through, pairs


@triton.jit(do_not_specialize=["heads", "groups", "T", "N"])
def sums(  # type: ignore[no-untyped-def]
    b, c, weight, states, passed, decay, queries, keys, decay_b, decay_h,
    b_b, b_h, b_t, c_b, c_h, c_t, heads, groups, T, N, length,
    D: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr, COLUMN: tl.constexpr,
    FAN: tl.constexpr, TILE: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr,
    DOCUMENTS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ b cᵀ over a span, to its end, where the next one's state stands; and what is left of a state through it."""
    BLOCKS: tl.constexpr = (E + COLUMNS - 1) // COLUMNS
    GATED: tl.constexpr = DECAY or DOCUMENTS
    EXACT: tl.constexpr = b.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    block, program = program % BLOCKS, program // BLOCKS
    group, program = program % groups, program // groups
    m, batch = program % (N - 1), (program // (N - 1)).to(tl.int64)
    span = (N - 1 - m if REVERSE else m) * length
    x, y = tl.arange(0, WIDE), block * COLUMNS + tl.arange(0, COLUMNS)
    b += batch * b_b + group.to(tl.int64) * FAN * b_h
    c += batch * c_b + group.to(tl.int64) * FAN * c_h
    if DECAY:
        decay += batch * decay_b + group * decay_h
    if DOCUMENTS:
        queries += batch * T
        keys += batch * T

    state = tl.zeros([WIDE, COLUMNS], tl.float32)
    beside = tl.zeros([WIDE], tl.float32)
    left = tl.sum(tl.zeros([TILE], tl.float32), 0) + 1.0
    tiles = tl.cdiv(tl.minimum(length, T - span), TILE)
    for step in range(tiles):
        first = span + (tiles - 1 - step if REVERSE else step) * TILE
        if GATED:
            _, leave, through, _ = _gates(decay, queries, keys, first, T, TILE, REVERSE, DECAY, DOCUMENTS, EXACT)
            state *= through
            beside *= through
            left *= through
        for head in range(FAN):
            b_tile = tokens(b + tl.cast(head, tl.int64) * b_h, b_t, first, T, x, D, D == WIDE, TILE, EVEN)
            c_tile = tokens(c + tl.cast(head, tl.int64) * c_h, c_t, first, T, y, E, E % COLUMNS == 0, TILE, EVEN)
            if GATED:  # not b: Triton 3.6 does not wait for all of a factor in registers (triton-lang/triton#9433)
                c_tile = (c_tile * leave[:, None]).to(c_tile.dtype)
            state = tl.dot(tl.trans(b_tile), c_tile, acc=state, input_precision=PRECISION)
            if COLUMN:
                wide = b_tile.to(tl.float32)
                if GATED:
                    wide *= leave[:, None]
                if REVERSE:
                    t = first + tl.arange(0, TILE)
                    of = weight + (batch * heads + group * FAN + head) * T + t
                    wide *= tl.load(of, mask=t < T, other=0.0)[:, None]
                beside += tl.sum(wide, 0)

    at = ((batch * groups + group) * N + m + 1) * D * (E + COLUMN)
    where = states + at + x[:, None] * (E + COLUMN) + y[None, :]
    tl.store(where, state, mask=(x[:, None] < D) & (y[None, :] < E))
    if block == 0:
        if COLUMN:
            tl.store(states + at + x * (E + COLUMN) + E, beside, mask=x < D)
        if GATED:
            tl.store(passed + (batch * groups + group) * N + m, left)


@triton.jit(do_not_specialize=["N"])
def chain(states, passed, size, N, BEGINS: tl.constexpr, GATED: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums over each span into sums over all before: state[m+1] += state[m] · passed[m]."""
    blocks = tl.cdiv(size, TILE)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    x = tl.program_id(0) % blocks * TILE + tl.arange(0, TILE)
    at = states + row * N * size + x
    state = tl.load(at, mask=x < (size if BEGINS else 0), other=0.0)
    for m in tl.range(1, N, num_stages=4):
        at += size
        if GATED:
            state *= tl.load(passed + row * N + m - 1)
        state += tl.load(at, mask=x < size, other=0.0)
        tl.store(at, state, mask=x < size)


@triton.jit(do_not_specialize=["heads", "groups", "T", "N"])
def walks(  # type: ignore[no-untyped-def]
    a, b, c, out, total, weight, states, end, decay, queries, keys, decay_b, decay_h,
    a_b, a_h, a_t, b_b, b_h, b_t, c_b, c_h, c_t, o_b, o_h, o_t, states_m, states_x, states_y,
    end_b, end_g, end_x, end_y, heads, groups, T, N, length, least,
    D: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr, COLUMN: tl.constexpr, ROW: tl.constexpr,
    SHARE: tl.constexpr, FAN: tl.constexpr, BEGINS: tl.constexpr, ENDS: tl.constexpr, TILE: tl.constexpr,
    REVERSE: tl.constexpr, DECAY: tl.constexpr, DOCUMENTS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One span of one head of `out`: SHARE of them read one state, which FAN heads of b and c add to."""
    BLOCKS: tl.constexpr = (E + COLUMNS - 1) // COLUMNS
    GATED: tl.constexpr = DECAY or DOCUMENTS
    EXACT: tl.constexpr = b.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    block, program = program % BLOCKS, program // BLOCKS
    head, program = program % heads, program // heads
    m, batch = program % N, (program // N).to(tl.int64)
    span = (N - 1 - m if REVERSE else m) * length
    group = head // SHARE
    x, y = tl.arange(0, WIDE), block * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.arange(0, TILE)
    a += batch * a_b + head.to(tl.int64) * a_h
    b += batch * b_b + group.to(tl.int64) * FAN * b_h
    c += batch * c_b + group.to(tl.int64) * FAN * c_h
    out += batch * o_b + head.to(tl.int64) * o_h
    if DECAY:
        decay += batch * decay_b + group * decay_h
    if DOCUMENTS:
        queries += batch * T
        keys += batch * T

    known = tl.where(m >= (0 if BEGINS else 1), 1, 0)  # as a factor of bounds
    mask = (y[:, None] < E) & (x[None, :] < D * known)
    states += ((batch * groups + group) * N + m) * states_m
    state = tl.load(states + x[None, :] * states_x + y[:, None] * states_y, mask=mask, other=0.0)
    if COLUMN:
        beside = tl.load(states + x * states_x + E * states_y, mask=x < D * known, other=0.0)
        totalled = tl.where(block == 0, T, 0)  # one program writes them
    if ROW:
        below = tl.load(states + D * states_x + y * states_y, mask=y < E * known, other=0.0)

    tiles = tl.cdiv(tl.minimum(length, T - span), TILE)
    for step in range(tiles):
        first = span + (tiles - 1 - step if REVERSE else step) * TILE
        real = first + t < T
        a_tile = tokens(a, a_t, first, T, x, D, D == WIDE, TILE, EVEN)
        if GATED:
            enter, leave, through, pairs = _gates(
                decay, queries, keys, first, T, TILE, REVERSE, DECAY, DOCUMENTS, EXACT
            )
        if a_tile.dtype == tl.float16:  # a state outgrows fp16; tf32 has its digits and fp32's range
            acc = tl.dot(state, tl.trans(a_tile).to(tl.float32), input_precision="tf32")
        else:
            acc = tl.dot(state.to(a_tile.dtype), tl.trans(a_tile), input_precision=PRECISION)
        if COLUMN:
            divisor = tl.sum(a_tile.to(tl.float32) * beside[None, :], 1)
        if ROW and not REVERSE:
            of_row = tl.load(weight + (batch * heads + head) * T + first + t, mask=real, other=0.0)
            acc += of_row[None, :] * below[:, None]
        elif ROW:
            acc += below[:, None]
        if GATED:
            acc *= enter[None, :]
            state *= through
            if COLUMN:
                divisor *= enter
                beside *= through
            if ROW:
                below *= through
        for other in range(FAN):
            b_tile = tokens(b + tl.cast(other, tl.int64) * b_h, b_t, first, T, x, D, D == WIDE, TILE, EVEN)
            c_tile = tokens(c + tl.cast(other, tl.int64) * c_h, c_t, first, T, y, E, E % COLUMNS == 0, TILE, EVEN)
            scores = tl.dot(b_tile, tl.trans(a_tile), input_precision=PRECISION)
            if ROW and not REVERSE:
                scores += of_row[None, :]
            elif ROW:
                of_column = tl.load(
                    weight + (batch * groups * FAN + group * FAN + other) * T + first + t, mask=real, other=0.0
                )
                scores += of_column[:, None]
            if GATED:
                scores *= pairs
                b_tile = (b_tile * leave[:, None]).to(b_tile.dtype)
            elif REVERSE:
                scores = tl.where(t[:, None] >= t[None, :], scores, 0.0)
            else:
                scores = tl.where(t[:, None] <= t[None, :], scores, 0.0)
            acc = tl.dot(tl.trans(c_tile), scores.to(c_tile.dtype), acc=acc, input_precision=PRECISION)
            state = tl.dot(tl.trans(c_tile), b_tile, acc=state, input_precision=PRECISION)
            if COLUMN:
                divisor += tl.sum(scores, 0)
                beside += tl.sum(b_tile.to(tl.float32), 0)
            if ROW:
                added = c_tile.to(tl.float32)
                if REVERSE:
                    added *= of_column[:, None]
                if GATED:
                    added *= leave[:, None]
                below += tl.sum(added, 0)
        if COLUMN:
            tl.store(total + (batch * heads + head) * T + first + t, divisor, mask=first + t < totalled)
            acc /= tl.maximum(divisor, least)[None, :]
        where = out + first.to(tl.int64) * o_t + t[:, None] * o_t + y[None, :]
        tl.store(where, tl.trans(acc).to(out.dtype.element_ty), mask=real[:, None] & (y[None, :] < E))

    if ENDS:
        last = tl.where(m == N - 1, tl.where(head % SHARE == 0, 1, 0), 0)
        end += batch * end_b + group * end_g
        mask = (y[:, None] < E) & (x[None, :] < D * last)
        tl.store(end + x[None, :] * end_x + y[:, None] * end_y, state, mask=mask)
        if COLUMN:  # each of a state's programs has it
            tl.store(end + x * end_x + E * end_y, beside, mask=x < D * last)
        if ROW:
            tl.store(end + D * end_x + y * end_y, below, mask=y < E * last)


@triton.jit(do_not_specialize=["heads", "T"])
def undivide(  # type: ignore[no-untyped-def]
    d_out, out, total, above, below, d_b, d_h, d_t, o_b, o_h, o_t, a_b, a_h, a_t, heads, T, least,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out = above / max(below, least), backward."""
    tiles = tl.cdiv(T, TILE)
    row, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * TILE
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    t, y = first + tl.arange(0, TILE), tl.arange(0, WIDE)
    FULL: tl.constexpr = WIDTH == WIDE
    given = tokens(d_out + batch * d_b + head * d_h, d_t, first, T, y, WIDTH, FULL, TILE, False).to(tl.float32)
    value = tokens(out + batch * o_b + head * o_h, o_t, first, T, y, WIDTH, FULL, TILE, False).to(tl.float32)
    divisor = tl.load(total + row.to(tl.int64) * T + t, mask=t < T, other=1.0)
    each = 1 / tl.maximum(divisor, least)
    where = above + batch * a_b + head * a_h + t.to(tl.int64)[:, None] * a_t + y[None, :]
    tl.store(where, (given * each[:, None]).to(above.dtype.element_ty), mask=(t[:, None] < T) & (y[None, :] < WIDTH))
    slope = tl.where(divisor >= least, -tl.sum(given * value, 1) * each, 0.0)
    tl.store(below + row.to(tl.int64) * T + t, slope, mask=t < T)
