"""Contrastive losses over blocks of rows: no n × m matrix is ever whole, and nothing is computed in the backward.

With x = a bᵀ, s = scale · x (+ bias), and G the gradient of the sum of all rows' losses with respect to s, the chain rule is
    da = scale · G b,   db = scale · Gᵀ a,   dscale = Σ G · x,   dbias = Σ G.
Softmax (CLIP): G = softmax of the rows + softmax of the columns - 2 at the labels. A column is whole only when every row
has been seen, so a first walk finds the normalisers, log Σ exp(s) of every row and column, and a second makes each block of s
once more. One direction ("rows"): the same without the columns. Sigmoid (SigLIP): G = σ(s), at the labels -σ(-s): one walk.

That is 2·n·m·d operations four times (twice s, da, db), three times for sigmoid, and memory O(n·d) beside one block of G.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Normalisers(NamedTuple):
    """log Σ exp(s) of every row (n,) and column (m,), and x = a·b at the rows' labels (n,)."""

    rows: Tensor
    columns: Tensor
    labels: Tensor


class Softmax(NamedTuple):
    """Normalisers of a block's rows (r,) and of the columns (m,), inf for none; labels: how often each is counted."""

    rows: Tensor
    columns: Tensor
    labels: float


class Sigmoid(NamedTuple):
    """bias (): what is added to every score."""

    bias: Tensor


Known = Softmax | Sigmoid


class Pieces(Protocol):
    """What is done with a block, in plain torch or in Triton: see `plain`."""

    def normalisers(self, a: Tensor, b: Tensor, scale: Tensor, offset: int, rows: int) -> Normalisers: ...

    def gradient(
        self, a: Tensor, b: Tensor, scale: Tensor, known: Known, offset: int, keep: bool
    ) -> tuple[Tensor | None, Tensor]: ...


class Found(NamedTuple):
    """The loss () and its gradients, in fp32 or better; those of a and b None where nobody wants them."""

    loss: Tensor
    a: Tensor | None
    b: Tensor | None
    scale: Tensor
    bias: Tensor


def walk(
    pieces: Pieces,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    form: str,
    offset: int,
    rows: int,
    wanted: tuple[bool, bool, bool],
) -> Found:
    """a (n,d), b (m,d) in the dtype of their products; scale and bias () in fp32 or better; label of row i: i + offset.

    rows: of a block. wanted: whether anybody wants the gradients of a, of b, and any at all.
    """
    n, (with_a, with_b, with_any) = len(a), wanted
    sides = 2 if form == "softmax" else 1
    loss, norms = scale.new_zeros(()), None
    if form != "sigmoid":
        norms = pieces.normalisers(a, b, scale, offset, rows)
        loss = (norms.rows - scale * norms.labels).sum()
        if form == "softmax":
            loss = loss + (norms.columns - scale * norms.labels).sum()
        else:
            norms.columns.fill_(torch.inf)  # exp(s - inf) = 0: no column asks for anything
    da = scale.new_empty(a.shape) if with_a else None
    db = scale.new_zeros(b.shape) if with_b else None
    sums = scale.new_zeros(3)

    def block(start: int) -> Tensor:
        span = slice(start, start + rows)
        known = Sigmoid(bias) if norms is None else Softmax(norms.rows[span], norms.columns, float(sides))
        g, part = pieces.gradient(a[span], b, scale, known, offset + start, with_a or with_b)
        if g is not None and da is not None:
            da[span] = g @ b
        if g is not None and db is not None:
            db.add_(g.T @ a[span])
        return part

    if with_any or form == "sigmoid":
        for start in range(0, n, rows):
            sums += block(start)
    loss = loss + sums[0]
    share = 1 / (sides * n)
    for d in (da, db):
        if d is not None:
            d.mul_(scale * share)
    return Found(loss * share, da, db, sums[2] * share, sums[1] * share)
