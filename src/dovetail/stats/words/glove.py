"""GloVe (Pennington, Socher and Manning 2014): vectors whose products fit the logarithms of co-occurrences.

Σ over pairs of f(X_ij) (w_i·c_j + a_i + b_j - log X_ij)², f(x) = min(1, (x / x_max)^alpha) (eq. 8, 9), by AdaGrad.
A batch of pairs takes one step: its gradients are summed a row, so that rows are touched once a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.errors import DivergedError, UserError
from dovetail.stats.words.counts import cooccurrences
from dovetail.stats.words.vocabulary import Corpus


@dataclass(frozen=True)
class Glove:
    """Options. window: words on either side, a pair at distance s counting 1 / s. batch: pairs a step."""

    dim: int = 100
    window: int = 10
    epochs: int = 25
    x_max: float = 100.0
    alpha: float = 0.75
    lr: float = 0.05
    batch: int = 4096

    def __post_init__(self) -> None:
        if min(self.dim, self.epochs, self.batch) < 1 or self.lr <= 0 or self.x_max <= 0:
            raise UserError("dim, epochs and batch start at 1; lr and x_max are above 0", where=str(self))


def glove_gradient(w: Tensor, c: Tensor, log_x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (dw, dc) of half the loss of P pairs, one row each.

    w: (P, d + 2), a word's vector, its bias, and a 1 that stays; c: (P, d + 2), a context's vector, a 1 that stays,
    and its bias, so that w·c is the whole prediction. log_x, weight: (P,).
    """
    error = (weight * ((w * c).sum(-1) - log_x))[:, None]
    dw, dc = error * c, error * w
    dw[:, -1] = 0
    dc[:, -2] = 0
    return dw, dc


def glove_vectors(
    corpus: Corpus,
    options: Glove,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """(V, d) float32 on the CPU: w + c (section 4.2). progress(pairs done, in all). Raises DivergedError."""
    counts = cooccurrences(corpus, options.window, "harmonic")
    size, dim = counts.size, options.dim
    rng = torch.Generator().manual_seed(seed)
    start = [torch.rand(size, dim + 2, generator=rng).sub_(0.5).div_(dim) for _ in range(2)]
    start[0][:, -1] = 1
    start[1][:, -2] = 1
    tables = [table.to(device) for table in start]
    squares = [torch.ones_like(table) for table in tables]  # AdaGrad's sums, from 1 as the authors' code has it
    row, column = counts.row.to(device), counts.column.to(device)
    log_x = counts.value.log().float().to(device)
    weight = (counts.value / options.x_max).pow(options.alpha).clamp(max=1).float().to(device)
    for epoch in range(options.epochs):
        for pairs in torch.randperm(len(row), generator=rng).to(device).split(options.batch):
            ids = row[pairs], column[pairs]
            w, c = (table.index_select(0, i) for table, i in zip(tables, ids, strict=True))
            gradients = glove_gradient(w, c, log_x[pairs], weight[pairs])
            for table, square, i, gradient in zip(tables, squares, ids, gradients, strict=True):
                rows, where = i.unique(return_inverse=True)
                summed = gradient.new_zeros(len(rows), dim + 2).index_add_(0, where, gradient)
                total = square.index_select(0, rows).add_(summed.square())
                square.index_copy_(0, rows, total)
                table.index_add_(0, rows, summed.div_(total.sqrt_()), alpha=-options.lr)
        if progress is not None:
            progress((epoch + 1) * len(row), options.epochs * len(row))
    vectors = (tables[0] + tables[1])[:, :dim].cpu()
    if not torch.isfinite(vectors).all():
        raise DivergedError("the word vectors are not finite", remedy="a smaller lr")
    return vectors
