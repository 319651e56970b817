"""The HiPPO-LegS recurrence over whole rows: few, large operations a token, and a backward that adds up weights once.

At 784 tokens what counts on a GPU is how many operations a token starts. The twin starts about a hundred forward (its
substitution doubles along the coefficients) and twice that backward; here it is six and five. The memory's step is a
product with its matrix, made once for each number of a token, and what the weights' gradients need is kept for one
product over all tokens.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dovetail.kernels.attention import Plan
from dovetail.kernels.legs_recurrence import reference

ENTRIES = 2**28  # of all matrices together: 1 GB in fp32


def recurrence(given: Tensor, told: Tensor, recall: Tensor) -> Tensor:
    """Every h (B,T,H), from zero: h = (1 - g)·h + g·tanh(x + R c), g = σ(y + Q c), c the LegS memory of f = e + u·h.

    given (B,T,1 + 2H): e, x and y of each token. told (1,H): u. recall (2H,N): R over Q. All of one dtype, fp32 or
    wider; once differentiable.
    """
    return _Recurrence.apply(given, told, recall, matrices(given.shape[1], recall.shape[1], given.dtype, given.device))


def plan(length: int, order: int, *, plain: bool) -> Plan:
    """The path of rows of `length` tokens with a memory of `order`. plain: from zero, neither padded nor packed."""
    if not plain:
        return Plan("step by step", "a state, padding or documents: every row counts its own tokens")
    if length * order * (order + 1) > ENTRIES:
        return Plan("step by step", f"matrices of {length} tokens are more than {ENTRIES:,} entries")
    return Plan("matrices", "one product a token for the memory, weights' gradients by one product over all")


@lru_cache(maxsize=2)
def matrices(length: int, order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(T,N+1,N): (c, f) times the t-th is the memory after token t. Made in fp64 by the twin's own step."""
    out = torch.empty(length, order + 1, order, dtype=dtype, device=device)
    wide = {"dtype": torch.float64, "device": device}
    each = torch.eye(order + 1, **wide)
    with torch.no_grad():
        for t in range(length):
            number = torch.full((order + 1,), t, device=device)
            out[t] = reference.remembered(each[:, :order].clone(), each[:, order:], number)
    return out


class _Recurrence(torch.autograd.Function):
    """Buffers are (T,B,...), so that a token's part is one piece of memory."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, told: Tensor, recall: Tensor, matrix: Tensor) -> Tensor:
        B, T, _ = given.shape
        H, N = told.shape[1], recall.shape[1]
        e, z = (
            part.transpose(0, 1).clone(memory_format=torch.contiguous_format) for part in given.split([1, 2 * H], -1)
        )
        memory = given.new_zeros(T + 1, B, N + 1)  # of token t: c before it, and its f
        h = given.new_zeros(T + 1, B, H)  # before token t
        c, f = memory[..., :N].unbind(), memory[..., N:].unbind()
        hs, cs, u, r = h.unbind(), memory.unbind(), told.T, recall.T
        for t, (row, step) in enumerate(zip(z.unbind(), matrix.unbind(), strict=True)):
            torch.addmm(e[t], hs[t], u, out=f[t])
            torch.mm(cs[t], step, out=c[t + 1])
            row.addmm_(c[t + 1], r)
            a, g = row.split(H, -1)
            torch.lerp(hs[t], a.tanh_(), g.sigmoid_(), out=hs[t + 1])
        ctx.save_for_backward(memory, h, z, told, recall, matrix)
        return h[1:].transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        memory, h, z, told, recall, matrix = ctx.saved_tensors
        T, B, H = z.shape[0], z.shape[1], told.shape[1]
        N = recall.shape[1]
        a, g = z.split(H, -1)
        dz = torch.cat([g * (1 - a * a), (a - h[:-1]) * g * (1 - g)], -1)  # of dh, and from then on of z itself
        kept = (1 - g).unbind()
        d_memory = torch.empty_like(memory[:-1])
        dys, rows, backs, ds = dy.transpose(0, 1).unbind(), dz.unbind(), matrix.mT.unbind(), d_memory.unbind()
        dh, dc = dys[T - 1], torch.zeros_like(memory[0, :, :N])
        for t in range(T - 1, -1, -1):
            rows[t].view(B, 2, H).mul_(dh[:, None])
            torch.mm(torch.addmm(dc, rows[t], recall), backs[t], out=ds[t])
            if t:
                dc, df = ds[t].split([N, 1], -1)
                dh = torch.addcmul(dys[t - 1], dh, kept[t]).addmm_(df, told)
        df, flat = d_memory[..., N:], dz.flatten(0, 1)
        d_given = torch.cat([df, dz], -1).transpose(0, 1)
        d_told = df.flatten(0, 1).T @ h[:-1].flatten(0, 1)
        d_recall = flat.T @ memory[1:, :, :N].flatten(0, 1)
        return d_given, d_told, d_recall, None


__all__ = ["matrices", "plan", "recurrence", "reference"]
