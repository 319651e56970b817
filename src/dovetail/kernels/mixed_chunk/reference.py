"""The plain twin: mixed chunk attention as two matrices of weights, in fp32 or better. Memory O(T²)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def mixed_chunk(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    *,
    chunk: int,
    causal: bool,
    scale: float,
    order: Tensor,
    segments: Tensor | None = None,
) -> Tensor:
    """(B,T,E). See the package."""
    wide = torch.promote_types(v.dtype, torch.float32)
    quad_q, quad_k, lin_q, lin_k, v = (t.to(wide) for t in (quad_q, quad_k, lin_q, lin_k, v))
    number = torch.zeros_like(order) if segments is None else segments
    same = (number[:, :, None] == number[:, None]) & (number >= 0)[:, None]
    back = order[:, :, None] // chunk - order[:, None] // chunk
    near, across = same & (back == 0), same & (back > 0) if causal else same
    if causal:
        near = near & (order[:, None] <= order[:, :, None])
    inside = F.relu(scale * quad_q @ quad_k.mT).square() / chunk * near
    count = across.sum(-1, keepdim=True).clamp_min(1)
    return (inside + lin_q @ lin_k.mT * across / count) @ v
