"""Causal linear attention on a GPU: a row in spans, the state (D,E) of a head in registers while a program walks one.

All of it is one walk, out_i = Σ_{j<=i} (a_i·b_j) c_j with the state Σ_j b_j c_jᵀ: the output takes (q,k,v), dq (do,v,k)
and, from right to left, dk (v,do,q) and dv (k,q,do). What a span begins with is what came of the ones before it: each
of them is summed by itself (`sums`), and the sums are added up (`chain`). A row whose heads keep the GPU busy is one
span, and is read once. States are in fp32, and the factors of the products in the inputs' type.

A normaliser, the sum of the weights, is a column of ones beside the values that is never made: a vector beside the state.
"""

# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dovetail.kernels.chunks import ceil_div, padded, roomy
from dovetail.kernels.linear_attention import triton_kernels as kernels
from dovetail.kernels.linear_attention.spans import Sizes, like

PRECISION = "ieee"  # of products of fp32 factors: "ieee" in fp32 units, "tf32x3" about as exact on tensor cores


class Gates(NamedTuple):
    """decay (B|1,G|1,T) fp32, 0 for padding; documents (B,T) int32 of queries, and of keys: -1 for padding."""

    decay: Tensor | None
    queries: Tensor | None
    keys: Tensor | None


def forward(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, start: Tensor | None, least: float | None, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (B,H,T,E), the last state (B,G,D,E), those that spans begin with (B,G,N,D,E), and the sums of weights (B,H,T).

    least: None, or what such a sum counts for at least: then `out` is divided by it, and states have a last column, of
    the keys. Without it the fourth is empty.
    """
    (B, H, T, D), G, E = q.shape, k.shape[1], v.shape[3]
    column = int(least is not None)
    out = like(q, H, E)
    end = q.new_empty(B, G, D, E + column, dtype=torch.float32)
    total = q.new_empty((B, H, T) if column else (0,), dtype=torch.float32)
    states = entered(k, v, G, gates, start, column, None, sizes, reverse=False)
    begins = start is not None
    _walk(q, k, v, out, states, gates, sizes, column=column, total=total, least=least, end=end, begins=begins)
    if not T:
        _passed(start, end)
    return out, end, states, total


def backward(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, states: Tensor, begins: bool, out: Tensor, total: Tensor,
    least: float | None, d_out: Tensor, d_end: Tensor | None, sizes: Sizes,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and, where a row begins with a state, of that; else the last is empty. See `forward`."""
    (B, H, _, D), G, E = q.shape, k.shape[1], v.shape[3]
    row, weight = 0, None
    if least is not None:
        d_out, weight = _undivided(d_out, out, total, least)
        row = 1
    d_q, d_k, d_v = like(q, H, D), like(k, G, D), like(v, G, E)
    d_start = q.new_empty((B, G, D, E + row) if begins else (0, 0), dtype=torch.float32)
    _walk(d_out, v, k, d_q, states.mT, gates, sizes, row=row, weight=weight, begins=begins)
    later = entered(q, d_out, G, gates, d_end, row, weight, sizes, reverse=True)
    ends = d_end is not None
    _walk(k, q, d_out, d_v, later, gates, sizes, reverse=True, begins=ends)
    _walk(
        v, d_out, q, d_k, later.mT, gates, sizes, reverse=True, row=row, weight=weight, begins=ends,
        end=d_start.mT if begins else None,
    )  # fmt: skip
    if begins and not q.shape[2]:
        _passed(d_end, d_start)
    return d_q, d_k, d_v, d_start


def _passed(given: Tensor | None, state: Tensor) -> None:
    """What a row of no tokens, of which no program is, makes of a state or its gradient."""
    state.zero_() if given is None else state.copy_(given)


def entered(
    b: Tensor, c: Tensor, groups: int, gates: Gates, start: Tensor | None, column: int, weight: Tensor | None,
    sizes: Sizes, *, reverse: bool,
) -> Tensor:  # fmt: skip
    """The states (B,G,N,D,E+column) with which spans begin, in the order of the walk. The first is not set without a start."""
    (B, heads, T, D), E = b.shape, c.shape[3]
    N = -(-T // sizes.span)
    states = b.new_empty(B, groups, N, D, E + column, dtype=torch.float32)
    if start is not None:
        states[:, :, :1] = start[:, :, None]
    if N <= 1:
        return states
    passed = b.new_empty(B, groups, N, dtype=torch.float32)
    common, blocks = _common(b, c, gates, sizes, reverse)
    with torch.cuda.device_of(b):
        kernels.sums[(blocks * groups * (N - 1) * B,)](
            b, c, weight, states, passed, *_gate_arguments(gates), *b.stride()[:3], *c.stride()[:3],
            heads, groups, T, N, sizes.span, COLUMN=column, FAN=heads // groups, **common,
        )  # fmt: skip
        size = D * (E + column)
        kernels.chain[(ceil_div(size, 512) * B * groups,)](
            states, passed, size, N, BEGINS=start is not None, GATED=common["DECAY"] or common["DOCUMENTS"], TILE=512,
            num_warps=2,
        )  # fmt: skip
    return states


def _walk(
    a: Tensor, b: Tensor, c: Tensor, out: Tensor, states: Tensor, gates: Gates, sizes: Sizes, *, begins: bool,
    reverse: bool = False, column: int = 0, row: int = 0, total: Tensor | None = None, least: float | None = None,
    weight: Tensor | None = None, end: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes out_i = Σ_{j<=i} (a_i·b_j) c_j (reverse: j >= i), and the last state into `end`; states as it walks.

    begins: whether the first of `states` is set. column: c has one of ones beside it, `total` gets what comes of that,
    and `out` is divided by it. row: a and b have an entry more each, `weight` in the one that queries have, and 1.
    """
    (B, heads, T), groups, N = a.shape[:3], states.shape[1], states.shape[2]
    common, blocks = _common(b, c, gates, sizes, reverse)
    with torch.cuda.device_of(a):
        kernels.walks[(blocks * heads * N * B,)](
            a, b, c, out, total, weight, states, end, *_gate_arguments(gates), *a.stride()[:3], *b.stride()[:3],
            *c.stride()[:3], *out.stride()[:3], *states.stride()[2:], *(end.stride() if end is not None else (0,) * 4),
            heads, groups, T, N, sizes.span, least or 0.0, COLUMN=column, ROW=row, SHARE=heads // groups, FAN=b.shape[1] // groups,
            BEGINS=begins, ENDS=end is not None, **common,
        )  # fmt: skip


def _undivided(d_out: Tensor, out: Tensor, total: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Gradients of the sums that were divided, (B,H,T,E), and of what they were divided by, (B,H,T)."""
    B, H, T, E = out.shape
    above, below = like(out, H, E), torch.empty_like(total)
    with torch.cuda.device_of(out):
        kernels.undivide[(ceil_div(T, 32) * B * H,)](
            d_out, out, total, above, below, *d_out.stride()[:3], *out.stride()[:3], *above.stride()[:3], H, T, least,
            WIDTH=E, WIDE=padded(E), TILE=32,
        )  # fmt: skip
    return above, below


def _common(b: Tensor, c: Tensor, gates: Gates, sizes: Sizes, reverse: bool) -> tuple[dict[str, object], int]:
    """What both kernels over tokens are compiled for, and how many programs share a state's columns."""
    D, E = b.shape[3], c.shape[3]
    columns = min(sizes.columns if padded(D) <= 128 else max(16, sizes.columns // 2), padded(E))
    return {
        "D": D, "E": E, "WIDE": padded(D), "COLUMNS": columns, "TILE": sizes.tile,
        "REVERSE": reverse, "DECAY": gates.decay is not None, "DOCUMENTS": gates.queries is not None,
        "EVEN": b.shape[2] % sizes.tile == 0, "PRECISION": PRECISION,
        "num_warps": sizes.warps, "num_stages": sizes.stages if roomy(b.device) else 1,
    }, ceil_div(E, columns)  # fmt: skip


def _gate_arguments(gates: Gates) -> tuple[Tensor | int | None, ...]:
    """The three, and the strides of the decay's rows and heads, 0 where they share one."""
    if gates.decay is None:
        return *gates, 0, 0
    batch, head = (0 if n == 1 else s for n, s in zip(gates.decay.shape[:2], gates.decay.stride()[:2], strict=True))
    return *gates, batch, head
