"""What the walk asks of a block of rows, on a GPU: products whose scores are used in registers and never written.

Counted for n = 32,768 pairs, d = 768, on one H200 (737 TFLOP/s measured for bf16 products, 4.2 TB/s for copies): a product
of n·n·d is 1.65 TFLOP, 2.2 ms at that rate. Scores written and read again by passes of their own would be n² numbers: in
fp32 4.3 GB each time, and rounded to bf16 a score of 100 is off by a quarter. So both kernels here are products of their
own that end in the exponentials: two (softmax) or one (sigmoid) an entry in the first, and the same in the second, 0.3 ms
each. Only G goes to memory, rounded to 16 bits, once (2.1 GB) and back twice (4.3 GB), by cuBLAS's two products with b and a.
Predicted: softmax 2 · 3.3 + 0.6 for G + 2 · 2.6 = about 12.5 ms, sigmoid about 9 ms, against 8.9 and 6.7 ms of products alone.
Memory: a block of G (268 MB), the gradients in fp32 (201 MB), 16-bit copies of fp32 inputs (101 MB), about 0.7 GB.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.kernels.contrastive.walk import Known, Normalisers, Sigmoid


class Launch(NamedTuple):
    """A tile of scores, the piece of the width that one step multiplies, and how many warps and stages hold them.
    registers: of a thread, at most; 128 let two programs of 8 warps share a multiprocessor, so that one multiplies while
    the other takes exponentials."""

    rows: int
    columns: int
    width: int
    warps: int
    stages: int
    registers: int | None = None


NORMALISERS = Launch(128, 128, 64, 8, 3)
GRADIENT = Launch(128, 128, 64, 8, 3, 128)
GROUP = 8  # tiles of rows that take turns, so that their columns are still in the cache


def normalisers(a: Tensor, b: Tensor, scale: Tensor, offset: int, rows: int) -> Normalisers:
    """As in plain torch, but of all rows at once: a tile leaves log Σ exp of its own rows and columns."""
    (n, d), m, tile = a.shape, len(b), NORMALISERS
    tiles = triton.cdiv(n, tile.rows), triton.cdiv(m, tile.columns)
    of_rows, of_columns = scale.new_empty(tiles[1], n), scale.new_empty(tiles[0], m)
    labels = scale.new_empty(n)
    kernel: Any = _normalisers  # a launch takes more than its signature says
    with torch.cuda.device_of(a):
        kernel[(tiles[0] * tiles[1],)](
            a, b, scale, of_rows, of_columns, labels, n, m, offset, d, tile.rows, tile.columns, tile.width,
            d % tile.width == 0, GROUP, num_warps=tile.warps, num_stages=tile.stages,
            maxnreg=tile.registers,
        )  # fmt: skip
    return Normalisers(of_rows.logsumexp(0), of_columns.logsumexp(0), labels)


def gradient(
    a: Tensor, b: Tensor, scale: Tensor, known: Known, offset: int, keep: bool
) -> tuple[Tensor | None, Tensor]:
    """As in plain torch, G in the dtype of a."""
    (n, d), m, tile = a.shape, len(b), GRADIENT
    tiles = triton.cdiv(n, tile.rows) * triton.cdiv(m, tile.columns)
    g, sums = a.new_empty(n, m) if keep else None, scale.new_zeros(3, tiles)
    sigmoid = isinstance(known, Sigmoid)
    given = (known.bias, known.bias, 1.0) if isinstance(known, Sigmoid) else known
    kernel: Any = _gradient
    with torch.cuda.device_of(a):
        kernel[(tiles,)](
            a, b, scale, *given, sums if g is None else g, sums, n, m, tiles, offset, d, tile.rows, tile.columns,
            tile.width, d % tile.width == 0, GROUP, sigmoid, keep, num_warps=tile.warps, num_stages=tile.stages,
            maxnreg=tile.registers,
        )  # fmt: skip
    return g, sums.sum(1)


@triton.jit
def _normalisers(  # type: ignore[no-untyped-def]
    a, b, scale, of_rows, of_columns, labels, n, m, offset,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    y, z = _tile(n, m, ROWS, COLUMNS, GROUP)
    i, j = y * ROWS + tl.arange(0, ROWS), z * COLUMNS + tl.arange(0, COLUMNS)
    x = _products(a, b, i, j, n, m, D, ROWS, COLUMNS, WIDTH, EVEN)
    if (y * ROWS + offset < (z + 1) * COLUMNS) & ((y + 1) * ROWS + offset > z * COLUMNS):
        at = i + offset
        label = tl.sum(tl.where(at[:, None] == j[None, :], x, 0.0), 1)
        tl.store(labels + i, label, mask=(i < n) & (at >= z * COLUMNS) & (at < (z + 1) * COLUMNS))
    s = x * tl.load(scale)
    row = _log_sum_exp(tl.where((j < m)[None, :], s, -float("inf")), 1)  # type: ignore[arg-type]
    tl.store(of_rows + z.to(tl.int64) * n + i, row, mask=i < n)
    column = _log_sum_exp(tl.where((i < n)[:, None], s, -float("inf")), 0)  # type: ignore[arg-type]
    tl.store(of_columns + y.to(tl.int64) * m + j, column, mask=j < m)


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    a, b, scale, of_rows, of_columns, weight, g_out, sums, n, m, tiles, offset,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
    SIGMOID: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """of_rows, of_columns: the normalisers; for SIGMOID both the bias. weight: how often a label is counted."""
    y, z = _tile(n, m, ROWS, COLUMNS, GROUP)
    i = y * ROWS + tl.arange(0, ROWS)
    x = _products(a, b, i, z * COLUMNS + tl.arange(0, COLUMNS), n, m, D, ROWS, COLUMNS, WIDTH, EVEN)
    # Half a tile after the other, whole ones take too many registers.
    early, late = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))
    j = z * COLUMNS + tl.arange(0, COLUMNS // 2)
    one = _ask(early, i, j, scale, of_rows, of_columns, weight, g_out, n, m, offset, SIGMOID, KEEP)
    two = _ask(late, i, j + COLUMNS // 2, scale, of_rows, of_columns, weight, g_out, n, m, offset, SIGMOID, KEEP)
    tl.store(sums + tl.program_id(0), one[0] + two[0])  # type: ignore[operator]
    tl.store(sums + tiles + tl.program_id(0), one[1] + two[1])  # type: ignore[operator]
    tl.store(sums + 2 * tiles + tl.program_id(0), one[2] + two[2])


@triton.jit
def _ask(  # type: ignore[no-untyped-def]
    x, i, j, scale, of_rows, of_columns, weight, g_out, n, m, offset, SIGMOID: tl.constexpr, KEEP: tl.constexpr
):
    """Sums (loss, G, G · x) over the pairs of rows i and columns j, whose G is written where it is kept."""
    label = (i + offset)[:, None] == j[None, :]
    inside = (i < n)[:, None] & (j < m)[None, :]
    s = x * tl.load(scale)
    if SIGMOID:
        s += tl.load(of_rows)
        s = tl.where(inside, tl.where(label, -s, s), -float("inf"))  # what is not inside costs and asks nothing
        small = tl.exp(-tl.abs(s))
        loss = tl.sum(tl.maximum(s, 0.0) + _log1p(small))
        g = tl.where(s >= 0, 1.0, small) / (1.0 + small)
        g = tl.where(label, -g, g)
        total = tl.sum(g)
    else:
        loss, total = 0.0, 0.0
        g = tl.exp(s - tl.load(of_rows + i, mask=i < n, other=0.0)[:, None])
        g += tl.exp(s - tl.load(of_columns + j, mask=j < m, other=0.0)[None, :])
        g = tl.where(inside, g - tl.where(label, weight, 0.0), 0.0)
    if KEEP:
        at = g_out + i.to(tl.int64)[:, None] * m + j[None, :]
        tl.store(at, g.to(g_out.dtype.element_ty), mask=inside)
    return loss, total, tl.sum(g * x)


@triton.jit
def _tile(n, m, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's tile: down GROUP tiles of rows, then to the next column of tiles."""
    down, across = tl.cdiv(n, ROWS), tl.cdiv(m, COLUMNS)
    first = tl.program_id(0) // (GROUP * across) * GROUP
    inside = tl.program_id(0) % (GROUP * across)
    size = tl.minimum(down - first, GROUP)
    return first + inside % size, inside // size


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    a, b, i, j, n, m,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """x (ROWS,COLUMNS) = a bᵀ in fp32; rows and columns beyond the last repeat it."""
    k = tl.arange(0, WIDTH)
    u = a + tl.minimum(i, n - 1).to(tl.int64)[:, None] * D + k[None, :]
    v = b + tl.minimum(j, m - 1).to(tl.int64)[None, :] * D + k[:, None]
    x = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, WIDTH):
        if EVEN:
            x = tl.dot(tl.load(u + start), tl.load(v + start), x, input_precision="ieee")
        else:
            left = k < D - start
            rows = tl.load(u + start, mask=left[None, :], other=0.0)
            x = tl.dot(rows, tl.load(v + start, mask=left[:, None], other=0.0), x, input_precision="ieee")
    return x


@triton.jit
def _log_sum_exp(s, AXIS: tl.constexpr):  # type: ignore[no-untyped-def]
    top = tl.max(s, AXIS)
    return top + tl.log(tl.sum(tl.exp(s - tl.expand_dims(top, AXIS)), AXIS))


@triton.jit
def _log1p(e):  # type: ignore[no-untyped-def]
    """log(1 + e) for 0 <= e <= 1, to fp32's relative accuracy, which log(1 + e) itself has not: 2 artanh(e / (2 + e))."""
    y = e / (2.0 + e)
    q = y * y
    p = 1.0 / 13.0
    p = p * q + 1.0 / 11.0
    p = p * q + 1.0 / 9.0
    p = p * q + 1.0 / 7.0
    p = p * q + 1.0 / 5.0
    p = p * q + 1.0 / 3.0
    return 2.0 * y * (p * q + 1.0)
