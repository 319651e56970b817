"""The gate on a GPU: one pass over the rows each way, all in fp32 between a read and a write.

Counted for 16,384 rows of 2 x 8192 in bf16 on one H200 (4.2 TB/s measured for copies): forward reads 537 MB and writes
268, 0.19 ms; backward reads 805 MB and writes 537, 0.32 ms (measured: 0.31), or 805 with the forward's output, which then
nothing has kept. Two exponentials or quotients an entry hide behind that.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.kernels.chunks import ceil_div

TILE, WARPS = 1024, 4  # entries of one program, of each tensor: a thread reads 16 bytes at once of 16-bit numbers
_UNIT = 8  # of which widths are multiples where it can: then so many entries are read at once
_ROOT = tl.constexpr(0.7071067811865476)  # √½
_DENSITY = tl.constexpr(0.3989422804014327)  # 1/√(2π)
_TANH = tl.constexpr(1.5957691216057308)  # 2√(2/π)
_CUBE = tl.constexpr(0.044715)


def forward(both: Tensor, activation: str) -> Tensor:
    """(..., h) of (..., 2h), contiguous."""
    rows, h = _rows(both), both.shape[-1] // 2
    out = both.new_empty((*both.shape[:-1], h))
    _launch(_forward, h, activation, rows, out)
    return out


def backward(d_out: Tensor, both: Tensor, activation: str) -> Tensor:
    """The gradient of both (..., 2h), contiguous, of d_out (..., h)."""
    return _back(d_out, both, activation, None)


def backward_again(d_out: Tensor, both: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(the gradient of both (..., 2h), act(gate) · up (..., h) once more), contiguous, of d_out (..., h)."""
    out = both.new_empty((*both.shape[:-1], both.shape[-1] // 2))
    return _back(d_out, both, activation, out), out


def _back(d_out: Tensor, both: Tensor, activation: str, out: Tensor | None) -> Tensor:
    rows, h = _rows(both), both.shape[-1] // 2
    d_both = both.new_empty(both.shape)
    _launch(_backward, h, activation, rows, d_out.contiguous(), d_both, out)
    return d_both


def _rows(both: Tensor) -> Tensor:
    """(N,2h), each row's entries side by side; rows may be apart."""
    rows = both.reshape(-1, both.shape[-1]) if both.numel() else both.new_empty(0, both.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _launch(kernel: Any, h: int, activation: str, rows: Tensor, *others: Tensor | None) -> None:
    if not rows.numel():
        return
    columns, stride = min(TILE, 1 << (h - 1).bit_length()), rows.stride(0)
    down = TILE // columns
    unit = 1 if h % _UNIT or stride % _UNIT else _UNIT
    grid = (ceil_div(len(rows), down) * ceil_div(h, columns),)
    with torch.cuda.device_of(rows):
        kernel[grid](
            rows, *others, len(rows), stride // unit, h // unit, unit, activation, down, columns, num_warps=WARPS
        )


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    both, out, rows, stride, h,
    UNIT: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    stride, h = stride * UNIT, h * UNIT
    i, j, inside, gate, up = _tile(both, rows, stride, h, ROWS, COLUMNS)
    act, _ = activated(gate, ACTIVATION)
    tl.store(out + i * h + j, (act * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    both, d_out, d_both, out, rows, stride, h,
    UNIT: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    stride, h = stride * UNIT, h * UNIT
    i, j, inside, gate, up = _tile(both, rows, stride, h, ROWS, COLUMNS)
    d = tl.load(d_out + i * h + j, mask=inside, other=0.0).to(tl.float32)
    act, slope = activated(gate, ACTIVATION)
    to = d_both + i * (2 * h) + j
    tl.store(to, (d * (slope * up)).to(d_both.dtype.element_ty), mask=inside)
    tl.store(to + h, (d * act).to(d_both.dtype.element_ty), mask=inside)
    if out is not None:
        tl.store(out + i * h + j, (act * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _tile(both, rows, stride, h, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's rows (ROWS,1) and columns (1,COLUMNS) of a half, which of them there are, and gate and up in fp32."""
    across = tl.cdiv(h, COLUMNS)
    i = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (i < rows) & (j < h)
    gate = tl.load(both + i * stride + j, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + i * stride + h + j, mask=inside, other=0.0).to(tl.float32)
    return i, j, inside, gate, up


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(x) and act'(x), which no finite x makes infinite or NaN where they are not."""
    if ACTIVATION == "silu":
        share, rest = _shares(x)
        act, slope = x * share, share + x * share * rest
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * _ROOT))
        act, slope = x * share, share + x * (tl.exp(-0.5 * x * x) * _DENSITY)
    elif ACTIVATION == "gelu_tanh":  # ½ (1 + tanh z) = σ(2z)
        near = tl.minimum(tl.maximum(x, -12.0), 12.0)  # beyond, the shares are 0 and 1 in fp32, and x³ may be infinite
        square = near * near
        share, rest = _shares(near * _TANH * (square * _CUBE + 1.0))
        act = x * share
        slope = share + act * rest * ((square * (3.0 * _CUBE) + 1.0) * _TANH)
    elif ACTIVATION == "relu":
        act, slope = tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)  # so that NaN stays
    elif ACTIVATION == "sigmoid":
        share, rest = _shares(x)
        act, slope = share, share * rest
    else:
        tl.static_assert(ACTIVATION == "identity")
        act, slope = x, tl.full(x.shape, 1.0, tl.float32)
    return act, slope


@triton.jit
def _shares(x):  # type: ignore[no-untyped-def]
    """σ(x) and σ(-x), both to fp32's relative accuracy, from one exponential that never overflows."""
    small = tl.exp(-tl.abs(x))
    more = 1.0 / (1.0 + small)
    return tl.where(x < 0.0, small * more, more), tl.where(x < 0.0, more, small * more)
