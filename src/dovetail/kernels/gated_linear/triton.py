"""Gated linear attention on a GPU: chunks of a row at once, and the states at their borders by walks along it.

Let b_t be the sum of log α over a chunk up to and with token t, and G that over the whole chunk. The walk carries
S <- exp(G) S + (k exp(G - b))ᵀ v from chunk to chunk and writes S down where each begins; then all chunks run at once,
    o = (q exp(b)) S + tril(A) v,   A_ij = Σ_d q_id k_jd exp(b_id - b_jd).
Its gradient walks back, dS <- exp(G) dS + (q exp(b))ᵀ do, and then takes all chunks at once, dv apart (Yang et al. 2024, section
4 and appendix C). A row that has too few heads to fill the device is walked in segments, twice: once for what each adds.

A is one product, of q exp(b - m) and k exp(m - b) with m halfway, where no factor leaves exp(±60). Chunks that forget
more than that take the way apart: blocks of 16 keys seen from their own end, which bounds both factors by 1, and pairs
within a block one by one. So any decay is safe, and usual ones cost what linear attention costs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from dovetail.kernels.chunks import ceil_div, padded
from dovetail.kernels.gated_linear import triton_kernels
from dovetail.kernels.operation import operation

FILL = 512  # programs that a walk should have
LEAST = 8  # chunks of a segment, at least
STEEP = (False, True)  # each kernel is launched for either kind of chunk; a program of the other kind returns at once


class Launch(NamedTuple):
    """How one kernel runs. values: columns of the state that it holds; keys: rows, where it does not hold all."""

    values: int
    warps: int
    stages: int
    keys: int = 0


class Blocks(NamedTuple):
    """chunk: tokens, a power of two of at least 16. Then the four kernels."""

    chunk: int
    walk: Launch
    forward: Launch
    backward_values: Launch
    backward_keys: Launch


# By the width of a key, rounded up, and by whether products are in bf16 (else in fp32: tf32 for fp16 inputs). Four
# warps are one warp group, which multiplies 64 rows: eight would hold everything twice.
BLOCKS = {
    (64, True): Blocks(64, Launch(64, 4, 3, 64), Launch(64, 4, 2), Launch(64, 4, 2), Launch(64, 4, 2, 64)),
    (128, True): Blocks(64, Launch(128, 4, 4, 32), Launch(64, 4, 3), Launch(64, 4, 2), Launch(64, 4, 2, 64)),
    (256, True): Blocks(32, Launch(64, 4, 2, 64), Launch(64, 4, 1), Launch(64, 4, 1), Launch(64, 4, 1, 64)),
    (64, False): Blocks(32, Launch(32, 4, 1, 64), Launch(32, 4, 1), Launch(32, 4, 1), Launch(32, 4, 1, 32)),
    (128, False): Blocks(32, Launch(32, 4, 1, 64), Launch(32, 8, 1), Launch(32, 8, 1), Launch(32, 4, 1, 32)),
    (256, False): Blocks(16, Launch(32, 4, 1, 64), Launch(32, 8, 1), Launch(32, 8, 1), Launch(32, 4, 1, 32)),
}


def gated_linear(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, start: Tensor | None, reset: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(o (B,H,T,Dv), S_T (B,H,D,Dv) in fp32), with gradients; q, k, v of one type of at most 32 bits, widths to 256."""
    if reset is not None:
        reset = reset.expand(q.shape[0], -1).to(torch.uint8).contiguous()
    return _run(q, k, v, log_decay, None if start is None else start.float().contiguous(), reset, scale)


@operation("gated_linear")
def _run(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor | None, reset: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    call = _Call.of(q, k, v, reset)
    q, k, v, g = map(_rows, (q, k, v, g))
    out = _like(v)
    with torch.cuda.device_of(q):
        states, end, sums = call.walk(k, v, g, start, 1.0, back=False)
        call.forward([q, k, v, g], states, sums, out, scale)
    return out, end


@operation("gated_linear_backward")
def _run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    start: Tensor | None,
    reset: Tensor | None,
    scale: float,
    d_out: Tensor,
    d_end: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = _Call.of(q, k, v, reset)
    q, k, v, g, d_out = map(_rows, (q, k, v, g, d_out.to(v.dtype)))
    dq, dk, dv, dg = map(_like, (q, k, v, g))
    with torch.cuda.device_of(q):
        states, _, sums = call.walk(k, v, g, start, 1.0, back=False)
        d_states, d_start, _ = call.walk(q, d_out, g, d_end.float().contiguous(), scale, back=True)
        call.backward_values([q, k, g, d_out, dv], d_states, sums, scale)
        call.backward_keys([q, k, v, g, d_out, dq, dk, dg], states, d_states, sums, scale)
    return dq, dk, dv, dg, d_start


@_run.register_fake
def _(q, k, v, g, start, reset, scale):  # type: ignore[no-untyped-def]
    return _like(v), _matrix(k, v)


@_run_backward.register_fake
def _(q, k, v, g, start, reset, scale, d_out, d_end):  # type: ignore[no-untyped-def]
    return _like(q), _like(k), _like(v), _like(g), _matrix(k, v)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, d_out: Tensor, d_end: Tensor):  # type: ignore[no-untyped-def]
    *inputs, start, reset = ctx.saved_tensors
    *found, d_start = _run_backward(*inputs, start, reset, ctx.scale, d_out, d_end)
    return *found, None if start is None else d_start, None, None


