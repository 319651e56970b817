"""The plain twin: Laplace attention as the formula says, in fp32 or better."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dovetail.kernels.attention import BoundMask, Score
from dovetail.kernels.attention.reference import scores


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BoundMask | None, score: Score | None, scale: float) -> Tensor:
    """(B,H,T,Dv) in q's dtype. Memory O(T·S)."""
    s = scores(q, k, mask, score, scale)  # a hidden key's score is -inf, and its weight 0
    p = 0.5 * (1 + torch.erf((s - math.sqrt(0.5)) / math.sqrt(0.5 / math.pi)))
    return torch.matmul(p, v.to(p.dtype).repeat_interleave(q.shape[1] // v.shape[1], dim=1)).to(q.dtype)
