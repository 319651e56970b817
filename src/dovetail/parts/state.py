"""State: what mixers remember while decoding. Static buffers, updated in place, never differentiated.

A `Timeline` says which tokens are stored (shared by all layers of one geometry); a `KVState` holds one
layer's keys and values. Token number n of a row lives in slot n (slot n mod W in a ring of W); padding
goes to a spare slot that nobody reads. Where the first F tokens are kept besides, the ring begins behind them. Positions inside are tensors; `count` is a hint for the host
that lets eager decoding read only what is filled, and is None when a captured graph drives the state.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dovetail.errors import RunError
from dovetail.kernels.attention import Coords, Side
from dovetail.parts.context import Context
from dovetail.parts.mask import Kept

FAR = 2**40  # order of an empty slot: later than any query, so no causal query sees it


class LayerState(Protocol):
    """What every remembered thing can do. buffers: every tensor it holds, in an order that equal states share."""

    def reorder(self, indices: Tensor) -> None: ...

    def truncate(self, length: int) -> None: ...

    def snapshot(self) -> Any: ...

    def buffers(self) -> list[Tensor]: ...

    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.buffers())


@dataclass
class Step:
    """How one forward writes into a timeline and what its queries then see."""

    coords: Coords
    newest: bool  # one query per row, after everything stored
    where: Tensor | slice  # slots: (B,T) indices, or a slice when all rows agree
    visible: int | None  # how many slots to read (host hint), None for all
    chunk_over_ring: bool = False  # read the old ring and the new tokens side by side, then write


class Timeline:
    """Which tokens the slots hold: order (B,S+1), segments implied by order, positions (B,S+1,A)."""

    def __init__(self, batch: int, capacity: int, axes: int, kept: Kept | None, device: torch.device):
        self.kept = kept
        self.capacity = capacity
        self.slots = capacity if kept is None else min(kept.tokens, capacity)
        self.order = torch.full((batch, self.slots + 1), FAR, device=device)
        self.positions = torch.zeros(batch, self.slots + 1, axes, dtype=torch.long, device=device)
        self.length = torch.zeros(batch, dtype=torch.long, device=device)
        self.count: int | None = 0  # host's bound on the tokens of any row; None when a graph drives the state
        self.even = True  # every row holds exactly `count` tokens
        self.step: Step | None = None

    def advance(self, ctx: Context) -> Step:
        """Makes room for the tokens of `ctx`; call once a forward, before the layers append."""
        B, T = self.order.shape[0], ctx.order.shape[1]
        new = T if ctx.segments is None else (ctx.segments >= 0).sum(-1)
        if self.count is not None and self.count + T > self.capacity:
            # The bound is exact where rows agree; else the rows themselves are asked, and only then.
            exact = self.even and ctx.segments is None
            needed = self.count + T if exact else int((self.length + new).max())
            if needed > self.capacity:
                raise RunError(
                    f"the state holds {self.capacity} tokens and {needed} are needed",
                    remedy="make it larger: model.new_state(batch, capacity=...)",
                )
        order = ctx.order.expand(B, T)
        positions = ctx.positions.expand(B, T, self.positions.shape[-1])
        start, even = self.count, self.even and ctx.segments is None
        over_ring = self.kept is not None and T > 1
        before = (self.order[:, :-1].clone(), self.positions[:, :-1].clone()) if over_ring else None
        slots = self._slot(order)
        if ctx.segments is not None:
            slots = torch.where(ctx.segments >= 0, slots, self.slots)
        where: Tensor | slice = slots
        if even and start is not None and self._slot(start) + T <= self.slots:
            where = slice(self._slot(start), self._slot(start) + T)
        hidden = order if ctx.segments is None else torch.where(ctx.segments >= 0, order, FAR)
        self._write(where, hidden, positions)
        self.length.add_(new)
        self.even = even
        self.count = None if start is None else min(start + T, self.capacity)
        visible = None if self.count is None else min(self.count, self.slots)
        q = Side(order, None, positions)
        if before is not None:
            k = Side(torch.cat([before[0], hidden], 1), None, torch.cat([before[1], positions], 1))
            coords = Coords(q, k)
        else:
            stop = self.slots if visible is None else visible
            aligned = ctx.aligned and start == 0
            k = Side(self.order[:, :stop], None, self.positions[:, :stop])
            coords = Coords(q, k, aligned, in_step=aligned and ctx.in_step)
        self.step = Step(coords, even and start is not None and T == 1, where, visible, over_ring)
        return self.step

    def _slot(self, number: Any) -> Any:
        """Where token `number` of a row lives: an int, or a tensor of them."""
        if self.kept is None:
            return number
        last, first = self.kept
        if isinstance(number, int):
            return number if number < first else first + (number - first) % last
        return torch.where(number < first, number, first + (number - first) % last)

    def _write(self, where: Tensor | slice, order: Tensor, positions: Tensor) -> None:
        if isinstance(where, slice):
            self.order[:, where] = order
            self.positions[:, where] = positions
            return
        where = _last(where, self.kept is not None, self.slots)
        self.order[_rows(where), where], self.positions[_rows(where), where] = order, positions
        self.order[:, self.slots].fill_(FAR)

    def reorder(self, indices: Tensor) -> None:
        self.order, self.positions = self.order[indices], self.positions[indices]
        self.length = self.length[indices]

    def check_truncate(self) -> None:
        """Raises RunError for a ring that has overwritten what would be needed."""
        if self.kept is not None and int(self.length.max()) > self.slots:
            raise RunError(
                "a ring that has wrapped cannot be truncated: what it overwrote is gone",
                remedy="take a snapshot() before, or decode without a window",
            )

    def truncate(self, length: int | Tensor) -> None:
        self.check_truncate()
        rows = length[:, None] if isinstance(length, Tensor) else length
        self.order = torch.where(self.order >= rows, FAR, self.order)
        self.length = self.length.clamp_max(length)  # type: ignore[arg-type]
        if isinstance(length, Tensor):
            self.even = False
        if self.count is not None:
            self.count = min(self.count, int(self.length.max() if isinstance(length, Tensor) else length))

    def snapshot(self) -> Timeline:
        copy = object.__new__(Timeline)
        copy.__dict__.update(self.__dict__)
        copy.order, copy.positions, copy.length = self.order.clone(), self.positions.clone(), self.length.clone()
        return copy


class KVState(LayerState):
    """One attention layer's keys (B,S+1,G,D) and values (B,S+1,G,Dv) over a shared timeline."""

    def __init__(self, timeline: Timeline, heads: int, dim: int, dim_v: int, dtype: torch.dtype):
        batch, slots = timeline.order.shape
        device = timeline.order.device
        self.timeline = timeline
        self.k = torch.zeros(batch, slots, heads, dim, dtype=dtype, device=device)
        self.v = torch.zeros(batch, slots, heads, dim_v, dtype=dtype, device=device)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Step]:
        """Stores k (B,T,G,D), v (B,T,G,Dv); returns, in their dtypes, all keys and values that `step.coords.k` describes."""
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise RunError(
                "a decoding state was given tensors that need gradients", remedy="decode under torch.no_grad()"
            )
        step = self.timeline.step
        assert step is not None, "the stack advances its timelines before its layers run"
        if step.chunk_over_ring:
            slots = self.timeline.slots
            keys = torch.cat([self.k[:, :slots], k.to(self.k.dtype)], 1)
            values = torch.cat([self.v[:, :slots], v.to(self.v.dtype)], 1)
            self._write(k, v, step.where)
            return keys.to(k.dtype), values.to(v.dtype), step
        self._write(k, v, step.where)
        stop = self.timeline.slots if step.visible is None else step.visible
        return self.k[:, :stop].to(k.dtype), self.v[:, :stop].to(v.dtype), step

    def _write(self, k: Tensor, v: Tensor, where: Tensor | slice) -> None:
        if isinstance(where, slice):
            self.k[:, where] = k
            self.v[:, where] = v
            return
        where = _last(where, self.timeline.kept is not None, self.timeline.slots)
        rows = _rows(where)
        self.k[rows, where] = k.to(self.k.dtype)
        self.v[rows, where] = v.to(self.v.dtype)

    def reorder(self, indices: Tensor) -> None:
        self.k, self.v = self.k[indices], self.v[indices]

    def truncate(self, length: int) -> None:
        """Nothing to forget here: the timeline marks the slots as empty."""

    def snapshot(self) -> KVState:
        copy = object.__new__(KVState)
        copy.timeline, copy.k, copy.v = self.timeline, self.k.clone(), self.v.clone()
        return copy

    def buffers(self) -> list[Tensor]:
        return [self.k, self.v]


