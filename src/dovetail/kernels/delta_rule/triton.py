"""The delta rule on a GPU, by the WY representation (Yang et al. 2024, section 3.2; gated: Yang et al. 2025, section 3.3).

Chunks of 64 tokens: their triangular systems are inverted side by side in fp32, then one program a head and block of
value columns walks the chunks with its part of the state in fp32 registers, then outputs come chunk by chunk. A backward
keeps the inverses (64 numbers a token and head), walks the states again, and then back.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# (a kernel's launch takes what its definition names, and options)

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.kernels.chunks import ceil_div, padded
from dovetail.kernels.delta_rule import tiles, tiles_back
from dovetail.kernels.operation import operation

CHUNK = 64  # tokens
FILL = 100  # programs that a walk should have: about one a multiprocessor
SHARED = 160_000  # bytes of operands that a loop may have under way


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, start: Tensor | None,
    reset: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o in q's dtype, S_T (B,H,D,Dv) in fp32) of unscaled q. Products are made in q's dtype, everything else in fp32."""
    start = q.new_zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=torch.float32) if start is None else start.float()
    decay = None if log_decay is None else log_decay.float()
    documents = None if reset is None else reset.expand(len(q), -1).cumsum(1, dtype=torch.int32)
    out, end, *_ = _forward(q, k.to(q.dtype), v.to(q.dtype), beta.float(), decay, start, documents, scale)
    return out, end


def _rows(x: Tensor) -> Tensor:
    """x (B,H,T,D) dense, head by head or token by token: what is made like it has its strides."""
    return x if x.transpose(1, 2).is_contiguous() else x.contiguous()


def _walk(sequences: int, D: int, Dv: int, size: int) -> tuple[int, dict[str, int]]:
    """(columns of values of one walking program, how it is launched): narrower where rows are few or keys wide."""
    columns = padded(Dv, 64 if D <= 128 else 32)
    while columns > 16 and sequences * ceil_div(Dv, columns) < FILL:
        columns //= 2
    stages = SHARED // ((3 * padded(D) + 2 * columns) * CHUNK * size)
    return columns, {"num_stages": max(1, min(3, stages)), "num_warps": 8 if columns > 32 else 4}


@operation("delta_rule")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, start: Tensor, documents: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, S_T, and for the backward the inverses (B·H,N,L,L), γ and left (B·H,N,L) and whole (B·H,N) of N chunks."""
    (B, H, T, D), Dv, N, L = q.shape, v.shape[3], ceil_div(q.shape[2], CHUNK), CHUNK
    q, k, v = _rows(q), _rows(k), _rows(v)
    beta, start = beta.contiguous(), start.contiguous()
    decay, documents = (None if t is None else t.contiguous() for t in (decay, documents))
    flags = (decay is not None, documents is not None)
    a = torch.empty(B * H, N, L, L, dtype=torch.float32, device=q.device)
    since, left, whole = a.new_empty(B * H, N, L), a.new_empty(B * H, N, L), a.new_empty(B * H, N)
    inverse, o = torch.empty_like(a, dtype=q.dtype), torch.empty_like(v)
    W, V = padded(D), padded(Dv, 128 if D <= 128 else 64)
    with torch.cuda.device_of(q):
        tiles.system[(N * B * H,)](
            k, beta, decay, documents, a, since, left, whole, *k.stride()[:3], H, T, D, *flags, L, W  # type: ignore[arg-type]
        )  # fmt: skip
        tiles.invert[(B * H * N,)](a, inverse, L)  # type: ignore[arg-type]
        del a
        _, states, errors, end = _states(k, v, beta, inverse, since, left, whole, start)
        tiles.outputs[(ceil_div(Dv, V) * N * B * H,)](
            q, k, decay, documents, since, states, errors, o, *q.stride()[:3], *k.stride()[:3], *o.stride()[:3],
            scale, H, T, D, Dv, *flags, L, W, V, num_stages=1,  # type: ignore[arg-type]
        )  # fmt: skip
    return o, end, inverse, since, left, whole


def _states(
    k: Tensor, v: Tensor, beta: Tensor, inverse: Tensor, since: Tensor, left: Tensor, whole: Tensor, start: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W (B·H,N,L,D), S before each chunk (B·H,N,D,Dv), E (B·H,N,L,Dv) and S_T."""
    (B, H, T, D), Dv, N, L = k.shape, v.shape[3], inverse.shape[1], CHUNK
    w, u = k.new_empty(B * H, N, L, D), k.new_empty(B * H, N, L, Dv)
    states, errors, end = k.new_empty(B * H, N, D, Dv), k.new_empty(B * H, N, L, Dv), torch.empty_like(start)
    W, (V, launch) = padded(D), _walk(B * H, D, Dv, k.element_size())
    tiles.prepare[(N * B * H,)](
        k, v, beta, inverse, since, w, u, *k.stride()[:3], *v.stride()[:3], H, T, D, Dv, L, W, padded(Dv, 64), num_stages=1  # type: ignore[arg-type]
    )  # fmt: skip
    tiles.walk[(ceil_div(Dv, V) * B * H,)](
        k, w, u, start, left, whole, states, errors, end, *k.stride()[:3], H, T, D, Dv, N, L, W, V, **launch  # type: ignore[arg-type]
    )  # fmt: skip
    return w, states, errors, end


