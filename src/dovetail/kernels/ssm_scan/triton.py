"""The selective scan on a GPU: states stay in registers, and of all states only one a chunk is ever written.

A program walks the tokens of a segment of one row for a block of channels, all N entries of each. Rows that are too few
to fill the device are cut into segments: each is walked once from zero to learn what it adds, those sums are carried
along the row, and the segments are walked again from their true starts; from right to left for the gradients alike.
A backward makes the states of a chunk again from its first. Nothing is added in an order that depends on timing.
"""

# ruff: noqa: RUF005 (Triton adds tuples, and does not unpack them)
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# (Triton's language in Python's clothes: its loops, tiles and constants are not what a type checker takes them for)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from dovetail.kernels.chunks import ceil_div
from dovetail.kernels.operation import operation

CHUNK = 64  # tokens from one kept state to the next
STEP = 4  # tokens whose inputs are read ahead, and whose states a backward holds in registers
WARPS = 2  # 512 entries of a state: 8 a thread
FILL = 2048  # programs that keep 132 multiprocessors busy
ROWS = 65_535  # at a time, in a grid's last axis: in the first they would take `_forward` half as many registers again
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `kernels.ssm_scan.selective_scan`, in fp32: y and the last state are fp32 whatever was given."""
    if len(x) > ROWS:
        parts = [(None,) * len(x) if t is None else t.split(ROWS) for t in (x, dt, b, c, start, first)]
        found = [selective_scan(x, dt, a, *more) for x, dt, *more in zip(*parts)]
        return torch.cat([y for y, _ in found]), torch.cat([end for _, end in found])
    given = (x, dt, a, b, c, start)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    y, end, _ = _scan(*given, first, keep)
    return y, end


def _tile(N: int) -> tuple[int, int]:
    """(channels of a program, entries of a channel in it: N and what fills it up)."""
    entries = max(4, 1 << (N - 1).bit_length())
    return min(32, max(8, 512 // entries)), entries


def _segments(rows: int, T: int, blocks: int) -> tuple[int, int]:
    """(how many segments a row is cut into, tokens of one: a multiple of CHUNK) for `blocks` of channels."""
    rows, T = max(rows, 1), max(T, 1)  # no rows are none of one segment, and no tokens a segment of none
    wanted = ceil_div(FILL, rows * blocks)
    length = ceil_div(ceil_div(T, min(wanted, ceil_div(T, 4 * CHUNK))), CHUNK) * CHUNK
    return ceil_div(T, length), length


def _cuts(first: Tensor | None, segments: int, length: int) -> Tensor | None:
    """(B,segments): whether a document begins in a segment, so that no state gets through it."""
    if first is None:
        return None
    return F.pad(first, (0, segments * length - first.shape[1])).unflatten(1, (segments, length)).any(-1)


@operation("selective_scan")
def _scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor, first: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B,T,D), the last state (B,D,N), and where `keep` the state before each chunk (B,chunks,D,N)."""
    (B, T, D), N = x.shape, a.shape[1]
    x, dt, a, b, c = (t.contiguous() for t in (x, dt, a.float(), b, c))
    start, first = start.float().contiguous(), None if first is None else first.contiguous()
    y, end = torch.empty_like(x, dtype=torch.float32), torch.empty_like(start)
    kept = start.new_empty(B, ceil_div(T, CHUNK) if keep else 0, D, N)
    tile, blocks = _tile(N), ceil_div(D, _tile(N)[0])
    segments, length = _segments(B, T, blocks)
    sizes = (T, D, N, length, first is not None, *tile, STEP)
    with torch.cuda.device_of(x):
        starts = _carried(x, dt, a, b, first, start, segments, length, reverse=False)
        grid = (blocks, segments, B)
        _forward[grid](x, dt, a, b, c, first, starts, y, end, kept, *sizes, CHUNK, keep, num_warps=WARPS)  # type: ignore[arg-type]
    return y, end, kept


@_scan.register_fake
def _(x, dt, a, b, c, start, first, keep):  # type: ignore[no-untyped-def]
    (B, T, D), N = x.shape, a.shape[1]
    chunks = (T + CHUNK - 1) // CHUNK if keep else 0
    wide = lambda *shape: x.new_empty(shape, dtype=torch.float32)  # noqa: E731
    return wide(B, T, D), wide(B, D, N), wide(B, chunks, D, N)