class CrossState(LayerState):
    """Keys and values of the encoder output, projected once. segments (B,S): negative for padding."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.segments: Tensor | None = None

    def reorder(self, indices: Tensor) -> None:
        held = (self.k, self.v, self.segments)
        self.k, self.v, self.segments = (None if t is None else t[indices] for t in held)

    def truncate(self, length: int) -> None:
        """The encoder output does not grow."""

    def snapshot(self) -> CrossState:
        copy = CrossState()
        copy.k, copy.v, copy.segments = self.k, self.v, self.segments
        return copy

    def buffers(self) -> list[Tensor]:
        return [t for t in (self.k, self.v, self.segments) if t is not None]


class VectorState(LayerState):
    """A recurrence's tensors by name, each (B, ...). Cannot be truncated: only snapshots can go back."""

    def __init__(self, **tensors: Tensor):
        self.tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def update(self, **tensors: Tensor) -> None:
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values()):
            raise RunError(
                "a decoding state was given tensors that need gradients", remedy="decode under torch.no_grad()"
            )
        for name, value in tensors.items():
            self.tensors[name].copy_(value)

    def reorder(self, indices: Tensor) -> None:
        self.tensors = {name: t[indices] for name, t in self.tensors.items()}

    def truncate(self, length: int) -> None:
        raise RunError(
            "a recurrent state cannot be truncated: it keeps no past to go back to",
            remedy="take a snapshot() before the step and restore it",
        )

    def snapshot(self) -> VectorState:
        return VectorState(**{name: t.clone() for name, t in self.tensors.items()})

    def buffers(self) -> list[Tensor]:
        return list(self.tensors.values())


