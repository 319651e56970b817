"""What a causal row remembers of mixed chunk attention, and one token after another: of one size after any number."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dovetail.kernels.attention import BoundMask, Coords, Side, Span
from dovetail.kernels.squared_relu import squared_relu


class Past(NamedTuple):
    """matrix (B,D,E): Σ lin_k vᵀ over the chunks before the newest token's own; open (B,D,E): over that one, both in
    fp32 or better. keys (B,chunk,D), values (B,chunk,E): the tokens of that chunk, each at its place in it."""

    matrix: Tensor
    open: Tensor
    keys: Tensor
    values: Tensor


class Earlier:
    """j <= i."""

    def allowed(self, q: Side, k: Side) -> Tensor:
        return k.order <= q.order

    def is_full(self) -> bool:
        return False

    def is_causal(self) -> bool:
        return True

    def span(self) -> Span | None:
        return Span(after=0)


def step(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    past: Past,
    order: Tensor,
    segments: Tensor | None,
    chunk: int,
    scale: float,
) -> tuple[Tensor, Past]:
    """(B,1,E) of one new token a row, and the past with it. Padding changes nothing."""
    new = after(quad_k, lin_k, v, past, order, segments, chunk)
    place = order // chunk * chunk + torch.arange(chunk, device=v.device)
    mask = BoundMask(Earlier(), Coords(Side(order), Side(place)))
    keys, values = new.keys.to(quad_q.dtype), new.values.to(v.dtype)
    near = squared_relu(quad_q[:, None], keys[:, None], values[:, None], count=chunk, mask=mask, scale=scale)[:, 0]
    tokens = (order // chunk * chunk).clamp_min(1)[..., None]
    across = (lin_q.to(new.matrix.dtype) / tokens) @ new.matrix
    return near.to(across.dtype) + across, new


def after(
    quad_k: Tensor, lin_k: Tensor, v: Tensor, past: Past, order: Tensor, segments: Tensor | None, chunk: int
) -> Past:
    """The past of rows after the tokens (B,T,...) too. order (B|1,T) goes on from it; negative segments are padding."""
    B, T, _ = v.shape
    wide, order = past.matrix.dtype, order.expand(B, T)
    real = torch.ones_like(order, dtype=torch.bool) if segments is None else segments.expand(B, T) >= 0
    before = order[:, :1]  # (B,1): tokens so far
    newest = (before + real.sum(1, keepdim=True) - 1) // chunk
    moved = (newest > (before - 1) // chunk)[..., None]
    own = real & (order // chunk == newest)
    written, value = lin_k.to(wide), v.to(wide)
    matrix = past.matrix + past.open * moved
    if T > 1:  # a single token is of the newest chunk
        matrix = matrix + (written * (real & ~own)[..., None]).mT @ value
    kept = past.open * ~moved + (written * own[..., None]).mT @ value
    where = torch.where(own, torch.remainder(order, chunk), chunk)[..., None]  # others into a slot that is cut off
    return Past(matrix, kept, _put(past.keys, quad_k, where), _put(past.values, v, where))


def stored(past: Past, before: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """(order, segments) of the slots of keys, (B,chunk) each: 0 where a slot holds a token, -1 elsewhere. before (B,1)."""
    place = (before - 1) // chunk * chunk + torch.arange(chunk, device=before.device)
    return place, torch.where((place >= 0) & (place < before), 0, -1)


def _put(slots: Tensor, x: Tensor, where: Tensor) -> Tensor:
    """slots (B,chunk,D) with x (B,T,D) at `where` (B,T,1); slot `chunk` is nobody's."""
    spare = torch.cat([slots, slots[:, :1]], 1)
    return spare.scatter(1, where.expand(-1, -1, x.shape[2]), x.to(slots.dtype))[:, :-1]
