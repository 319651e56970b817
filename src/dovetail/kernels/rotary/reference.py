"""RoPE in plain torch: the pairs of a head as plane vectors, each turned by its angle (Su et al. 2021, eq. 34)."""

from __future__ import annotations

import torch
from torch import Tensor


def turned(
    x: Tensor, queries: int, keys: int, width: int, value_width: int, cos: Tensor, sin: Tensor, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B,T,Σ) = q|k|v -> q (B,T,H,D), k (B,T,G,D), v (B,T,G,E)."""
    q, k, v = x.split([queries * width, keys * width, keys * value_width], -1)
    q, k = (turn(t.unflatten(-1, (-1, width)), cos, sin, layout) for t in (q, k))
    return q, k, v.unflatten(-1, (keys, value_width))


def turn(x: Tensor, cos: Tensor, sin: Tensor, layout: str = "half") -> Tensor:
    """Rotates the first 2·cos.shape[-1] entries of x (B,T,H,D) pairwise."""
    dim = 2 * cos.shape[-1]
    part, rest = (x, None) if dim == x.shape[-1] else (x[..., :dim], x[..., dim:])
    if layout == "half":
        a, b = part.chunk(2, dim=-1)
        turned = torch.cat(_pairs(a, b, cos, sin), dim=-1)
    else:
        a, b = part[..., 0::2], part[..., 1::2]
        turned = torch.stack(_pairs(a, b, cos, sin), dim=-1).flatten(-2)
    return turned if rest is None else torch.cat((turned, rest), dim=-1)


def _pairs(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(a cos - b sin, b cos + a sin), the second product fused with the sum: two kernels less a call."""
    return torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
