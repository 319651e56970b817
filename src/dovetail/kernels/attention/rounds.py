"""Several rounds of attention over near keys, each round in an order of its own, merged by their log-sum-exp.

Together they are one softmax over the keys of all rounds, where a key that is near in two rounds counts twice (Kitaev
et al. 2020, section 2). Batch and heads are folded: q (N,T,D), k (N,S,D), v (N,S,Dv). All is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.kernels.attention import reference
from dovetail.kernels.attention.coords import BoundMask, Coords, Side, Span

INDEX = 2**24  # an order here is place · INDEX + index: where a round puts a token, and where it stands in its document


@dataclass(frozen=True)
class Near:
    """Keys of one's document whose place is at most `before` before and `after` behind one's own; never oneself.

    causal: only keys of a lower index.
    """

    before: int
    after: int
    causal: bool

    def allowed(self, q: Side, k: Side) -> Tensor:
        back = q.order // INDEX - k.order // INDEX
        since = torch.remainder(q.order, INDEX) - torch.remainder(k.order, INDEX)
        seen = (back <= self.before) & (back >= -self.after) & (since > 0 if self.causal else since != 0)
        if q.segments is None or k.segments is None:
            return seen
        return seen & (q.segments == k.segments) & (k.segments >= 0)

    def is_full(self) -> bool:
        return False

    def is_causal(self) -> bool:
        return False

    def span(self) -> Span | None:
        return None


def attend_rounds(
    q: Tensor, k: Tensor, v: Tensor, masks: Sequence[BoundMask], own: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """The definition, (N,T,Dv), by one mask a round. own (N,T,Dv): what a query gets that no round shows a key."""
    parts = [reference.attend(q[:, None], k[:, None], v[:, None], mask, None, scale, dropout) for mask in masks]
    return _merged([(out[:, 0], lse[:, 0]) for out, lse in parts], own)


def attend_sorted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    orders: Sequence[Tensor],
    segments: Tensor,
    rule: Near,
    chunk: int,
    reach: tuple[int, int],
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """The same where queries and keys are the same tokens, (N,T,Dv), at a cost of O(T · chunk) a round.

    orders: of each round (N,T). segments (N,T). Tokens are sorted by document and order and cut into pieces of `chunk`;
    a piece meets itself, `reach[0]` pieces before it and `reach[1]` behind it, which must hold all that `rule` shows.
    """
    N, T, _ = q.shape
    count, (before, after) = -(-T // chunk), reach
    parts = []
    for order in orders:
        to = sorting(order, segments)

        def pieces(x: Tensor, fill: int = 0, to: Tensor = to) -> Tensor:
            """(N,T,...) -> (N,count,chunk,...) in the order of the round."""
            index = to if x.dim() == 2 else to[..., None].expand_as(x)
            ends = (0, count * chunk - T) if x.dim() == 2 else (0, 0, 0, count * chunk - T)
            return F.pad(x.gather(1, index), ends, value=fill).unflatten(1, (count, chunk))

        def around(x: Tensor, fill: int = 0) -> Tensor:
            """(N,count,chunk,...) -> (N,count,(before+1+after)·chunk,...)."""
            wide = F.pad(x, (*(0, 0) * (x.dim() - 2), before, after), value=fill)
            return torch.cat([wide[:, i : i + count] for i in range(before + 1 + after)], 2)

        places, documents = pieces(order), pieces(segments, -1)
        at = Coords(
            Side(places.flatten(0, 1), documents.flatten(0, 1)),
            Side(around(places).flatten(0, 1), around(documents, -1).flatten(0, 1)),
        )
        near = [x.flatten(0, 1)[:, None] for x in (pieces(q), around(pieces(k)), around(pieces(v)))]
        out, lse = reference.attend(near[0], near[1], near[2], BoundMask(rule, at), None, scale, dropout)
        home = to.argsort(-1)
        out = out.reshape(N, count * chunk, -1).gather(1, home[..., None].expand(-1, -1, v.shape[2]))
        parts.append((out, lse.reshape(N, count * chunk).gather(1, home)))
    return _merged(parts, v)


def sorting(order: Tensor, segments: Tensor) -> Tensor:
    """Indices (N,S) that sort by segment, then by order."""
    first = order.sort(dim=-1, stable=True).indices
    return first.gather(1, segments.gather(1, first).sort(dim=-1, stable=True).indices)


def _merged(parts: Sequence[tuple[Tensor, Tensor]], own: Tensor) -> Tensor:
    """One softmax from (out (N,T,Dv), lse (N,T)) of every round; `own` where all are empty."""
    lse = torch.stack([part for _, part in parts])
    top = lse.amax(0).detach()
    some = torch.isfinite(top)
    weight = torch.exp(lse - torch.where(some, top, 0.0))
    share = weight / torch.where(some, weight.sum(0), 1.0)
    out = torch.stack([part.to(share.dtype) for part, _ in parts])
    return torch.where(some[..., None], (share[..., None] * out).sum(0).to(own.dtype), own)
