"""Weights laid out for products with few vectors, where reading them is nearly all the time there is.

On CPU, y = W x with a row-major W (O,I) is O dot products, and for O > I the matrix library reads it well below
the speed of memory; as a sum of I columns it is up to three times as fast for one or two vectors and no faster
from four on (measured on AVX-512 with fp32). For one vector the columns are shared among the cores too
(kernels/linear), whatever the shape. Only strides change, and they change back afterwards: training must
not see another order of summation because somebody sampled in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

FEW = 2  # vectors up to which columns are faster
WORTH = 16  # steps from which the gain outweighs copying the matrices there and back


@contextmanager
def vector_layout(model: nn.Module, rows: int, steps: int) -> Iterator[None]:
    """Inside, the fp32 CPU matrices of `model` are column-major: all for one vector, those of O > I for two.

    rows: vectors that each product has. steps: how often each is used at most.
    """
    chosen = _matrices(model, wide=rows > 1) if rows <= FEW and steps >= WORTH else []
    try:
        for weight in chosen:
            weight.data = weight.data.t().contiguous().t()
        yield
    finally:
        for weight in chosen:
            weight.data = weight.data.contiguous()


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
