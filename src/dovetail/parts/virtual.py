"""Virtual tokens: what adapters put before the tokens of a sequence, as vectors or as keys and values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import RunError
from dovetail.parts.adaptable import ADAPTERS, Adaptable, Adapter
from dovetail.parts.context import Context, documents


class Virtual(Adapter, ABC):
    """Base of adapters that are `length` virtual tokens."""

    length: int

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What the tokens are, (length, ...) each, in fp32: their vectors, or their keys and their values."""


class Held(Adapter):
    """At a Front: `length` positions that a prefix takes, so that the tokens stand behind it. It has no vectors there."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length


@dataclass(frozen=True)
class Rows:
    """The virtual tokens of each row: tensors (B|1,P,...), and which are there, (B,P) bool or None for all.

    counts: how many each route has, a static fact.
    """

    tensors: tuple[Tensor, ...]
    there: Tensor | None
    counts: tuple[int, ...]


def rows_of(place: Adaptable, batch: int) -> Rows | None:
    """The virtual tokens of a place for each row; None where there are none.

    Several adapters in use stand one after another, in that order. Rows that are routed to fewer tokens than others
    have some that are not there. Raises RunError for a batch that was not routed.
    """
    groups = [names for names, _ in place.routes] or [place.active]
    held: Any = place._modules.get(ADAPTERS)  # there is one where anything is in use
    chosen = [[m for n in names if isinstance(m := held[n], Virtual)] for names in groups]
    sets = [[torch.cat(parts) for parts in zip(*(m.tensors() for m in found), strict=True)] for found in chosen]
    some = next((s for s in sets if s), None)
    if some is None:
        return None
    if not place.routes:
        return Rows(tuple(t[None] for t in some), None, (some[0].shape[0],))
    lengths = [s[0].shape[0] if s else 0 for s in sets]
    owner = owners(place, batch)
    stacked = [_stacked([s[i] if s else t[:0] for s in sets], max(lengths)) for i, t in enumerate(some)]
    there = None
    if min(lengths) < max(lengths):
        count = torch.tensor(lengths, device=owner.device)[owner]
        there = torch.arange(max(lengths), device=owner.device) < count[:, None]
    return Rows(tuple(t[owner] for t in stacked), there, tuple(lengths))


def owners(place: Adaptable, batch: int) -> Tensor:
    """Which of a place's routes each row takes, (B,). Raises RunError for a batch of another size."""
    rows = torch.cat([rows for _, rows in place.routes])
    if rows.shape[0] != batch:
        raise RunError(
            f"an adapter stands where {batch} rows come, and the batch is routed as {rows.shape[0]}",
            remedy="name one adapter (or None) a row",
        )
    numbers = torch.cat([torch.full_like(at, i) for i, (_, at) in enumerate(place.routes)])
    return numbers[rows.argsort()]


def _stacked(tensors: Sequence[Tensor], length: int) -> Tensor:
    """(P_i, ...) each -> (N, length, ...), zeros behind."""
    return torch.stack([torch.cat([t, t.new_zeros(length - t.shape[0], *t.shape[1:])]) for t in tensors])


@dataclass(frozen=True)
class Tokens:
    """What a stack reads: x (B,N,C), and what `Context.of` takes beside it. at: where the given tokens stand in it.

    at: (B,T) indices, or how many virtual tokens stand before. even: all of those are there in every row.
    """

    x: Tensor
    attention_mask: Tensor | None = None
    positions: Tensor | None = None
    segments: Tensor | None = None
    at: Tensor | int = 0
    even: bool = True

    def own(self, h: Tensor) -> Tensor:
        """Of hidden states (B,N,C) those of the given tokens, (B,T,C)."""
        if isinstance(self.at, int):
            return h[:, self.at :] if self.at else h
        return h.gather(1, self.at[..., None].expand(*self.at.shape, h.shape[-1]))

    @property
    def ahead(self) -> int | None:
        """Virtual tokens at the start of every row, or None where rows differ."""
        return self.at if isinstance(self.at, int) and self.even else None

    @property
    def beside(self) -> dict[str, Any]:
        return {"attention_mask": self.attention_mask, "positions": self.positions, "segments": self.segments}


