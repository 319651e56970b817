"""RoPE on a GPU: a launch for queries and one for keys each way, in fp32 between a read and a write.

Counted for 16,384 tokens of 32 heads of queries and 8 of keys and of values, 64 wide, in bf16 on one H200 (4.2 TB/s for
copies): forward reads and writes 84 MB, 40 µs; backward, with the values' gradient beside, 101 MB, 48 µs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.kernels.chunks import ceil_div

PAIRS, WARPS = 1024, 4  # of one program


def forward(
    x: Tensor, cos: Tensor, sin: Tensor, half: bool, queries: int, keys: int, width: int
) -> tuple[Tensor, Tensor]:
    """q (B,T,H,D) and k (B,T,G,D), contiguous, of x (B,T,Σ) = q|k|..."""
    q, k = x[..., : (queries + keys) * width].split([queries * width, keys * width], -1)
    turned_q, turned_k = (x.new_empty((*x.shape[:2], heads, width)) for heads in (queries, keys))
    _turned(q.unflatten(-1, (-1, width)), turned_q, cos, sin, half, 1.0)
    _turned(k.unflatten(-1, (-1, width)), turned_k, cos, sin, half, 1.0)
    return turned_q, turned_k


def backward(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    """The gradient of q|k|v (B,T,Σ), contiguous: queries and keys are turned back."""
    sizes = [d.shape[2] * d.shape[3] for d in (d_q, d_k, d_v)]
    d_x = d_q.new_empty((*d_q.shape[:2], sum(sizes)))
    to = [part.unflatten(-1, d.shape[2:]) for part, d in zip(d_x.split(sizes, -1), (d_q, d_k, d_v), strict=True)]
    _turned(d_q, to[0], cos, sin, half, -1.0)
    _turned(d_k, to[1], cos, sin, half, -1.0)
    to[2].copy_(d_v)
    return d_x


def _turned(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, half: bool, sign: float) -> None:
    """y (B,T,H,D), whose entries lie side by side, from x of that shape. sign: -1.0 turns back."""
    B, T, H, D = x.shape
    if not x.numel():
        return
    x = x if x.stride(3) == 1 else x.contiguous()
    cos, sin = (t.expand(B, T, 1, -1) for t in (cos, sin))
    cos, sin = (t if t.stride(3) == 1 else t.contiguous() for t in (cos, sin))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    pairs = triton.next_power_of_2(cos.shape[3])
    rows = max(1, PAIRS // pairs)
    rest = D - 2 * cos.shape[3]
    kernel: Any = _turn  # a launch takes more than its signature says
    with torch.cuda.device_of(x):
        kernel[(ceil_div(B * T * H, rows),)](
            x, y, cos, sin, B * T * H, T, H, *x.stride()[:3], *y.stride()[:3], *cos.stride()[:2], sign,
            cos.shape[3], rest, half, rows, pairs, triton.next_power_of_2(rest), num_warps=WARPS,
        )  # fmt: skip


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    x, y, cos, sin, rows, T, H, x_row, x_token, x_head, y_row, y_token, y_head, table_row, table_token, sign,
    HALF_DIM: tl.constexpr, REST: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    MORE: tl.constexpr,
):  # fmt: skip
    """A row is one head of one token: its first 2·HALF_DIM entries are turned, the REST of them are copied."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.arange(0, PAIRS)[None, :]
    there = row < rows
    inside = there & (i < HALF_DIM)
    b, t, head = row // H // T, row // H % T, row % H
    at = b * table_row + t * table_token + i
    c = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32) * sign
    x += b * x_row + t * x_token + head * x_head
    y += b * y_row + t * y_token + head * y_head
    if HALF:
        one, two = i, i + HALF_DIM
    else:
        one, two = 2 * i, 2 * i + 1
    u = tl.load(x + one, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(x + two, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + one, (u * c - v * s).to(y.dtype.element_ty), mask=inside)
    tl.store(y + two, (v * c + u * s).to(y.dtype.element_ty), mask=inside)
    if REST > 0:
        j = 2 * HALF_DIM + tl.arange(0, MORE)[None, :]
        left = there & (j < 2 * HALF_DIM + REST)
        tl.store(y + j, tl.load(x + j, mask=left, other=0.0), mask=left)
