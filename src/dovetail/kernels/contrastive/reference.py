"""The plain twin: contrastive losses of all pairs at once, as the formulas say."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive(a: Tensor, b: Tensor, scale: Tensor, form: str, bias: Tensor | None, offset: int) -> Tensor:
    """The loss (), differentiable, all in one dtype. Memory O(n·m)."""
    s = scale * (a @ b.T)
    if form == "sigmoid":
        z = s if bias is None else s + bias
        labels = torch.zeros_like(z)
        labels.diagonal(offset).fill_(1.0)
        return -F.logsigmoid((2 * labels - 1) * z).sum() / len(a)
    rows = -s.log_softmax(1).diagonal(offset).mean()
    if form == "rows":
        return rows
    return (rows - s.log_softmax(0).diagonal().mean()) / 2
