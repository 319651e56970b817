"""Weights laid out for products with few vectors, where reading them is nearly all the time there is.

On CPU, y = W x with a row-major W (O,I) is O dot products, and for O > I the matrix library reads it well below
the speed of memory; as a sum of I columns it is up to three times as fast for one or two vectors and no faster
from four on (measured on AVX-512 with fp32). For one vector the columns are shared among the cores too
(kernels/linear), whatever the shape. Only strides change, and they change back afterwards: training must
not see another order of summation because somebody sampled in between.

The columns stay for the next call, as long as their weight lives, where they are `KEPT` bytes at most. Whether they still
say what the rows say is asked of the bits themselves, since a version counter does not see what is written through
`.data` or a numpy view; reading the weights for it, before and after, takes a third of turning them there and back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

FEW = 2  # vectors up to which columns are faster
WORTH = 16  # steps from which the gain outweighs copying the matrices there and back
KEPT = 2**30  # bytes: a model with more is turned at every call, since twice its memory may not be there


@dataclass
class _Columns:
    """A weight (O,I) turned: data (I,O), and the prints of both as they were when they said the same."""

    data: Tensor
    rows_print: Tensor
    print: Tensor


_kept = WeakTensorKeyDictionary()  # _Columns by weight; a copy of the model begins without


@contextmanager
def vector_layout(model: nn.Module, rows: int, steps: int) -> Iterator[None]:
    """Inside, the fp32 CPU matrices of `model` are column-major: all for one vector, those of O > I for two.

    rows: vectors that each product has. steps: how often each is used at most. Up to `KEPT` bytes, the columns are kept
    as long as the weights live. A weight that is changed meanwhile keeps its change.
    """
    chosen = _matrices(model, wide=rows > 1) if rows <= FEW and steps >= WORTH else []
    keep = sum(weight.nbytes for weight in chosen) <= KEPT
    turned: list[tuple[nn.Parameter, Tensor, _Columns | None]] = []
    try:
        for weight in chosen:
            data, columns = weight.data, _columns(weight) if keep else None
            weight.data = data.t().contiguous().t() if columns is None else columns.data.t()
            turned.append((weight, data, columns))
        yield
    finally:
        for weight, data, columns in turned:
            weight.data = weight.data.contiguous() if columns is None else _rows(weight, data, columns)


@torch.inference_mode(False)
def _columns(weight: nn.Parameter) -> _Columns:
    """A row-major weight turned: what is kept of it where that says the same."""
    rows, kept = weight.data, _kept.get(weight)
    now = _print(rows)
    if kept is None or kept.data.shape != rows.t().shape:
        data = rows.t().clone(memory_format=torch.contiguous_format)  # its own memory, of a vector too
        kept = _kept[weight] = _Columns(data, now, _print(data))
    elif not torch.equal(now, kept.rows_print):
        kept.data.copy_(rows.t())
        kept.rows_print, kept.print = now, _print(kept.data)
    return kept


@torch.inference_mode(False)
def _rows(weight: nn.Parameter, before: Tensor, columns: _Columns) -> Tensor:
    """A column-major weight row-major again: in the memory `before` unless its columns have been replaced meanwhile."""
    if weight.data_ptr() != columns.data.data_ptr():
        return weight.data.contiguous()
    if not torch.equal(_print(columns.data), columns.print):
        before.copy_(weight.data)
        _kept.pop(weight, None)
    return before


def _print(x: Tensor) -> Tensor:
    """A contiguous fp32 matrix -> int64 numbers, others for other bits but for once in 2^40: rows of its bits, by the pair
    where there are pairs, times random odd numbers, modulo 2^64, which does not depend on the order of summation."""
    rows, width = x.shape
    if x.numel() % 2 == x.storage_offset() % 2 == 0:
        bits = x.flatten().view(torch.int64).view((rows, width // 2) if width % 2 == 0 else (rows // 2, width))
    else:
        bits = x.view(torch.int32).long()
    return torch.mv(bits, _odd(bits.shape[1]))


@cache
def _odd(count: int) -> Tensor:
    """`count` random odd numbers."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(0)) | 1


def _matrices(model: nn.Module, wide: bool) -> list[nn.Parameter]:
    """The weights of linear maps, and of a table that is the head too. wide: those with more rows than columns."""
    head: Any = getattr(model, "head_part", None)
    owners = [m for m in model.modules() if isinstance(m, nn.Linear)] + [getattr(head, "table", None)]
    weights = {id(w): w for m in owners if isinstance(w := getattr(m, "weight", None), nn.Parameter)}
    return [
        w
        for w in weights.values()
        if w.device.type == "cpu" and w.dtype == torch.float32 and w.is_contiguous()
        if w.shape[0] > w.shape[1] or not wide
    ]
