"""The walk through one chunk on a GPU: a program a row, whose hidden vector and samples stay in registers.

Token by token all of it is one number, L x 2H numbers that all rows share (in the L2 cache), and a hidden vector: as
operations of their own they would take several launches for each token.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false
# (Triton's language in Python's clothes: its tiles and constants are not what a type checker takes them for)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 8  # two tiles of 16 x 512 are 64 numbers a thread


def forward(
    e: Tensor, said: Tensor, answers: Tensor, told: Tensor, before: Tensor, f: Tensor, z: Tensor, h: Tensor
) -> None:
    """As `walk.forward`, fp32."""
    (B, L), H = f.shape, told.shape[1]
    with torch.cuda.device_of(f):
        _forward[(B,)](
            e, said, answers, told.contiguous(), before, before.stride(0), f, z, h, H, L, _wide(H), num_warps=WARPS  # type: ignore[arg-type]
        )  # fmt: skip


def backward(
    dh: Tensor, later: Tensor, dy: Tensor, z: Tensor, before: Tensor, answers: Tensor, told: Tensor, df: Tensor,
    dz: Tensor,
) -> Tensor:  # fmt: skip
    """As `walk.backward`, fp32."""
    (B, L), H, out = df.shape, told.shape[1], torch.empty_like(dh)
    with torch.cuda.device_of(df):
        _backward[(B,)](
            dh, later, dy, z, before, answers, told.contiguous(), out, df, dz, H, L, _wide(H), num_warps=WARPS  # type: ignore[arg-type]
        )  # fmt: skip
    return out


def _wide(H: int) -> int:
    return triton.next_power_of_2(H)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    e, said, answers, told, before, apart, f, z, h, H, L: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """What is read is never written: threads that hold the same entries read them at different times."""
    row = tl.program_id(0).to(tl.int64)
    j, n = tl.arange(0, L), tl.arange(0, WIDE)
    inside = n < H
    u = tl.load(told + n, mask=inside, other=0.0)
    state = tl.load(before + row * apart + n, mask=inside, other=0.0)
    samples = tl.zeros((L,), tl.float32)
    for i in range(L):
        at = answers + (j[:, None] * L + i) * 2 * H + n[None, :]
        seen = (j <= i)[:, None] & inside[None, :]
        to_x, to_y = tl.load(at, mask=seen, other=0.0), tl.load(at + H, mask=seen, other=0.0)
        token = row * L + i
        both = token * 2 * H + n
        x, y = tl.load(said + both, mask=inside, other=0.0), tl.load(said + both + H, mask=inside, other=0.0)
        sample = tl.load(e + token) + tl.sum(u * state, 0)
        samples = tl.where(j == i, sample, samples)
        x += tl.sum(samples[:, None] * to_x, 0)
        y += tl.sum(samples[:, None] * to_y, 0)
        a, g = 1 - 2 / (1 + tl.exp(2 * x)), 1 / (1 + tl.exp(-y))
        state += g * (a - state)
        tl.store(z + both, a, mask=inside)
        tl.store(z + both + H, g, mask=inside)
        tl.store(h + token * H + n, state, mask=inside)
    tl.store(f + row * L + j, samples)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    dh, later, dy, z, before, answers, told, out, df, dz, H, L: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    j, n = tl.arange(0, L), tl.arange(0, WIDE)
    inside = n < H
    u = tl.load(told + n, mask=inside, other=0.0)
    state = tl.load(dh + row * H + n, mask=inside, other=0.0)
    samples = tl.load(later + row * L + j)
    for back in range(L):
        i = L - 1 - back
        at = answers + (j[:, None] * L + i) * 2 * H + n[None, :]
        seen = (j <= i)[:, None] & inside[None, :]
        to_x, to_y = tl.load(at, mask=seen, other=0.0), tl.load(at + H, mask=seen, other=0.0)
        token = row * L + i
        both, one = token * 2 * H + n, token * H + n
        a, g = tl.load(z + both, mask=inside, other=0.0), tl.load(z + both + H, mask=inside, other=0.0)
        was = tl.load(before + one, mask=inside, other=0.0)
        state += tl.load(dy + one, mask=inside, other=0.0)
        dx, dgate = state * g * (1 - a * a), state * (a - was) * g * (1 - g)
        tl.store(dz + both, dx, mask=inside)
        tl.store(dz + both + H, dgate, mask=inside)
        samples += tl.sum(dx[None, :] * to_x + dgate[None, :] * to_y, 1)
        state += u * tl.sum(tl.where(j == i, samples, 0.0), 0) - state * g
    tl.store(df + row * L + j, samples)
    tl.store(out + row * H + n, state, mask=inside)
