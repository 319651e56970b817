"""What the walk asks of a block of rows, in plain torch: a (r,d) against all of b (m,d), labels on a diagonal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.kernels.contrastive.walk import Known, Normalisers, Sigmoid


def normalisers(a: Tensor, b: Tensor, scale: Tensor, offset: int, rows: int) -> Normalisers:
    """Over blocks of `rows` rows, for the labels of the softmax forms, which stand in every row."""
    of_rows, labels, of_columns = [], [], a.new_full((len(b),), -torch.inf)
    for start in range(0, len(a), rows):
        x = a[start : start + rows] @ b.T
        labels.append(x.diagonal(start + offset).clone())
        x *= scale
        of_rows.append(x.logsumexp(1))
        of_columns = torch.logaddexp(of_columns, x.logsumexp(0))
    return Normalisers(torch.cat(of_rows), of_columns, torch.cat(labels))


def gradient(
    a: Tensor, b: Tensor, scale: Tensor, known: Known, offset: int, keep: bool
) -> tuple[Tensor | None, Tensor]:
    """(G (r,m), or None unless `keep`; (3,) sums over the block of the pairs' losses, of G and of G · (a bᵀ))."""
    x = a @ b.T
    s = x * scale
    if isinstance(known, Sigmoid):
        s += known.bias
        s.diagonal(offset).neg_()
        loss = -F.logsigmoid(-s).sum()
        g = s.sigmoid_()
        g.diagonal(offset).neg_()
    else:
        loss = s.new_zeros(())
        g = (s - known.columns).exp_()
        g += s.sub_(known.rows[:, None]).exp_()
        g.diagonal(offset).sub_(known.labels)
    sums = torch.stack([loss, g.sum(), x.mul_(g).sum()])  # pairwise sums, where a dot product would add one by one
    return g if keep else None, sums
