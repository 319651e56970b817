"""Mixed chunk attention in tiles of a chunk: all in matrix products, and work linear in T.

Plain rows are cut where their chunks are. Where documents begin anywhere, tokens are sorted by document and cut into
tiles of a chunk's size: a chunk then lies in two neighbouring tiles at most, and each tile meets its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.kernels.attention import BoundMask, Coords, Side, Span
from dovetail.kernels.chunks import autocasts
from dovetail.kernels.linear_attention import linear_attention
from dovetail.kernels.mixed_chunk.step import Earlier, Past, stored
from dovetail.kernels.squared_relu import squared_relu


@dataclass(frozen=True)
class Near:
    """Keys of one's document and chunk; causal: none that comes later."""

    chunk: int
    causal: bool

    def allowed(self, q: Side, k: Side) -> Tensor:
        seen = q.order // self.chunk == k.order // self.chunk
        if self.causal:
            seen = seen & (k.order <= q.order)
        if q.segments is None or k.segments is None:
            return seen
        return seen & (q.segments == k.segments) & (k.segments >= 0)

    def is_full(self) -> bool:
        return False

    def is_causal(self) -> bool:
        return False

    def span(self) -> Span | None:
        return None


def plain(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    chunk: int,
    causal: bool,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """(B,T,E) of rows that are one document each, from its first token on, without padding."""
    T, full, size = v.shape[1], torch.promote_types(v.dtype, torch.float32), min(chunk, v.shape[1])
    wide = v.dtype if autocasts(v) else full  # autocast would round its products again
    tiles = [_tiles(t, size) for t in (quad_q, quad_k, lin_q, lin_k, v)]
    q, k, lin_q, lin_k, v = tiles  # zeros behind the last token have no value and no key
    mask = None
    if causal:
        side = Side(torch.arange(size, device=v.device)[None])
        mask = BoundMask(Earlier(), Coords(side, side, aligned=True))
    out = _inside(q, k, v, mask, chunk, scale, dropout).to(wide)
    if not causal:
        sums = (lin_k.flatten(1, 2).to(wide).mT @ v.flatten(1, 2).to(wide))[:, None]
        out = out + (lin_q.to(full) / T).to(wide) @ sums
    elif out.shape[1] > 1:
        sums = (lin_k[:, :-1].to(wide).mT @ v[:, :-1].to(wide)).to(full).cumsum(1)
        tokens = torch.arange(1, out.shape[1], device=v.device, dtype=full)[:, None, None] * chunk
        out = torch.cat([out[:, :1], out[:, 1:] + (lin_q[:, 1:].to(full) / tokens) @ sums], 1)
    return out.flatten(1, 2)[:, :T].to(full)


def ragged(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    chunk: int,
    causal: bool,
    scale: float,
    order: Tensor,
    segments: Tensor | None,
    past: Past | None,
    dropout: float = 0.0,
) -> Tensor:
    """(B,T,E) of rows that are padded, packed, or go on from `past`."""
    (B, T, _), wide = v.shape, torch.promote_types(v.dtype, torch.float32)
    order = order.expand(B, T)
    document = torch.zeros_like(order) if segments is None else segments.expand(B, T)
    home = None
    if segments is not None:  # padding to the end, documents one behind the other
        to = torch.where(document < 0, document.amax() + 1, document).argsort(dim=1, stable=True)
        home = to.argsort(1)
        quad_q, quad_k, lin_q, lin_k, v = (_take(t, to) for t in (quad_q, quad_k, lin_q, lin_k, v))
        order, document = order.gather(1, to), document.gather(1, to)
    size = min(chunk, T) if past is None else chunk
    at, number = _tiles(order, size), _tiles(document, size, -1)
    q, k, read, write, value = (_tiles(t, size) for t in (quad_q, quad_k, lin_q, lin_k, v))

    held = None if past is None else stored(past, order[:, :1], chunk)  # the chunk that the row begins in
    sides = (at, number, k, value)
    first = (None, None, None, None) if held is None or past is None else (*held, past.keys, past.values)
    around = [_around(t, fill, not causal, f) for t, fill, f in zip(sides, (0, -1, 0, 0), first, strict=True)]
    coords = Coords(
        Side(at.flatten(0, 1), number.flatten(0, 1)), Side(around[0].flatten(0, 1), around[1].flatten(0, 1))
    )
    mask = BoundMask(Near(chunk, causal), coords)
    out = _inside(q, around[2], around[3], mask, chunk, scale, dropout).to(wide).flatten(1, 2)[:, :T]
    if causal:
        out = out + _earlier(read, write, value, at, number, chunk).flatten(1, 2)[:, :T]
        if past is not None:
            of = (lin_q.to(wide) / _before(order, chunk, wide)).to(past.matrix.dtype)
            left = (order // chunk > (order[:, :1] - 1) // chunk)[..., None]
            out = out + of @ past.matrix + (of * left) @ past.open
    else:
        known = {"causal": False, "segments": document}
        ones = torch.ones(B, 1, T, 1, dtype=wide, device=v.device)
        tokens, _ = linear_attention(ones, ones, ones, **known)
        across, _ = linear_attention(lin_q[:, None], lin_k[:, None], v[:, None], **known)
        out = out + (across / tokens.clamp_min(1))[:, 0]
    return out if home is None else _take(out, home)


def _earlier(q: Tensor, k: Tensor, v: Tensor, at: Tensor, number: Tensor, chunk: int) -> Tensor:
    """The linear part over earlier chunks of the same row, (B,N,L,E), all given in N tiles of L.

    A tile reads its own keys and those of the tile before by their places, and earlier ones from sums: whatever of its
    documents lies there is of the one that crosses the border before them, and in an earlier chunk.
    """
    wide, tiles = torch.promote_types(v.dtype, torch.float32), at.shape[1]
    q, k = q.to(wide) / _before(at, chunk, wide), k.to(wide)
    where, whose = _around(at, 0, False), _around(number, -1, False)
    seen = (number[..., None] == whose[..., None, :]) & (whose >= 0)[..., None, :]
    seen = seen & (at[..., None] // chunk > where[..., None, :] // chunk)
    out = ((q @ _around(k, 0, False).mT) * seen) @ _around(v.to(wide), 0, False)
    if tiles > 2:
        last = number[..., -1]  # the document that crosses the border behind each tile
        sums = (k * (number == last[..., None])[..., None]).mT @ v.to(wide)
        crossing = last[:, : tiles - 2]
        lower = torch.ones(tiles - 2, tiles - 2, dtype=torch.bool, device=v.device).tril()
        joined = (crossing[:, :, None] == crossing[:, None]) & (crossing >= 0)[:, None] & lower
        entering = torch.einsum("bth,bhde->btde", joined.to(wide), sums[:, : tiles - 2])
        reads = q[:, 2:] * (number[:, 2:] == crossing[..., None])[..., None]
        out = torch.cat([out[:, :2], out[:, 2:] + reads @ entering], 1)
    return out


def _before(order: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """How many tokens of its document are in earlier chunks, at least 1: (...,1)."""
    return (order // chunk * chunk).clamp_min(1).to(dtype)[..., None]


def _inside(
    q: Tensor, k: Tensor, v: Tensor, mask: BoundMask | None, chunk: int, scale: float, dropout: float
) -> Tensor:
    """relu² attention of each tile, (B,N,L,E), from q (B,N,L,D), k (B,N,S,D), v (B,N,S,E)."""
    folded = (t.flatten(0, 1)[:, None] for t in (q, k, v))
    return squared_relu(*folded, count=chunk, mask=mask, scale=scale, dropout=dropout)[:, 0].unflatten(0, q.shape[:2])


def _tiles(x: Tensor, size: int, fill: int = 0) -> Tensor:
    """(B,T,...) -> (B,N,size,...), `fill` behind the last token."""
    short = -x.shape[1] % size
    x = F.pad(x, (*(0, 0) * (x.dim() - 2), 0, short), value=fill) if short else x
    return x.unflatten(1, (-1, size))


def _around(x: Tensor, fill: int, behind: bool, first: Tensor | None = None) -> Tensor:
    """Each tile after the one before it, and before the next one where `behind`: (B,N,L,...) -> (B,N,2L|3L,...).

    first (B,L,...): what is before the first tile; `fill` unless given.
    """
    edge = torch.full_like(x[:, :1], fill)
    before = torch.cat([edge if first is None else first[:, None].to(x.dtype), x[:, :-1]], 1)
    return torch.cat([before, x, torch.cat([x[:, 1:], edge], 1)] if behind else [before, x], 2)


def _take(x: Tensor, to: Tensor) -> Tensor:
    """Token to[b, t] of x (B,T,D) at t."""
    return x.gather(1, to[..., None].expand(-1, -1, x.shape[2]))