class Front(Adaptable):
    """The place before the tokens of a stack. It owns nothing: without adapters it is not there."""

    @property
    def vectors(self) -> int:
        """Virtual tokens before the longest row's own."""
        return self._most(Virtual)

    @property
    def held(self) -> int:
        """Positions that prefixes take before the tokens of any row."""
        return self._most(Held)

    def behind(self, ctx: Context, batch: int) -> Context:
        """The context with every token behind the prefixes of its row."""
        counts = self._counts(Held) if self.adapted else [0]
        if not any(counts):
            return ctx
        shift: Tensor | int = counts[0]
        if any(count != shift for count in counts):
            owner = owners(self, batch)
            shift = torch.tensor(counts, device=owner.device)[owner][:, None, None]
        return replace(ctx, positions=ctx.positions + shift, memo={})

    def precede(self, given: Tokens) -> Tokens:
        """`given` with the virtual tokens of its row before each row, or before each document of packed rows.

        Positions count them; documents are told apart as before.
        """
        batch, x = given.x.shape[0], given.x
        found = rows_of(self, batch) if self.adapted else None
        if found is None:
            return given
        vectors, there = found.tensors[0].to(x.dtype).expand(batch, -1, -1), found.there
        P = vectors.shape[1]
        shift: Any = P if there is None else there.sum(-1)
        behind = None if given.positions is None else given.positions + _like(shift, given.positions)
        if given.segments is not None:
            return _packed(given, vectors, there, behind)
        mask = given.attention_mask
        if mask is not None or there is not None:
            ahead = x.new_ones(batch, P, dtype=torch.bool) if there is None else there
            own = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.to(torch.bool)
            mask = torch.cat([ahead, own], 1)
        if behind is not None:
            behind = torch.cat([_counted(P, behind).expand(behind.shape[0], P, *behind.shape[2:]), behind], 1)
        return Tokens(torch.cat([vectors, x], 1), mask, behind, None, P, there is None)

    def _counts(self, kind: type[Adapter]) -> list[int]:
        """Lengths of the adapters of one sort, added up for each route."""
        held: Any = self._modules.get(ADAPTERS)
        groups = [names for names, _ in self.routes] or [self.active]
        return [sum(held[n].length for n in names if isinstance(held[n], kind)) for names in groups]

    def _most(self, kind: type[Adapter]) -> int:
        return max(self._counts(kind)) if self.adapted else 0


def _packed(given: Tokens, vectors: Tensor, there: Tensor | None, behind: Tensor | None) -> Tokens:
    """Virtual tokens (B,P,C) before each document. Its number of tokens depends on how many documents a row has."""
    assert given.segments is not None
    (B, T), P, device = given.x.shape[:2], vectors.shape[1], given.x.device
    number = documents(given.segments, given.attention_mask)[1]
    count = int(number.max()) + 1
    N = T + P * count
    begun = number.cummax(-1).values + 1
    at = torch.arange(T, device=device) + P * begun
    known = torch.where(number >= 0, number, count)
    first = torch.full((B, count + 1), N + P, device=device).scatter_reduce(1, known, at, "amin")[:, :count]
    ahead = first[..., None] - P + torch.arange(P, device=device)  # (B,documents,P); slot N is nobody's
    real = (first < N)[..., None] if there is None else (first < N)[..., None] & there[:, None]
    ahead = torch.where(real, ahead, N).flatten(1)

    def laid(own: Tensor, virtual: Tensor, fill: int) -> Tensor:
        """(B,T,...) and (B,documents·P,...) -> (B,N,...)."""
        wide = (B, -1, *own.shape[2:])
        here, front = (i.view(*i.shape, *[1] * (own.dim() - 2)).expand(wide) for i in (at, ahead))
        base = own.new_full((B, N + 1, *own.shape[2:]), fill)
        return base.scatter(1, here, own).scatter(1, front, virtual)[:, :N]

    numbers = torch.arange(count, device=device).repeat_interleave(P).expand(B, -1)
    segments = laid(number, numbers, -1)
    x = laid(given.x, vectors.repeat(1, count, 1), 0)
    if behind is not None:
        behind = behind.expand(B, *behind.shape[1:])
        places = _counted(P, behind).repeat(1, count, *[1] * (behind.dim() - 2))
        behind = laid(behind, places.expand(B, P * count, *behind.shape[2:]), 0)
    return Tokens(x, None, behind, segments, at)


def _counted(length: int, like: Tensor) -> Tensor:
    """0, 1, ... as positions (1,length[,1])."""
    return torch.arange(length, device=like.device).view(1, length, *[1] * (like.dim() - 2))


def _like(shift: Any, positions: Tensor) -> Any:
    """(B,) to be added to positions (B,T[,A])."""
    return shift.view(-1, *[1] * (positions.dim() - 1)) if isinstance(shift, Tensor) else shift