@dataclass
class Room:
    """What a mixer needs to make its state: sizes, place, and the timelines shared so far."""

    batch: int
    capacity: int
    device: torch.device
    dtype: torch.dtype
    axes: int = 1
    timelines: dict[Kept | None, Timeline] = field(default_factory=dict)

    def timeline(self, kept: Kept | None = None) -> Timeline:
        """The timeline of a geometry; a ring wider than the capacity is no ring."""
        kept = None if kept is not None and kept.tokens >= self.capacity else kept
        if kept not in self.timelines:
            self.timelines[kept] = Timeline(self.batch, self.capacity, self.axes, kept, self.device)
        return self.timelines[kept]


class State:
    """A model's memory: one entry a layer (a mapping of names to layer states) and the shared timelines."""

    def __init__(self, layers: list[dict[str, Any]], room: Room, extra: dict[str, Any] | None = None):
        self.layers = layers
        self.room = room
        self.extra = extra or {}
        self.length = torch.zeros(room.batch, dtype=torch.long, device=room.device)
        self.count: int | None = 0  # tokens in every row, when all agree
        self.begun = False  # whether the virtual tokens before the rows have entered, if there are any
        self.ahead: int | None = 0  # how many they are; None when rows differ

    def start(self) -> Tensor | int:
        """Tokens seen so far: an int when all rows agree, else (B,)."""
        return self.length if self.count is None else self.count

    def advance(self, ctx: Context) -> None:
        """Tells every timeline about the tokens that this forward brings."""
        for timeline in self.room.timelines.values():
            timeline.advance(ctx)
        T = ctx.order.shape[1]
        self.length.add_(T if ctx.segments is None else (ctx.segments >= 0).sum(-1))
        self.count = self.count + T if self.count is not None and ctx.segments is None else None

    def uncount(self) -> None:
        """From here on the host counts nothing and checks no capacity: a token goes where the tensors say, in place, so
        that one graph serves every step."""
        self.count = None
        for timeline in self.room.timelines.values():
            timeline.count, timeline.even, timeline.step = None, False, None

    def begin(self, ahead: int | None) -> None:
        """The first forward has brought `ahead` virtual tokens (None: rows differ); later ones bring none."""
        if not self.begun:
            self.begun, self.ahead = True, ahead

    def check_batch(self, batch: int) -> None:
        """Raises RunError for tokens of another number of rows."""
        if batch != self.room.batch:
            raise RunError(
                f"{batch} rows of tokens for a state of {self.room.batch}", remedy=f"call model.new_state({batch}, ...)"
            )

    def reorder(self, indices: Tensor) -> None:
        """Row b becomes what row indices[b] was: (B',) int64. Beams and shared prompts."""
        for part in self._parts():
            part.reorder(indices)
        for timeline in self.room.timelines.values():
            timeline.reorder(indices)
        self.length = self.length[indices]
        self.room.batch = indices.shape[0]

    def truncate(self, length: int | Tensor) -> None:
        """Forgets every token from number `length` on, virtual ones not counted and never forgotten.

        length: for all rows, or (B,) int64, one for each. Raises RunError, and forgets nothing, where that is
        impossible.
        """
        least = int(length.min()) if isinstance(length, Tensor) else length
        if least < 0:
            raise RunError(f"a state cannot be truncated to {least} tokens", remedy="give 0 or more")
        if self.ahead is None:
            raise RunError(
                "a state whose rows begin with different numbers of virtual tokens cannot be truncated",
                remedy="take a snapshot() before the step and restore it",
            )
        length = length + self.ahead
        for timeline in self.room.timelines.values():
            timeline.check_truncate()
        most = int(length.max()) if isinstance(length, Tensor) else length
        for part in self._parts():
            part.truncate(most)
        for timeline in self.room.timelines.values():
            timeline.truncate(length)
        self.length = self.length.clamp_max(length)
        self.count = None if self.count is None or isinstance(length, Tensor) else min(self.count, length)

    def snapshot(self) -> State:
        """An independent copy."""
        room = replace(self.room, timelines={kept: line.snapshot() for kept, line in self.room.timelines.items()})

        def copy(part: Any) -> Any:
            new = part.snapshot()
            if isinstance(new, KVState):
                new.timeline = room.timelines[part.timeline.kept]
            return new

        layers = [{name: copy(part) for name, part in layer.items()} for layer in self.layers]
        state = State(layers, room, {name: copy(part) for name, part in self.extra.items()})
        state.length, state.count = self.length.clone(), self.count
        state.begun, state.ahead = self.begun, self.ahead
        return state

    def buffers(self) -> list[Tensor]:
        """Every tensor of it, in an order that equal states share."""
        times = [t for line in self.room.timelines.values() for t in (line.order, line.positions, line.length)]
        return [t for part in self._parts() for t in part.buffers()] + times + [self.length]

    def nbytes(self) -> int:
        """Bytes of what the layers remember, as allocated."""
        return sum(part.nbytes() for layer in self.layers for part in layer.values())

    def _parts(self) -> list[LayerState]:
        return [p for layer in self.layers for p in layer.values()] + list(self.extra.values())


def _rows(where: Tensor) -> Tensor:
    """The row of each slot (B,T). As an index beside the slots: compilers do that assignment in place, a scatter not."""
    return torch.arange(where.shape[0], device=where.device)[:, None]


def _last(where: Tensor, ring: bool, slots: int) -> Tensor:
    """Slots (B,T) where only the last occupant of each ring slot stays; the others go to the spare slot."""
    if not ring or where.shape[1] <= 1:
        return where
    index = torch.arange(where.shape[1], device=where.device).expand_as(where)
    newest = index.new_zeros(where.shape[0], slots + 1).scatter_reduce(1, where, index, "amax")
    return torch.where(newest.gather(1, where) == index, where, slots)
