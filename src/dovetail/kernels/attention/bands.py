"""Attention on a CPU in bands of queries: only tiles of keys that some query sees, scores in a scratch used again.

torch's fused CPU attention reads all keys whatever a mask hides, keeps scores in fp32 even for bf16, and half of its
backward is spent outside the products. Here a band's scores are products in the dtype of q written into memory that is
already mapped, and are made again in the backward: memory O(band · S) once for all layers, two to three times as fast
in bf16 on a processor that multiplies it, and under a mask a cost proportional to the tiles that are not empty.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from dovetail.kernels.attention.coords import BoundMask
from dovetail.kernels.operation import operation

TILE = 128
_SCORES = 2**23  # scores held at a time, 16 MB in bf16: about a last-level cache
_local = threading.local()  # a scratch belongs to the thread that fills it


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BoundMask | None, scale: float) -> Tensor:
    """(B,H,T,Dv) from q (B,H,T,D), k (B,G,S,D), v (B,G,S,Dv). Probabilities are rounded to the dtype of q."""
    causal = mask is not None and mask.causal
    if mask is None or mask.full or causal:
        return _attend(q, k, v, None, None, causal, scale)
    if "tiles" not in mask.memo:
        mask.memo["tiles"] = tiles(mask.dense()[:, 0])
    return _attend(q, k, v, mask.dense(), mask.memo["tiles"], False, scale)


def tiles(seen: Tensor, tile: int = TILE) -> Tensor:
    """(B, ceil(T/tile), ceil(S/tile)) bool from seen (B,T,S): which tiles hold anything. As BoundMask.tiles does."""
    padded = torch.nn.functional.pad(seen, (0, -seen.shape[2] % tile, 0, -seen.shape[1] % tile))
    return padded.unflatten(2, (-1, tile)).any(-1).unflatten(1, (-1, tile)).any(2)


@operation("banded_attention")
def _attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, tiles: Tensor | None, causal: bool, scale: float
) -> Tensor:
    call = _Folded(q, k, v, seen, tiles, causal, scale)
    out = q.new_empty(call.groups, call.repeats, call.T, v.shape[-1])
    for band in call.bands():
        part = torch.bmm(band.probabilities(), band.v, out=_scratch("out", (*band.q.shape[:2], v.shape[-1]), q.dtype))
        out[band.cut, :, band.rows] = call.unfold(part)
        if band.empty is not None:
            out[band.cut, :, band.rows].masked_fill_(band.empty, 0)
    return out.view(*q.shape[:3], v.shape[-1])


@operation("banded_attention_backward")
def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    tiles: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Folded(q, k, v, seen, tiles, causal, scale)
    d_out = d_out.reshape(call.groups, call.repeats, call.T, v.shape[-1])
    d_q = q.new_empty(
        call.q.shape
    )  # contiguous, as the fake kernel says; a lone row's q may be a view of another order
    wide = torch.promote_types(q.dtype, torch.float32)
    d_k, d_v = torch.zeros(call.k.shape, dtype=wide), torch.zeros(call.v.shape, dtype=wide)
    for band in call.bands():
        p = band.probabilities()
        given = d_out[band.cut, :, band.rows]
        given = (given if band.empty is None else given.masked_fill(band.empty, 0)).flatten(1, 2)
        d_p = torch.bmm(given, band.v.mT, out=_scratch("scores", p.shape, q.dtype))
        d_s = torch._softmax_backward_data(d_p, p, -1, q.dtype, grad_input=d_p)
        band.add(d_v, torch.bmm(p.mT, given, out=_scratch("out", band.v.shape, q.dtype)))
        band.add(d_k, torch.bmm(d_s.mT, band.q, out=_scratch("out", band.k.shape, q.dtype)))
        d_q[band.cut, :, band.rows] = call.unfold(torch.bmm(d_s, band.k, out=_scratch("out", band.q.shape, q.dtype)))
    return d_q.mul_(scale).view(q.shape), d_k.to(q.dtype).view(k.shape), d_v.to(q.dtype).view(v.shape)


class _Folded:
    """One call with batch and key/value heads folded, so that the queries of a group are rows over the same keys."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, tiles: Tensor | None, causal: bool, scale: float
    ):
        B, H, self.T, D = q.shape
        G, self.S = k.shape[1:3]
        self.heads, self.groups, self.repeats = G, B * G, H // G
        self.q = (q * scale).reshape(self.groups, self.repeats, self.T, D)
        self.k, self.v = k.reshape(self.groups, self.S, D), v.reshape(self.groups, self.S, v.shape[-1])
        self.seen = None if seen is None else seen[:, 0].expand(B, -1, -1)
        self.tiles = None if tiles is None else tiles.expand(B, -1, -1)
        self.causal = causal
        self.band = TILE if self.S <= 1024 or tiles is not None else 2 * TILE
        self.above = torch.full((self.band, self.band), -torch.inf, dtype=q.dtype).triu_(1)

    def bands(self) -> Iterator[_Band]:
        """The pieces, whole batch rows at a time, each with the keys between the first and the last that it sees."""
        entries = self.heads * self.repeats * min(self.band, self.T) * self.S
        rows = max(1, _SCORES // entries)
        for row in range(0, self.groups // self.heads, rows):
            for a in range(0, self.T, self.band):
                b, last = min(a + self.band, self.T), min(row + rows, self.groups // self.heads)
                runs, seen = [(0, b if self.causal else self.S)], None
                if self.seen is not None and self.tiles is not None:
                    runs = self._runs(self.tiles[row:last, a // TILE].any(0))
                    pieces = [self.seen[row:last, a:b, start:stop] for start, stop in runs]
                    seen = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
                yield _Band(self, slice(row * self.heads, last * self.heads), slice(a, b), runs, seen)

    def _runs(self, visited: Tensor) -> list[tuple[int, int]]:
        """(start, stop) of the keys in tiles that follow one another; one key where all tiles are empty."""
        found: list[tuple[int, int]] = []
        for tile in visited.nonzero()[:, 0].tolist():
            start, stop = tile * TILE, min((tile + 1) * TILE, self.S)
            joins = found and found[-1][1] == start
            found = [*found[:-1], (found[-1][0], stop)] if joins else [*found, (start, stop)]
        return found or [(0, 1)]

    def unfold(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.repeats, -1))


class _Band:
    """Queries `rows` of the groups `cut` against keys: q (groups, repeats·rows, D), k (groups, keys, D), v."""

    def __init__(self, call: _Folded, cut: slice, rows: slice, runs: list[tuple[int, int]], seen: Tensor | None):
        self.call, self.cut, self.rows, self.runs, self.seen = call, cut, rows, runs, seen
        self.q = call.q[cut, :, rows].flatten(1, 2)
        self.k, self.v = self._gathered(call.k), self._gathered(call.v)
        empty = None if seen is None else ~seen.any(-1)
        self.empty: Tensor | None = None  # (groups, 1, rows, 1): queries that see no key; theirs is not a softmax
        if empty is not None and empty.any():
            self.empty = empty.repeat_interleave(call.heads, 0)[:, None, :, None]

    def _gathered(self, x: Tensor) -> Tensor:
        """The band's part of keys or values (groups, S, D): a view where its tiles follow one another."""
        pieces = [x[self.cut, start:stop] for start, stop in self.runs]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def add(self, total: Tensor, part: Tensor) -> None:
        """Adds what the band's keys get, (groups, keys, D), to what all have."""
        at = 0
        for start, stop in self.runs:
            total[self.cut, start:stop] += part[:, at : at + stop - start]
            at += stop - start

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
def _(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, tiles: Tensor | None, causal: bool, scale: float) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])


@_backward.register_fake
def _(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    tiles: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, seen, tiles, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, seen, tiles)


def _differentiate(ctx, d_out: Tensor):  # type: ignore[no-untyped-def]
    q, k, v, seen, tiles = ctx.saved_tensors
    return *_backward(d_out, q, k, v, seen, tiles, ctx.causal, ctx.scale), None, None, None, None


_attend.register_autograd(_differentiate, setup_context=_keep)