@_forward.register_fake
def _(q, k, v, beta, decay, start, documents, scale):  # type: ignore[no-untyped-def]
    sequences, N, L = q.shape[0] * q.shape[1], (q.shape[2] + CHUNK - 1) // CHUNK, CHUNK
    wide = lambda *shape: q.new_empty(shape, dtype=torch.float32)  # noqa: E731
    inverse, rows = q.new_empty(sequences, N, L, L), (wide(sequences, N, L), wide(sequences, N, L))
    return torch.empty_like(_rows(v)), wide(*start.shape), inverse, *rows, wide(sequences, N)


@operation("delta_rule_backward")
def _backward(
    do: Tensor, dend: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, start: Tensor,
    documents: Tensor | None, inverse: Tensor, since: Tensor, left: Tensor, whole: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, beta, the decay's logarithm (of no use where none was given) and start."""
    (B, H, T, D), Dv, N, L = q.shape, v.shape[3], inverse.shape[1], CHUNK
    q, k, v, do = _rows(q), _rows(k), _rows(v), _rows(do)
    beta, start = beta.contiguous(), start.contiguous()
    decay, documents = (None if t is None else t.contiguous() for t in (decay, documents))
    dend = torch.zeros_like(start) if dend is None else dend.float().contiguous()
    flags, sizes = (decay is not None, documents is not None), (scale, H, T, D, Dv)
    W, V, (columns, launch) = padded(D), padded(Dv, 64), _walk(B * H, D, Dv, k.element_size())
    block = padded(D, 64)
    blocks = ceil_div(D, block)
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))  # dense, and so of the same strides
    dbeta, dlog = (since.new_empty(blocks + 1, B * H, N, L) for _ in range(2))  # the last share is that of the scores
    qs, ks, vs, os = (t.stride()[:3] for t in (q, k, v, do))
    with torch.cuda.device_of(q):
        w, states, errors, _ = _states(k, v, beta, inverse, since, left, whole, start)
        de, y, dstates, dstart = (
            *(torch.empty_like(errors) for _ in range(2)),
            torch.empty_like(states),
            torch.empty_like(start),
        )
        dscores, dsystem = torch.empty_like(inverse), torch.empty_like(inverse)
        tiles_back.local[(N * B * H,)](
            q, k, do, decay, documents, de, *qs, *ks, *os, *sizes, *flags, L, W, V, num_stages=1  # type: ignore[arg-type]
        )  # fmt: skip
        tiles_back.walk_back[(ceil_div(Dv, columns) * B * H,)](
            q, k, w, do, since, left, whole, dend, de, dstates, dstart, *qs, *ks, *os, *sizes, N, L, W, columns,
            **launch,  # type: ignore[arg-type]
        )  # fmt: skip
        # Of 16 columns two groups of four warps would have 8 each, of which Triton 3.6 reads more (triton-lang/triton#10629).
        tiles_back.scores_back[(N * B * H,)](
            q, k, v, beta, inverse, errors, de, do, decay, documents, y, dv, dscores, dsystem, dbeta[-1], dlog[-1],
            *qs, *ks, *vs, *os, *sizes, *flags, L, W, V, num_stages=1, num_warps=8 if V > 16 else 4,  # type: ignore[arg-type]
        )  # fmt: skip
        tiles_back.widths_back[(blocks * N * B * H,)](
            q, k, beta, since, left, whole, states, dstates, errors, y, do, dscores, dsystem, dq, dk, dbeta, dlog,
            *qs, *ks, *os, *sizes, L, block, V, num_stages=1,  # type: ignore[arg-type]
        )  # fmt: skip
    ddecay = dlog.sum(0).flip(-1).cumsum(-1).flip(-1)  # a token's decay is in the sums of all that follow in its chunk
    dbeta, ddecay = (x.view(B, H, N * L)[:, :, :T].contiguous() for x in (dbeta.sum(0), ddecay))
    return dq, dk, dv, dbeta, ddecay, dstart


@_backward.register_fake
def _(do, dend, q, k, v, beta, decay, start, documents, inverse, since, left, whole, scale):  # type: ignore[no-untyped-def]
    like = lambda t: torch.empty_like(_rows(t))  # noqa: E731
    wide = lambda t: t.new_empty(t.shape, dtype=torch.float32)  # noqa: E731
    return like(q), like(k), like(v), wide(beta), wide(beta), wide(start)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.scale = scale
    ctx.save_for_backward(*tensors, *output[2:])


def _rule(ctx, do, dend, *_):  # type: ignore[no-untyped-def]
    q, k, v, beta, decay, start, documents, *kept = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do.to(v.dtype)
    dq, dk, dv, dbeta, ddecay, dstart = _backward(do, dend, q, k, v, beta, decay, start, documents, *kept, ctx.scale)
    return dq, dk, dv, dbeta, None if decay is None else ddecay, dstart, None, None


_forward.register_autograd(_rule, setup_context=_setup)