def _carried(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, first: Tensor | None, start: Tensor, segments: int, length: int,
    *, reverse: bool,
) -> Tensor:  # fmt: skip
    """What arrives at each segment (B,segments,D,N): states from the left, or gradients from the right where `reverse`."""
    if segments == 1:
        return start
    (B, T, D), N = x.shape, a.shape[1]
    added, total = start.new_empty(B, segments, D, N), start.new_empty(B, segments, D)
    arrives, cuts = torch.empty_like(added), _cuts(first, segments, length)
    tile, packed, blocks = _tile(N), first is not None, ceil_div(D, _tile(N)[0])
    _alone[(blocks, segments, B)](
        x, dt, a, b, first, added, total, T, D, N, length, packed, *tile, STEP, reverse, num_warps=WARPS  # type: ignore[arg-type]
    )  # fmt: skip
    _carry[(blocks, B)](added, total, a, cuts, start, arrives, segments, D, N, packed, *tile, reverse, num_warps=WARPS)  # type: ignore[arg-type]
    return arrives


@operation("selective_scan_backward")
def _backward_of(
    dy: Tensor, dend: Tensor | None, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, first: Tensor | None,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, a, b, c and start, in fp32 but for those of x and dt."""
    (B, T, D), N = x.shape, a.shape[1]
    dy, x, dt, a, b, c = (t.contiguous() for t in (dy.float(), x, dt, a.float(), b, c))
    first = None if first is None else first.contiguous()
    dend = kept.new_zeros(B, D, N) if dend is None else dend.float().contiguous()
    tile, blocks = _tile(N), ceil_div(D, _tile(N)[0])
    segments, length = _segments(B, T, blocks)
    dx, ddt, dstart = torch.empty_like(x), torch.empty_like(dt), torch.empty_like(dend)
    db, dc = (x.new_empty(B, blocks, T, N, dtype=torch.float32) for _ in range(2))  # a part for each block of channels
    da = torch.empty(B, segments, D, N, dtype=torch.float32, device=x.device)
    inner = da.new_empty(B, segments, blocks, CHUNK // STEP, *tile)
    sizes = (T, D, N, length, first is not None, *tile, STEP)
    with torch.cuda.device_of(x):
        ends = _carried(dy, dt, a, c, first, dend, segments, length, reverse=True)
        _backward[(blocks, segments, B)](
            x, dt, a, b, c, first, kept, dy, ends, inner, dx, ddt, da, db, dc, dstart, *sizes, CHUNK, num_warps=WARPS  # type: ignore[arg-type]
        )  # fmt: skip
    return dx, ddt, da.sum((0, 1)), db.sum(1), dc.sum(1), dstart


@_backward_of.register_fake
def _(dy, dend, x, dt, a, b, c, first, kept):  # type: ignore[no-untyped-def]
    (B, T, D), N = x.shape, a.shape[1]
    wide = lambda *shape: x.new_empty(shape, dtype=torch.float32)  # noqa: E731
    dx, ddt = x.new_empty(B, T, D), dt.new_empty(B, T, D)
    return dx, ddt, wide(D, N), wide(B, T, N), wide(B, T, N), wide(B, D, N)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, dt, a, b, c, start, first, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.dtypes = [t.dtype for t in (x, dt, a, b, c, start)]
    ctx.save_for_backward(x, dt, a, b, c, first, output[2])


def _backward_rule(ctx, dy, dend, _kept):  # type: ignore[no-untyped-def]
    x, *rest = ctx.saved_tensors
    dy = x.new_zeros(x.shape, dtype=torch.float32) if dy is None else dy
    grads = _backward_of(dy, dend, x, *rest)
    return *(g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)), None, None


_scan.register_autograd(_backward_rule, setup_context=_setup)


@triton.jit
def _alone(  # type: ignore[no-untyped-def]
    x, dt, a, b, first, added, total, T, D, N, length, packed: tl.constexpr, C: tl.constexpr, E: tl.constexpr,
    STEP: tl.constexpr, reverse: tl.constexpr,
):  # fmt: skip
    """What a segment adds to a state that was zero before it, and the sum of its dt. Reverse: x is dy, b is c."""
    segment, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel, entry = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, E)
    at = channel[:, None] * N + entry[None, :]
    inside = (channel < D)[:, None] & (entry < N)[None, :]
    rate = tl.load(a + at, mask=inside, other=0.0) * LOG2E
    h = tl.zeros((C, E), tl.float32)
    span = tl.zeros((C,), tl.float32)
    for done in range(0, length, STEP):
        steps, drives, reads, begins = (), (), (), ()
        for i in tl.static_range(STEP):
            t = segment * length + (length - 1 - done - i if reverse else done + i)
            some = channel < tl.where(t < T, D, 0)
            here = entry < tl.where(t < T, N, 0)
            where = (row * T + t) * D
            d = tl.load(dt + where + channel, mask=some, other=0.0).to(tl.float32)
            u = tl.load(x + where + channel, mask=some, other=0.0).to(tl.float32)
            steps = steps + (d,)
            drives = drives + (u if reverse else d * u,)
            reads = reads + (tl.load(b + (row * T + t) * N + entry, mask=here, other=0.0).to(tl.float32),)
            begins = begins + (tl.load(first + row * T + t, mask=t < T, other=0) if packed else 0,)
        for i in tl.static_range(STEP):
            decay = tl.exp2(steps[i][:, None] * rate)
            if packed:
                decay = tl.where(begins[i] != 0, 0.0, decay)
            drive = drives[i][:, None] * reads[i][None, :]
            h = decay * (h + drive) if reverse else decay * h + drive
            span += steps[i]
    block = row * tl.num_programs(1) + segment
    tl.store(added + block * D * N + at, h, mask=inside)
    tl.store(total + block * D + channel, span, mask=channel < D)


@triton.jit
def _carry(  # type: ignore[no-untyped-def]
    added, total, a, cuts, start, arrives, segments, D, N, packed: tl.constexpr, C: tl.constexpr, E: tl.constexpr,
    reverse: tl.constexpr,
):  # fmt: skip
    """arrives_s = exp(total_{s-1} a) arrives_{s-1} + added_{s-1}, from `start` at the first (reverse: at the last)."""
    row = tl.program_id(1).to(tl.int64)
    channel, entry = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, E)
    at = channel[:, None] * N + entry[None, :]
    inside = (channel < D)[:, None] & (entry < N)[None, :]
    rate = tl.load(a + at, mask=inside, other=0.0) * LOG2E
    h = tl.load(start + row * D * N + at, mask=inside, other=0.0)
    for i in range(segments):
        block = row * segments + (segments - 1 - i if reverse else i)
        tl.store(arrives + block * D * N + at, h, mask=inside)
        decay = tl.exp2(tl.load(total + block * D + channel, mask=channel < D, other=0.0)[:, None] * rate)
        if packed:
            decay = tl.where(tl.load(cuts + block) != 0, 0.0, decay)
        h = decay * h + tl.load(added + block * D * N + at, mask=inside, other=0.0)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, dt, a, b, c, first, starts, y, end, kept, T, D, N, length, packed: tl.constexpr, C: tl.constexpr,
    E: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr, keep: tl.constexpr,
):  # fmt: skip
    """y of a segment, the state before each of its chunks, and from the last segment the state at the end."""
    segment, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel, entry = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, E)
    at = channel[:, None] * N + entry[None, :]
    inside = (channel < D)[:, None] & (entry < N)[None, :]
    rate = tl.load(a + at, mask=inside, other=0.0) * LOG2E
    h = tl.load(starts + (row * tl.num_programs(1) + segment) * D * N + at, mask=inside, other=0.0)
    for begin in range(segment * length, min(segment * length + length, T), CHUNK):
        if keep:
            tl.store(kept + (row * tl.cdiv(T, CHUNK) + begin // CHUNK) * D * N + at, h, mask=inside)
        for at_token in range(begin, min(begin + CHUNK, T), STEP):
            steps, drives, writes, reads, begins = (), (), (), (), ()
            for i in tl.static_range(STEP):
                t = at_token + i
                some, here = channel < tl.where(t < T, D, 0), entry < tl.where(t < T, N, 0)
                d = tl.load(dt + (row * T + t) * D + channel, mask=some, other=0.0).to(tl.float32)
                u = tl.load(x + (row * T + t) * D + channel, mask=some, other=0.0).to(tl.float32)
                where = (row * T + t) * N
                steps = steps + (d,)
                drives = drives + (d * u,)
                writes = writes + (tl.load(b + where + entry, mask=here, other=0.0).to(tl.float32),)
                reads = reads + (tl.load(c + where + entry, mask=here, other=0.0).to(tl.float32),)
                begins = begins + (tl.load(first + row * T + t, mask=t < T, other=0) if packed else 0,)
            for i in tl.static_range(STEP):
                t = at_token + i
                decay = tl.exp2(steps[i][:, None] * rate)
                if packed:
                    decay = tl.where(begins[i] != 0, 0.0, decay)
                h = decay * h + drives[i][:, None] * writes[i][None, :]
                out = tl.sum(h * reads[i][None, :], 1)
                tl.store(y + (row * T + t) * D + channel, out, mask=channel < tl.where(t < T, D, 0))
    if segment == tl.num_programs(1) - 1:
        tl.store(end + row * D * N + at, h, mask=inside)


@triton.jit
def _both(p, q, r, s):  # type: ignore[no-untyped-def]
    return p + r, q + s


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    x, dt, a, b, c, first, kept, dy, ends, inner, dx, ddt, da, db, dc, dstart, T, D, N, length, packed: tl.constexpr,
    C: tl.constexpr, E: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients of a segment, chunk by chunk from the right; of b and c the share of this block of channels.

    In a chunk, the states before every STEP tokens go to `inner` (one program's own), then STEP tokens at a time are
    walked forward once more, and back. g: the gradient that arrives from later tokens at the state after a token.
    """
    segment, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel, entry = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, E)
    at = channel[:, None] * N + entry[None, :]
    inside = (channel < D)[:, None] & (entry < N)[None, :]
    rate = tl.load(a + at, mask=inside, other=0.0) * LOG2E
    block = row * tl.num_programs(1) + segment
    g = tl.load(ends + block * D * N + at, mask=inside, other=0.0)
    own = inner + (block * tl.num_programs(0) + tl.program_id(0)) * (CHUNK // STEP * C * E)
    own += tl.arange(0, C)[:, None] * E + entry[None, :]
    part = (row * tl.num_programs(0) + tl.program_id(0)) * T
    slope = tl.zeros((C, E), tl.float32)
    chunks = tl.cdiv(min(segment * length + length, T) - segment * length, CHUNK)
    for i_chunk in range(chunks):
        chunk = segment * (length // CHUNK) + chunks - 1 - i_chunk
        h = tl.load(kept + (row * tl.cdiv(T, CHUNK) + chunk) * D * N + at, mask=inside, other=0.0)
        groups = tl.cdiv(min(CHUNK, T - chunk * CHUNK), STEP)
        tl.debug_barrier()  # `inner` of the chunk before has been read
        for group in range(groups):
            tl.store(own + group * (C * E), h)
            for i in tl.static_range(STEP):
                t = chunk * CHUNK + group * STEP + i
                some, here = channel < tl.where(t < T, D, 0), entry < tl.where(t < T, N, 0)
                d = tl.load(dt + (row * T + t) * D + channel, mask=some, other=0.0).to(tl.float32)
                u = tl.load(x + (row * T + t) * D + channel, mask=some, other=0.0).to(tl.float32)
                write = tl.load(b + (row * T + t) * N + entry, mask=here, other=0.0).to(tl.float32)
                decay = tl.exp2(d[:, None] * rate)
                if packed:
                    decay = tl.where(tl.load(first + row * T + t, mask=t < T, other=0) != 0, 0.0, decay)
                h = decay * h + (d * u)[:, None] * write[None, :]
        tl.debug_barrier()  # `inner` of this chunk is written
        for i_group in range(groups):
            group = groups - 1 - i_group
            begin = chunk * CHUNK + group * STEP
            h = tl.load(own + group * (C * E))
            befores, decays, afters = (), (), ()
            for i in tl.static_range(STEP):
                t = begin + i
                some, here = channel < tl.where(t < T, D, 0), entry < tl.where(t < T, N, 0)
                d = tl.load(dt + (row * T + t) * D + channel, mask=some, other=0.0).to(tl.float32)
                u = tl.load(x + (row * T + t) * D + channel, mask=some, other=0.0).to(tl.float32)
                write = tl.load(b + (row * T + t) * N + entry, mask=here, other=0.0).to(tl.float32)
                decay = tl.exp2(d[:, None] * rate)
                if packed:
                    decay = tl.where(tl.load(first + row * T + t, mask=t < T, other=0) != 0, 0.0, decay)
                befores, decays = befores + (h,), decays + (decay,)
                h = decay * h + (d * u)[:, None] * write[None, :]
                afters = afters + (h,)
            for back in tl.static_range(STEP):
                t = begin + STEP - 1 - back
                some, here = channel < tl.where(t < T, D, 0), entry < tl.where(t < T, N, 0)
                where = (row * T + t) * D
                d = tl.load(dt + where + channel, mask=some, other=0.0).to(tl.float32)
                u = tl.load(x + where + channel, mask=some, other=0.0).to(tl.float32)
                up = tl.load(dy + where + channel, mask=some, other=0.0)
                read = tl.load(c + (row * T + t) * N + entry, mask=here, other=0.0).to(tl.float32)
                g += up[:, None] * read[None, :]
                through = g * decays[STEP - 1 - back] * befores[STEP - 1 - back]  # the gradient of the decay's exponent
                write = tl.load(b + (row * T + t) * N + entry, mask=here, other=0.0).to(tl.float32)
                taken = tl.sum(g * write[None, :], 1)
                tl.store(dx + where + channel, (taken * d).to(dx.dtype.element_ty), mask=some)
                late = taken * u + tl.sum(through * rate, 1) * LN2
                tl.store(ddt + where + channel, late.to(ddt.dtype.element_ty), mask=some)
                slope += through * d[:, None]
                of_b, of_c = tl.reduce((g * (d * u)[:, None], afters[STEP - 1 - back] * up[:, None]), 0, _both)
                tl.store(db + (part + t) * N + entry, of_b, mask=here)
                tl.store(dc + (part + t) * N + entry, of_c, mask=here)
                g *= decays[STEP - 1 - back]
    tl.store(da + block * D * N + at, slope, mask=inside)
    if segment == 0:
        tl.store(dstart + row * D * N + at, g, mask=inside)
