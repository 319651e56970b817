"""The walk through one chunk in plain torch. f (B,L) samples, z (B,L,2H): (x, y) or (tanh, g), h (B,L,H), told (1,H): u.

answers (L,L,2H): [j, i] is what sample j of the chunk adds to (x, y) of its token i.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    e: Tensor, said: Tensor, answers: Tensor, told: Tensor, before: Tensor, f: Tensor, z: Tensor, h: Tensor
) -> None:
    """Fills f, z and h from h before the chunk (B,H) and what (x, y) are without the chunk's own samples.

    said: may be overwritten.
    """
    f.copy_(e)
    for i in range(f.shape[1]):
        f[:, i : i + 1].addmm_(before, told.T)
        x, y = said[:, i].addmm_(f[:, : i + 1], answers[: i + 1, i]).chunk(2, -1)
        a, g = z[:, i].chunk(2, -1)
        torch.lerp(before, torch.tanh(x, out=a), torch.sigmoid(y, out=g), out=h[:, i])
        before = h[:, i]


def backward(
    dh: Tensor, later: Tensor, dy: Tensor, z: Tensor, before: Tensor, answers: Tensor, told: Tensor, df: Tensor,
    dz: Tensor,
) -> Tensor:  # fmt: skip
    """dh (B,H) before the chunk from that after it; fills df and dz (of x and y).

    later (B,L): what the memory after the chunk wants of its samples. dy (B,L,H): of h from outside. before (B,L,H): h
    before each token.
    """
    (a, g), dh = z.chunk(2, -1), dh.clone()
    torch.cat([g * (1 - a * a), (a - before) * g * (1 - g)], -1, out=dz)  # of dh, and then of (x, y) themselves
    df.copy_(later)
    for i in range(df.shape[1] - 1, -1, -1):
        dh += dy[:, i]
        dz[:, i].unflatten(1, (2, -1)).mul_(dh[:, None])
        df[:, : i + 1].addmm_(dz[:, i], answers[: i + 1, i].T)
        dh.addcmul_(dh, g[:, i], value=-1).addmm_(df[:, i : i + 1], told)
    return dh
