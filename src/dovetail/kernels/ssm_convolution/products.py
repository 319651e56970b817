"""A long convolution as products with Toeplitz matrices: one strip of them a channel, of which every block of rows reads
its part. Beyond the length where the products outweigh what transforms read and write, these are the slower ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dovetail.kernels.chunks import without_autocast

BLOCK = 128  # tokens: the edge of the tiles that matrix products are made of; blocks above the diagonal are left out


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """As `kernels.ssm_convolution.convolve`, exactly causal; once differentiable. T²·B·D multiplications and additions.

    Rows are the batch: y (D,B,T) by block = x (D,B,up to its end) times (D,up to its end,block). Memory beyond x and y:
    O(D·T·BLOCK) for the time of a call.
    """
    return _Products.apply(x, kernel)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor) -> Tensor:
        T, size = x.shape[1], min(BLOCK, x.shape[1])
        rows = _by_channel(x)
        ctx.save_for_backward(rows, kernel)
        last = (T - 1) // size * size  # where the last block begins
        # strip[u, t] = kernel[last + t - u]: less (last - start) rows, that of the block at `start`
        strip = _strip(F.pad(kernel.flip(-1), (last + size - T, size - 1)), size)
        found = []
        with without_autocast(x):
            for start in range(0, T, size):
                stop = min(start + size, T)
                found.append(rows[..., :stop] @ strip[:, last - start : last - start + stop, : stop - start])
        return _by_time(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        with without_autocast(dy):
            return _gradients(dy, *ctx.saved_tensors, *ctx.needs_input_grad)


def _gradients(dy: Tensor, rows: Tensor, kernel: Tensor, of_x: bool, of_kernel: bool) -> Any:
    T, size = rows.shape[2], min(BLOCK, rows.shape[2])
    dy, dx, dk = _by_channel(dy), None, None
    last = (T - 1) // size * size
    starts = range(0, T, size)
    if of_x:
        strip = _strip(F.pad(kernel, (size - 1, 0)), size)  # [u, s] = kernel[u - s], for every block
        dx = _by_time([dy[..., start:] @ strip[:, : T - start, : min(size, T - start)] for start in starts])
    if of_kernel:
        # [t, size - 1 + last - start + s] is the sum over rows of dy[start + t] x[s], of all blocks together; what
        # has one lag is a diagonal of it.
        wide = last + 2 * size - 1
        sums = kernel.new_zeros(len(kernel), size, wide)
        for start in starts:
            stop, left = min(start + size, T), size - 1 + last - start
            part = sums[:, : stop - start, left : left + stop]
            part.baddbmm_(dy[..., start:stop].mT, rows[..., :stop])
        diagonals = sums.as_strided((len(kernel), size, last + size), (size * wide, wide + 1, 1))
        dk = diagonals.sum(1).flip(-1)[:, :T]
    return dx, dk


def _by_channel(x: Tensor) -> Tensor:
    """(B,T,D) as (D,B,T), whose last two axes are matrices as products want them: in memory it is (B,D,T)."""
    return x.transpose(1, 2).contiguous().transpose(0, 1)


def _by_time(blocks: list[Tensor]) -> Tensor:
    """(D,B,·) one behind the other as (B,T,D)."""
    return torch.cat([block.permute(1, 2, 0) for block in blocks], 1)


def _strip(line: Tensor, size: int) -> Tensor:
    """[u, t] = line[u + size - 1 - t], (D,·,size), of line (D,·)."""
    return line.unfold(1, size, 1).flip(-1)


__all__ = ["BLOCK", "convolve"]
