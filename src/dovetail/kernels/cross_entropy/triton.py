"""The softmax loss on a GPU: one program a row, which reads it for its sums and again for its gradient, written over it.

Counted for 2048 rows of 128,256 logits in bf16 on one H200: 0.53 GB, read from memory once and written once, are 260 µs
at 4 TB/s, and 390 µs if the second reading came from memory too. The second goes backwards, so that it begins with what
was read last: of two programs a multiprocessor, 264 rows of 257 kB are in flight, more than the 50 MB of the cache, and
going forwards would find what has just been pushed out. The exponentials (one an entry in each reading) are 140 µs of
their own unit, beside that. Each thread keeps a maximum and a sum of its own, so that nothing waits inside a reading.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.kernels.chunks import ceil_div
from dovetail.kernels.cross_entropy.reference import IGNORED


class Launch(NamedTuple):
    """Warps of a program at most, bytes that one of their threads reads at a step, and its registers at most: with 32,768
    in all, two programs share a multiprocessor, so that one reads while the other adds up."""

    warps: int
    read: int
    registers: int


EVEN, RAGGED = Launch(16, 64, 64), Launch(8, 32, 128)  # rows whose entries go 16 bytes at a time, and those of any size
_CAST = 4096  # entries of a program that only multiplies


def softmax_loss_(logits: Tensor, labels: Tensor, smoothing: float, z: float, differentiate: bool) -> Tensor:
    """(3,N) loss, nats and hit of each row of logits (N,V), which become their gradient if `differentiate`."""
    n, vocab = logits.shape
    logits, given = (logits if logits.stride(1) == 1 else logits.contiguous()), logits
    rows = logits.new_empty(3, n, dtype=torch.float32)
    even = vocab % 16 == 0 and logits.stride(0) % 16 == 0 and logits.data_ptr() % 16 == 0
    launch = EVEN if even else RAGGED
    each, together = launch.read // logits.element_size(), 16 // logits.element_size()
    warps = min(launch.warps, triton.next_power_of_2(ceil_div(vocab, 32 * each)))
    kernel: Any = _softmax_loss  # a launch takes more than its signature says
    with torch.cuda.device_of(logits):
        kernel[(n,)](
            logits, labels.contiguous(), rows, logits.stride(0), n, vocab, float(smoothing), float(z), IGNORED,
            32 * warps * each // together, together, even, smoothing != 0, differentiate, num_warps=warps,
            maxnreg=launch.registers,
        )  # fmt: skip
    if differentiate and given is not logits:
        given.copy_(logits)
    return rows


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x (contiguous) · factor () in `dtype`."""
    out = torch.empty_like(x, dtype=dtype)
    kernel: Any = _scaled
    with torch.cuda.device_of(x):
        kernel[(ceil_div(x.numel(), _CAST),)](x, factor, out, x.numel(), _CAST, num_warps=8)
    return out


@triton.jit
def _softmax_loss(  # type: ignore[no-untyped-def]
    logits, labels, rows, stride, n, vocab, smoothing, z,
    IGNORED: tl.constexpr, LANES: tl.constexpr, TOGETHER: tl.constexpr, EVEN: tl.constexpr,
    SMOOTHED: tl.constexpr, DIFFERENTIATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    x = logits + row.to(tl.int64) * stride
    label = tl.load(labels + row)
    real = label != IGNORED
    known = (label >= 0) & (label < vocab)
    own = tl.load(x + label, mask=known, other=float("nan")).to(tl.float32)
    label = tl.where(known, label, -1).to(tl.int32)  # as narrow as the columns that it is compared with
    # A thread has whole rows of a tile: neighbours in memory where they are loaded at once, else apart.
    across, down = tl.arange(0, TOGETHER)[None, :], tl.arange(0, LANES)[:, None]
    at = down * TOGETHER + across if EVEN else across * LANES + down
    top = tl.full([LANES], -float("inf"), tl.float32)
    before = tl.full([LANES], -float("inf"), tl.float32)  # the largest before the label
    total = tl.zeros([LANES], tl.float32)
    plain = tl.zeros([LANES], tl.float32)
    read = tl.where(real, vocab, 0)  # nothing of a row that is ignored
    for i in range(tl.cdiv(read, LANES * TOGETHER)):
        column = i * (LANES * TOGETHER) + at
        inside = column < read
        s = tl.load(x + column, mask=inside, other=-float("inf"), eviction_policy="evict_last").to(tl.float32)
        above = tl.maximum(top, tl.max(s, 1))
        base = _base(above)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(s - base[:, None]), 1)  # type: ignore[index]
        top = above
        before = tl.maximum(before, tl.max(tl.where(column < label, s, -float("inf")), 1))
        if SMOOTHED:
            plain += tl.sum(tl.where(inside, s, 0.0), 1)
    highest = tl.max(top, 0)
    base = _base(highest)
    sum_exp = tl.where(real, tl.sum(total * tl.exp(top - base), 0), 1.0)
    nats = base - own + tl.log(sum_exp)
    log_z = base + tl.log(sum_exp)
    loss = nats
    if SMOOTHED:
        loss = (1 - smoothing) * nats + smoothing * (log_z - tl.sum(plain, 0) / vocab)
    loss += z * log_z * log_z
    tl.store(rows + row, tl.where(real, loss, 0.0))
    tl.store(rows + n + row, tl.where(real, nats, 0.0))
    tl.store(rows + 2 * n + row, tl.where(real & (own >= highest) & (own > tl.max(before, 0)), 1.0, 0.0))
    if DIFFERENTIATE:
        factor = (1 + 2 * z * log_z) / sum_exp
        share = smoothing / vocab
        steps = tl.cdiv(read, LANES * TOGETHER)
        for i in range(steps):
            column = (steps - 1 - i) * (LANES * TOGETHER) + at
            inside = column < read
            s = tl.load(x + column, mask=inside, other=-float("inf"), eviction_policy="evict_first").to(tl.float32)
            g = tl.exp(s - base) * factor - share
            g = tl.where(column == label, g - (1 - smoothing), g)
            tl.store(x + column, g.to(logits.dtype.element_ty), mask=inside, eviction_policy="evict_first")
        for i in range(tl.cdiv(vocab - read, LANES * TOGETHER)):
            column = i * (LANES * TOGETHER) + at
            tl.store(x + column, tl.zeros([LANES, TOGETHER], logits.dtype.element_ty), mask=column < vocab)


@triton.jit
def _base(top):  # type: ignore[no-untyped-def]
    """What is taken from scores before their exponential: the maximum, and of nothing but -inf zero."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _scaled(x, factor, out, size, CAST: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * CAST + tl.arange(0, CAST)
    y = tl.load(x + at, mask=at < size) * tl.load(factor).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=at < size)
