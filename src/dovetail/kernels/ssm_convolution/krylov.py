"""State spaces of dense matrices: kernels by powers that double, scans by chunks of matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.kernels import twins
from dovetail.kernels.ssm_convolution import reference

CHUNK = 64  # tokens


def krylov(a: Tensor, b: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(a^t b for t = 0..length-1 as columns (D,N,length), a^length), a (D,N,N), b (D,N): log₂ rounds of products."""
    found, power, done = b[..., None], a, 1
    rest, whole = length, None
    while True:
        if rest & 1:
            whole = power if whole is None else whole @ power
        rest >>= 1
        if done < length:
            found = torch.cat([found, power @ found[..., : length - done]], -1)
            done = min(2 * done, length)
        if not rest:
            assert whole is not None
            return found, whole
        power = power @ power


def dense_kernel(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """c a^t b, t = 0..length-1, (D,length), for a (D,N,N), b and c (D,N): t = step·i + j, c a^(step i) times a^j b.

    log₂ rounds: each squares a, and doubles one side.
    """
    if twins.asked():
        return reference.dense_kernel(a, b, c, length)
    right, left = b[..., None], c[:, None]  # (D,N,j), (D,i,N)
    rounds = (length - 1).bit_length()
    for i in range(rounds):
        a = a @ a if i else a  # a^(2^i)
        if i < (rounds + 1) // 2:
            right = torch.cat([right, a @ right], -1)
        else:
            left = torch.cat([left, left @ a], 1)
    return (left @ right).flatten(1)[:, :length]


def dense_scan(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(y (B,T,D), last h (B,D,N)): h_t = a h_{t-1} + b x_t, y_t = c h_t. x (B,T,D), start (B,D,N).

    real (B,T): false for padding, which is passed by, one token after another; plain rows run in chunks.
    """
    if real is not None or x.shape[1] == 1:
        return reference.dense_scan(x, a, b, c, start, real)
    out, h = [], start
    tables: dict[int, tuple[Tensor, ...]] = {}
    for piece in x.split(CHUNK, 1):
        T = piece.shape[1]
        if T not in tables:
            columns, power = krylov(a, b, T)
            read, _ = krylov(a.mT, torch.einsum("dn,dnm->dm", c, a), T)
            tables[T] = columns, power, read, torch.einsum("dn,dnt->dt", c, columns)
        columns, power, read, kernel = tables[T]
        out.append(reference.convolve(piece, kernel) + torch.einsum("bdn,dnt->btd", h, read))
        h = torch.einsum("dmn,bdn->bdm", power, h) + torch.einsum("dnt,btd->bdn", columns.flip(-1), piece)
    return torch.cat(out, 1), h
