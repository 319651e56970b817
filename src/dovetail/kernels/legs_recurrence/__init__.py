"""The HiPPO-LegS recurrence over whole rows, in chunks: large products between them, and inside a walk of what is small.

The twin starts about a hundred operations a token (its substitution doubles along the coefficients) and twice that
backward. But the memory is linear in the samples f: inside a chunk it is known, save for the chunk's own samples, from
the memory before it, by one product with matrices made once; what it tells the hidden vector is then one product too.
Left to walk token by token are one number and one hidden vector a row, and the samples of the chunk so far.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dovetail.kernels import twins
from dovetail.kernels.installed import TRITON
from dovetail.kernels.legs_recurrence import reference, walk
from dovetail.kernels.plan import Plan

CHUNK = 16  # tokens: products of all rows' chunks fill a GPU, and what is read for the walk grows with it
ENTRIES = 2**28  # of all matrices together: 1 GB in fp32


def recurrence(given: Tensor, told: Tensor, recall: Tensor) -> Tensor:
    """Every h (B,T,H), from zero: h = (1 - g)·h + g·tanh(x + R c), g = σ(y + Q c), c the LegS memory of f = e + u·h.

    given (B,T,1 + 2H): e, x and y of each token. told (1,H): u. recall (2H,N): R over Q. All of one dtype, fp32 or
    wider; once differentiable.
    """
    chunks = -(-given.shape[1] // CHUNK)
    return _Recurrence.apply(given, told, recall, matrices(chunks, recall.shape[1], given.dtype, given.device))


def plan(length: int, order: int, *, plain: bool, device: str = "cpu") -> Plan:
    """The path of rows of `length` tokens with a memory of `order`. plain: from zero, neither padded nor packed."""
    if twins.asked():
        return Plan("step by step", twins.WHY)
    if not plain:
        return Plan("step by step", "a state, padding or documents: every row counts its own tokens")
    if length * order * (order + CHUNK) > ENTRIES:
        return Plan("step by step", f"matrices of {length} tokens are more than {ENTRIES:,} entries")
    inside = "one Triton kernel a chunk" if device == "cuda" and TRITON else "a few small operations a token"
    return Plan("chunks", f"the memory of {CHUNK} tokens by one product; {inside}")


@lru_cache(maxsize=2)
def matrices(chunks: int, order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(K,N + L,L,N): (c before chunk k, its L samples) times the k-th is the memory after each of its tokens.

    Samples that a token has not seen yet have zeros. Made in fp64 by the twin's own step.
    """
    with torch.inference_mode(False), torch.no_grad():  # a step of training may find what scoring has made
        out = torch.empty(chunks, order + CHUNK, CHUNK, order, dtype=dtype, device=device)
        eye = torch.eye(order + CHUNK, dtype=torch.float64, device=device)
        for k in range(chunks):
            c = eye[:, :order]
            for i in range(CHUNK):
                number = torch.full((len(eye),), k * CHUNK + i, device=device)
                c = reference.remembered(c, eye[:, order + i, None], number)
                out[k, :, i] = c
    return out


def _walk(x: Tensor) -> Any:
    """The module that walks inside a chunk."""
    if x.is_cuda and x.dtype == torch.float32 and TRITON:
        from dovetail.kernels.legs_recurrence import triton

        return triton
    return walk


def _cut(x: Tensor, chunks: int) -> Tensor:
    """(B,T,C) -> (K,B,L,C), memory of its own, zeros behind the last token."""
    missing = chunks * CHUNK - x.shape[1]
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    return x.unflatten(1, (chunks, CHUNK)).transpose(0, 1).clone(memory_format=torch.contiguous_format)


class _Recurrence(torch.autograd.Function):
    """Buffers are (K,B,L,...): a chunk is one piece of memory, as (B,L·N) and as (B·L,N)."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, told: Tensor, recall: Tensor, table: Tensor) -> Tensor:
        (B, T, _), H, (K, _, L, N) = given.shape, told.shape[1], table.shape
        e, z = (_cut(part, K) for part in given.split([1, 2 * H], -1))  # z: (x, y), and from the walk on (tanh, g)
        own = table[:, N:]  # of a chunk's own samples
        answers = (own.flatten(0, 2) @ recall.T).view(K, L, L, 2 * H)  # what sample j adds to z of token i, [j, i]
        memory, h, f = (given.new_empty(K, B, L, *n) for n in ((N,), (H,), ()))
        c, last, inside = given.new_zeros(B, N), given.new_zeros(B, H), _walk(given)
        for k in range(K):
            kept = memory[k].flatten(1)
            torch.mm(c, table[k, :N].flatten(1), out=kept)
            said = torch.addmm(z[k].flatten(0, 1), memory[k].flatten(0, 1), recall.T).view_as(z[k])
            inside.forward(e[k, ..., 0], said, answers[k], told, last, f[k], z[k], h[k])
            kept.addmm_(f[k], own[k].flatten(1))
            c, last = memory[k, :, -1], h[k, :, -1]
        ctx.save_for_backward(memory, h, z, answers, told, recall, table)
        ctx.length = T
        return h.transpose(0, 1).flatten(1, 2)[:, :T]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        memory, h, z, answers, told, recall, table = ctx.saved_tensors
        (K, B, L, N), H = memory.shape, told.shape[1]
        before = torch.cat([torch.zeros_like(h[:, :, :1]), h[:, :, :-1]], 2)  # h before each token
        before[1:, :, 0] = h[:-1, :, -1]
        dy, df, dz, inside = _cut(dy, K), memory.new_empty(K, B, L), torch.empty_like(z), _walk(z)
        dh, dc, d_memory = torch.zeros_like(h[0, :, 0]), torch.zeros_like(memory[0, :, 0]), torch.empty_like(memory[0])
        for k in range(K - 1, -1, -1):
            later = dc @ table[k, N:, -1].T
            dh = inside.backward(dh, later, dy[k], z[k], before[k], answers[k], told, df[k], dz[k])
            torch.mm(dz[k].flatten(0, 1), recall, out=d_memory.flatten(0, 1))
            d_memory[:, -1] += dc
            dc = d_memory.flatten(1) @ table[k, :N].flatten(1).T
        d_given = memory.new_empty(B, K, L, 1 + 2 * H)
        d_given[..., 0], d_given[..., 1:] = df.transpose(0, 1), dz.transpose(0, 1)
        d_told = (df.flatten() @ before.flatten(0, 2))[None]
        d_recall = dz.flatten(0, 2).T @ memory.flatten(0, 2)
        return d_given.flatten(1, 2)[:, : ctx.length], d_told, d_recall, None


__all__ = ["matrices", "plan", "recurrence", "reference"]