_run.register_autograd(_gradients, setup_context=_keep)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """(B,H,T,W) whose memory is (B,T,H,W), as projections give and take it."""
    B, H, T, W = x.shape
    return x.new_empty(B, T, H, W).transpose(1, 2)


def _matrix(k: Tensor, v: Tensor) -> Tensor:
    return k.new_empty(*k.shape[:2], k.shape[3], v.shape[3], dtype=torch.float32)


class _Call(NamedTuple):
    """What the kernels of one call share."""

    B: int
    H: int
    T: int
    D: int
    Dv: int
    blocks: Blocks
    reset: Tensor
    meta: dict[str, Any]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, reset: Tensor | None) -> _Call:
        (B, H, T, D), half = q.shape, q.dtype == torch.bfloat16
        blocks = BLOCKS[max(64, padded(D)), half]
        meta = {
            "D": D,
            "DV": v.shape[3],
            "L": blocks.chunk,
            "WIDE": tl.bfloat16 if half else tl.float32,  # of factors: fp16 has no room for exp(±60)
            "EXACT": not half,
            "PRECISION": "tf32" if q.dtype == torch.float16 else "ieee",
            "HAS_RESET": reset is not None,
        }
        return cls(B, H, T, D, v.shape[3], blocks, q if reset is None else reset, meta)  # q: a pointer never read

    def walk(
        self, x: Tensor, y: Tensor, g: Tensor, begin: Tensor | None, scale: float, *, back: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of xᵀ y that fade by g: what each chunk meets (B,H,N,D,Dv), after the last (B,H,D,Dv), and G (B·H,N,D)."""
        launch, heads = self.blocks.walk, self.B * self.H
        N = max(1, ceil_div(self.T, self.blocks.chunk))  # no tokens are a chunk of none
        keys, values = padded(self.D, launch.keys), padded(self.Dv, launch.values)
        tiles = ceil_div(self.D, keys) * ceil_div(self.Dv, values)
        per = ceil_div(N, max(1, min(FILL // max(1, tiles * heads), N // LEAST)))  # chunks of a segment
        segments = ceil_div(N, per)
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        states = x.new_empty(self.B, self.H, N, self.D, self.Dv, dtype=dtype)
        end = _matrix(x, y)
        sums = torch.empty(heads, N, self.D, dtype=torch.float32, device=x.device)
        added = x.new_empty(heads, segments - 1, self.D, self.Dv, dtype=torch.float32)
        faded = x.new_empty(heads, segments - 1, self.D, dtype=torch.float32)
        walk: Any = triton_kernels.walk  # a launch takes more than its signature says
        for local in (True, False) if segments > 1 else (False,):
            walk[(heads, tiles, segments - local)](
                x, y, g, end if begin is None else begin, self.reset, added, faded, states, sums, end,
                *map(_strides, (x, y, g)), self.T, self.H, N, per, segments, scale,
                BK=keys, BV=values, BACK=back, LOCAL=local, HAS_BEGIN=begin is not None,
                **self.meta, num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
        return states, end, sums

    def forward(self, tokens: list[Tensor], states: Tensor, sums: Tensor, out: Tensor, scale: float) -> None:
        """tokens: q, k, v, g."""
        self._chunks(triton_kernels.forward, self.blocks.forward, [*tokens, out], [states, sums], scale)

    def backward_values(self, tokens: list[Tensor], d_states: Tensor, sums: Tensor, scale: float) -> None:
        """tokens: q, k, g, d_out and, to be written, dv."""
        self._chunks(triton_kernels.backward_values, self.blocks.backward_values, tokens, [d_states, sums], scale)

    def backward_keys(self, tokens: list[Tensor], states: Tensor, d_states: Tensor, sums: Tensor, scale: float) -> None:
        """tokens: q, k, v, g, d_out and, to be written, dq, dk, dg."""
        self._chunks(triton_kernels.backward_keys, self.blocks.backward_keys, tokens, [states, d_states, sums], scale)

    def _chunks(self, kernel: Any, launch: Launch, tokens: list[Tensor], others: list[Tensor], scale: float) -> None:
        """A program for every chunk and `launch.keys` columns of keys, or all of them."""
        keys, N = padded(self.D, launch.keys or 256), ceil_div(self.T, self.blocks.chunk)
        for apart in STEEP:
            kernel[(self.B * self.H * ceil_div(self.D, keys) * N,)](
                *tokens, self.reset, *others, *map(_strides, tokens), self.T, self.H, N, scale,
                BK=keys, BV=padded(self.Dv, launch.values), APART=apart,
                **self.meta, num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)
