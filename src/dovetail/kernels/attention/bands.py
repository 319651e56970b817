"""Attention in bf16 on a CPU: bands of queries, their scores in one scratch that every call uses again.

torch's fused CPU attention keeps scores in fp32 and half of its backward is spent outside the products. Here a
band's scores are bf16 products written into memory that is already mapped, and are made again in the backward:
memory O(band · S) once for all layers, two to three times as fast on a processor that multiplies bf16.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from dovetail.kernels.attention.coords import BoundMask

_SCORES = 2**23  # scores held at a time, 16 MB in bf16: about a last-level cache
_local = threading.local()  # a scratch belongs to the thread that fills it


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BoundMask | None, scale: float) -> Tensor:
    """(B,H,T,Dv) from q (B,H,T,D), k (B,G,S,D), v (B,G,S,Dv). Probabilities are rounded to the dtype of q."""
    causal = mask is not None and mask.causal
    seen = None if mask is None or mask.full or causal else mask.dense()
    return _attend(q, k, v, seen, causal, scale)


@torch.library.custom_op("dovetail::banded_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, scale: float) -> Tensor:
    call = _Folded(q, k, v, seen, causal, scale)
    out = q.new_empty(call.groups, call.repeats, call.T, v.shape[-1])
    for band in call.bands():
        part = torch.bmm(band.probabilities(), band.v, out=_scratch("out", (*band.q.shape[:2], v.shape[-1]), q.dtype))
        out[band.cut, :, band.rows] = call.unfold(part)
        if band.empty is not None:
            out[band.cut, :, band.rows].masked_fill_(band.empty, 0)
    return out.view(*q.shape[:3], v.shape[-1])


@torch.library.custom_op("dovetail::banded_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Folded(q, k, v, seen, causal, scale)
    d_out = d_out.reshape(call.groups, call.repeats, call.T, v.shape[-1])
    d_q = torch.empty_like(call.q)
    d_k = torch.zeros(call.k.shape, dtype=torch.float32)
    d_v = torch.zeros(call.v.shape, dtype=torch.float32)
    for band in call.bands():
        p = band.probabilities()
        given = d_out[band.cut, :, band.rows]
        given = (given if band.empty is None else given.masked_fill(band.empty, 0)).flatten(1, 2)
        d_p = torch.bmm(given, band.v.mT, out=_scratch("scores", p.shape, q.dtype))
        d_s = torch._softmax_backward_data(d_p, p, -1, q.dtype, grad_input=d_p)
        d_v[band.cut, band.keys] += torch.bmm(p.mT, given, out=_scratch("out", band.v.shape, q.dtype))
        d_k[band.cut, band.keys] += torch.bmm(d_s.mT, band.q, out=_scratch("out", band.k.shape, q.dtype))
        d_q[band.cut, :, band.rows] = call.unfold(torch.bmm(d_s, band.k, out=_scratch("out", band.q.shape, q.dtype)))
    return d_q.mul_(scale).view(q.shape), d_k.to(q.dtype).view(k.shape), d_v.to(q.dtype).view(v.shape)


class _Folded:
    """One call with batch and key/value heads folded, so that the queries of a group are rows over the same keys."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, scale: float):
        B, H, self.T, D = q.shape
        G, self.S = k.shape[1:3]
        self.heads, self.groups, self.repeats = G, B * G, H // G
        self.q = (q * scale).reshape(self.groups, self.repeats, self.T, D)
        self.k, self.v = k.reshape(self.groups, self.S, D), v.reshape(self.groups, self.S, v.shape[-1])
        self.seen = None if seen is None else seen[:, 0].expand(B, -1, -1)
        self.causal = causal
        self.band = 128 if self.S <= 1024 else 256
        self.above = torch.full((self.band, self.band), -torch.inf, dtype=q.dtype).triu_(1)

    def bands(self) -> Iterator[_Band]:
        """The pieces, whole batch rows at a time, each with the keys between the first and the last that it sees."""
        entries = self.heads * self.repeats * min(self.band, self.T) * self.S
        rows = max(1, _SCORES // entries)
        for row in range(0, self.groups // self.heads, rows):
            for a in range(0, self.T, self.band):
                b, last = min(a + self.band, self.T), min(row + rows, self.groups // self.heads)
                start, stop = 0, b if self.causal else self.S
                seen = None if self.seen is None else self.seen[row:last, a:b]
                if seen is not None:
                    keys = seen.flatten(0, 1).any(0).nonzero()
                    start, stop = (int(keys[0]), int(keys[-1]) + 1) if len(keys) else (0, 1)
                    seen = seen[..., start:stop]
                yield _Band(self, slice(row * self.heads, last * self.heads), slice(a, b), slice(start, stop), seen)

    def unfold(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.repeats, -1))


class _Band:
    """Queries `rows` of the groups `cut` against `keys`: q (groups, repeats·rows, D), k (groups, keys, D), v."""

    def __init__(self, call: _Folded, cut: slice, rows: slice, keys: slice, seen: Tensor | None):
        self.call, self.cut, self.rows, self.keys, self.seen = call, cut, rows, keys, seen
        self.q = call.q[cut, :, rows].flatten(1, 2)
        self.k, self.v = call.k[cut, keys], call.v[cut, keys]
        empty = None if seen is None else ~seen.any(-1)
        self.empty: Tensor | None = None  # (groups, 1, rows, 1): queries that see no key; theirs is not a softmax
        if empty is not None and empty.any():
            self.empty = empty.repeat_interleave(call.heads, 0)[:, None, :, None]

    def probabilities(self) -> Tensor:
        """(groups, repeats·rows, keys), in the scratch."""
        call, dtype = self.call, self.q.dtype
        s = torch.bmm(self.q, self.k.mT, out=_scratch("scores", (*self.q.shape[:2], self.k.shape[1]), dtype))
        if call.causal:
            n = self.rows.stop - self.rows.start
            call.unfold(s)[..., self.rows].add_(call.above[:n, :n])
        elif self.seen is not None and not self.seen.all():
            hide = torch.zeros(self.seen.shape, dtype=dtype).masked_fill_(~self.seen, torch.finfo(dtype).min)
            s.view(len(hide), -1, *hide.shape[1:]).add_(hide[:, None])
        return torch._softmax(s, -1, False, out=_scratch("probabilities", s.shape, dtype))


def _scratch(name: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory that this thread keeps for `name`: fresh pages would cost more than the products written to them."""
    count = 1
    for size in shape:
        count *= size
    held: dict[str, Tensor] = _local.__dict__
    if name not in held or held[name].numel() < count or held[name].dtype != dtype:
        held[name] = torch.empty(count, dtype=dtype)
    return held[name][:count].view(shape)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, scale: float) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])


@_backward.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, seen, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, seen)


def _differentiate(ctx, d_out: Tensor):  # type: ignore[no-untyped-def]
    q, k, v, seen = ctx.saved_tensors
    return *_backward(d_out, q, k, v, seen, ctx.causal, ctx.scale), None, None, None


_attend.register_autograd(_differentiate, setup_context=_keep)
