"""The plain twin: token by token, the memory's step by substitution, without a matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.kernels.ssm_scan.chunked import states


def recurrence(
    given: Tensor,
    told: Tensor,
    recall: Tensor,
    number: Tensor,
    real: Tensor | None,
    h: Tensor,
    c: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(every h (B,T,H), the last h, the last c), as `kernels.legs_recurrence.recurrence` but behind h (B,H), c (B,N).

    number (B,T): of each token in its document, which starts from zero at 0. real (B,T): false for padding, which is
    passed by.
    """
    H, found = told.shape[1], []
    for t in range(given.shape[1]):
        before = h.masked_fill(number[:, t, None] == 0, 0.0)
        f, inside, gate = given[:, t].split([1, H, H], -1)
        new = remembered(c, f + F.linear(before, told), number[:, t])
        inner, opened = F.linear(new, recall).chunk(2, -1)
        later = torch.lerp(before, torch.tanh(inside + inner), torch.sigmoid(gate + opened))
        keep = None if real is None else real[:, t, None]
        h = later if keep is None else torch.where(keep, later, h)
        c = new if keep is None else torch.where(keep, new, c)
        found.append(h)
    return torch.stack(found, 1), h, c


def remembered(c: Tensor, f: Tensor, number: Tensor) -> Tensor:
    """LegS coefficients (B,N) once f (B,1), sample number `number` (B) from 0, has come: in O(N log N), no matrix.

    The bilinear rule, (I - sA) c' = (I + sA) c + 2s B f with s = 1/(2·number + 2). A is lower triangular, r_n r_k below
    the diagonal of n + 1, so that substituting forward is a linear recurrence along n of the sums Σ_{k<n} r_k c'_k.
    """
    n = torch.arange(c.shape[1], device=c.device, dtype=c.dtype)
    r, s = (2 * n + 1).sqrt(), 1 / (2 * number.to(c.dtype)[:, None] + 2)
    scaled = r * c
    right = c - s * (r * (scaled.cumsum(1) - scaled) + (n + 1) * c) + 2 * s * r * f
    below = 1 + s * (n + 1)
    sums = states((1 - s * n) / below, r * right / below, torch.zeros_like(c[:, 0]))
    sums = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], 1)
    first = F.pad(f, (0, c.shape[1] - 1))  # one sample is its own mean
    return torch.where(number[:, None] == 0, first, (right - s * r * sums) / below)
