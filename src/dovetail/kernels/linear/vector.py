"""W x of one vector on a GPU, bound by the reading of W: the maps of a decoded token, and its logits.

A program holds a few rows of W in flight, a piece of them at a time, and every thread sums its own columns until the end,
so that nothing waits between loads. For 128,256 rows of 2048 and 4096 in bf16 on one H200 122 and 242 µs, 4.3 TB/s, where
cuBLAS takes 130 and 256, and the best reduction that torch's compiler finds by search 119 and 234.

What stands beside the product costs nothing there, and a launch each by itself: the norm before (its factor is one number,
which every program finds from the x that it reads anyway), a gate over its halves, the sum with the residual stream.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.kernels.chunks import ceil_div
from dovetail.kernels.gate.triton import activated
from dovetail.kernels.linear import TALL
from dovetail.kernels.operation import operation
from dovetail.kernels.overlap import launched, pass_on


class Launch(NamedTuple):
    """Rows of W and columns that a program reads at a step, and its warps."""

    rows: int
    columns: int
    warps: int


SHORT, LONG = 2048, 4096  # columns of W


def launch(rows: int, width: int, gated: bool, plain: bool) -> Launch:
    """Found by `bench/vector_product.py --sweep` on an H200 for the maps of Llama's 1B and 8B. gated: W is two halves. plain:
    in two bytes, and neither norm nor gate, whose columns would not find room in the registers of one warp."""
    if rows >= TALL:
        return Launch(2, 2048, 4)
    if gated and width <= SHORT:
        return Launch(8, 512, 2)
    return Launch(2, 2048, 1) if width > LONG and plain else Launch(4, 1024, 4)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """W x (O,) of x (I,) and W (O,I), whose rows are, in their type; summed in fp32."""
    return step(x, weight, None, 0.0, None, None, False)  # type: ignore[no-any-return]


@operation("vector_product")
def step(
    x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, activation: str | None, residual: Tensor | None,
    early: bool,
) -> Tensor:  # fmt: skip
    """act(g) · u + residual, of g|u = W (x / √(mean x² + eps) · scale), rounded once. No norm without `scale` (I,), no gate
    without `activation` (of kernels.gate, and W (2·O,I)), nothing added without `residual` (O,).

    early: on Hopper and later W is read while the kernel before may still run, which must not be writing it.
    """
    gated, width = activation is not None, weight.shape[1]
    rows = weight.shape[0] // (1 + gated)
    x, (scale, residual) = x.contiguous(), (None if t is None else t.contiguous() for t in (scale, residual))
    y = torch.empty(rows, dtype=x.dtype, device=x.device)
    tile = launch(weight.shape[0], width, gated, scale is None and not gated and x.element_size() == 2)
    columns = min(tile.columns, triton.next_power_of_2(width))
    each = max(1, tile.rows // (1 + gated))
    kernel: Any = _step  # a launch takes more than its signature says
    with torch.cuda.device_of(x):
        kernel[(ceil_div(rows, each),)](
            x, weight, y, scale, residual, eps, rows, weight.stride(0), width, each, columns, activation or "",
            num_warps=tile.warps, **launched(early),
        )  # fmt: skip
    return y


@step.register_fake
def _(
    x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, activation: str | None, residual: Tensor | None,
    early: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(weight.shape[0] // (1 if activation is None else 2))


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    x, weight, y, scale, residual, eps, rows, stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = weight + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * stride
    beside = at
    w = _piece(at, 0, WIDTH, COLUMNS)
    if GATE != "":
        beside = at + tl.cast(rows, tl.int64) * stride  # the other half
        u = _piece(beside, 0, WIDTH, COLUMNS)
    if EARLY:
        pass_on()
    v = _piece(x, 0, WIDTH, COLUMNS).to(tl.float32)
    squares = v * v
    if scale is not None:
        v *= _piece(scale, 0, WIDTH, COLUMNS).to(tl.float32)
    total = w.to(tl.float32) * v
    other = total
    if GATE != "":
        other = u.to(tl.float32) * v  # type: ignore[possibly-undefined]
    for start in tl.static_range(COLUMNS, WIDTH, COLUMNS):  # type: ignore
        w = _piece(at, start, WIDTH, COLUMNS)
        v = _piece(x, start, WIDTH, COLUMNS).to(tl.float32)
        squares += v * v
        if scale is not None:
            v *= _piece(scale, start, WIDTH, COLUMNS).to(tl.float32)
        total += w.to(tl.float32) * v
        if GATE != "":
            other += _piece(beside, start, WIDTH, COLUMNS).to(tl.float32) * v
    out = tl.sum(total, 1)
    if scale is not None:
        factor = 1.0 / tl.sqrt(tl.sum(squares, 1) / WIDTH + eps)
        out *= factor
    if GATE != "":
        act, _ = activated(out, GATE)
        up = tl.sum(other, 1)
        if scale is not None:
            up *= factor  # type: ignore[possibly-undefined]
        out = act * up
    if residual is not None:
        out += tl.load(residual + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(y + row, out.to(y.dtype.element_ty), mask=row < rows)


@triton.jit
def _piece(at, start, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns from `start` on of rows `at` (ROWS,1), or of one pointer."""
    column = start + tl.arange(0, COLUMNS)[None, :]
    if WIDTH % COLUMNS == 0:
        return tl.load(at + column)
    return tl.load(at + column, mask=column < WIDTH, other=0.0)
