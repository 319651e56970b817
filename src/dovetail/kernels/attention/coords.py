"""Where queries and keys stand, and a mask rule bound to them.

B batch, T queries, S keys, A position axes. `order` is what masks compare; `segments` tells
documents apart (negative: padding); `positions` is what encodings read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Side:
    """One side of attention: order (B,N) int64, segments (B,N) int64 or None, positions (B,N,A) or None."""

    order: Tensor
    segments: Tensor | None = None
    positions: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # tables of these positions

    def rows(self) -> Side:
        """As queries: a trailing axis to broadcast against keys."""
        return Side(self.order[..., :, None], None if self.segments is None else self.segments[..., :, None])

    def columns(self) -> Side:
        """As keys: an axis before the last to broadcast against queries."""
        return Side(self.order[..., None, :], None if self.segments is None else self.segments[..., None, :])

    def slice(self, start: int, stop: int) -> Side:
        def cut(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[:, start:stop]

        return Side(self.order[:, start:stop], cut(self.segments), cut(self.positions))


@dataclass(frozen=True)
class Coords:
    """Both sides. `aligned` is a static promise: same tokens on both sides, order 0..T-1, one segment.

    in_step: a static promise that positions have one axis, along which they are as far apart as in order.
    """

    q: Side
    k: Side
    aligned: bool = False
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # masks over these coordinates
    in_step: bool = False

    def distance(self, axis: int = 0) -> Tensor:
        """k_pos - q_pos along one position axis, (B,T,S)."""
        assert self.q.positions is not None and self.k.positions is not None
        return self.k.positions[:, None, :, axis] - self.q.positions[:, :, None, axis]


class Span(NamedTuple):
    """Query i sees key j where -after <= i - j <= before; None is no bound. sinks: keys j < sinks are not too far back.
    apart: nor are keys seen of another segment than one's own, or of a negative one. step: only keys a multiple of `step`
    away."""

    before: int | None = None
    after: int | None = None
    sinks: int = 0
    apart: bool = False
    step: int = 1

    def both(self, other: Span) -> Span | None:
        """What both see, or None where that is no span."""
        after = (
            other.after if self.after is None else self.after if other.after is None else min(self.after, other.after)
        )
        if self.before is None or other.before is None:
            back = other if self.before is None else self
        else:
            back, wider = (self, other) if self.before <= other.before else (other, self)
            if back.sinks > wider.sinks:
                return None
        return Span(back.before, after, back.sinks, self.apart or other.apart, math.lcm(self.step, other.step))

    def either(self, other: Span) -> Span | None:
        """What one of them sees, or None where that is no span."""
        if (self.after, *self[3:]) != (other.after, *other[3:]):
            return None
        if self.before is None or other.before is None:
            return Span(None, self.after, 0, *self[3:])
        return Span(max(self.before, other.before), self.after, max(self.sinks, other.sinks), *self[3:])

    @staticmethod
    def of_all(spans: Iterable[Span | None]) -> Span | None:
        """What all of them see; None where one, or that, is no span."""
        return functools.reduce(lambda a, b: None if a is None or b is None else a.both(b), spans, Span())

    @staticmethod
    def of_any(spans: Iterable[Span | None]) -> Span | None:
        """What any of them (one or more) sees; None where one, or that, is no span."""
        return functools.reduce(lambda a, b: None if a is None or b is None else a.either(b), spans)


class Rule(Protocol):
    """What a mask is to a kernel: an elementwise test, and static facts. span: as a band of distances, where it is one."""

    def allowed(self, q: Side, k: Side) -> Tensor: ...

    def is_full(self) -> bool: ...

    def is_causal(self) -> bool: ...

    def span(self) -> Span | None: ...


@dataclass(frozen=True)
class Both:
    """Two rules at once. Plain, because forwards make it, compiled ones too."""

    a: Rule
    b: Rule

    def allowed(self, q: Side, k: Side) -> Tensor:
        return self.a.allowed(q, k) & self.b.allowed(q, k)

    def is_full(self) -> bool:
        return self.a.is_full() and self.b.is_full()

    def is_causal(self) -> bool:
        return (self.a.is_causal() and self.b.is_full()) or (self.a.is_full() and self.b.is_causal())

    def span(self) -> Span | None:
        a, b = self.a.span(), self.b.span()
        return None if a is None or b is None else a.both(b)


@dataclass(frozen=True)
class Ahead:
    """Keys of negative order, which every query sees unless their segment is negative, and `rule` for the others.

    missing: a static fact, whether some of them have a negative segment.
    """

    rule: Rule
    missing: bool = False

    def allowed(self, q: Side, k: Side) -> Tensor:
        ahead = k.order < 0
        seen = ahead & (k.segments >= 0) if self.missing and k.segments is not None else ahead
        return seen | (~ahead & self.rule.allowed(q, k))

    def is_full(self) -> bool:
        return not self.missing and self.rule.is_full()

    def is_causal(self) -> bool:
        return False

    def span(self) -> Span | None:
        return None


@dataclass(frozen=True)
class BoundMask:
    """A rule over coordinates. Built once a forward and shared by the layers that use it."""

    rule: Rule
    at: Coords
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def full(self) -> bool:
        """Statically known to hide nothing."""
        return self.rule.is_full()

    @property
    def causal(self) -> bool:
        """Statically known to be the plain lower triangle (top-left aligned)."""
        return self.at.aligned and self.rule.is_causal()

    def dense(self) -> Tensor:
        """(B|1, 1, T, S) bool, True where a query may see a key."""
        if "dense" not in self.memo:
            seen = self.rule.allowed(self.at.q.rows(), self.at.k.columns())
            shape = (seen.shape[0], self.at.q.order.shape[1], self.at.k.order.shape[1])
            self.memo["dense"] = seen.expand(shape)[:, None]
        return self.memo["dense"]

    def counts(self, band: int = 1024) -> Tensor:
        """(B|1, T) int64: how many keys each query sees. Memory O(band · S), and less for a plain triangle."""
        order, T = self.at.q.order, self.at.q.order.shape[1]
        if self.causal:
            return order + 1
        if band >= T:
            return self.dense()[:, 0].sum(-1)
        return torch.cat([self.rows(a, min(a + band, T)).dense()[:, 0].sum(-1) for a in range(0, T, band)], 1)

    def rows(self, start: int, stop: int, first: int = 0, last: int | None = None) -> BoundMask:
        """The mask of queries start..stop alone, and of the keys first..last."""
        keys = self.at.k if last is None else self.at.k.slice(first, last)
        return BoundMask(self.rule, Coords(self.at.q.slice(start, stop), keys))

    def mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """FlexAttention's mask_mod(b, h, q_idx, kv_idx) over the same rule."""
        q, k, rule = self.at.q, self.at.k, self.rule

        def at(side: Side, b: Tensor, i: Tensor) -> Side:
            rows = side.order.shape[0]
            row = b if rows > 1 else torch.zeros_like(b)
            return Side(side.order[row, i], None if side.segments is None else side.segments[row, i])

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return rule.allowed(at(q, b, q_idx), at(k, b, kv_idx))

        return mask_mod

    def tiles(self, block: int = 128) -> Tensor:
        """(B|1, ceil(T/block), ceil(S/block)) bool: the tiles that hold anything at all.

        Memory is O(block * S): one band of queries at a time.
        """
        T, S = self.at.q.order.shape[1], self.at.k.order.shape[1]
        bands = []
        for start in range(0, T, block):
            seen = self.rows(start, min(start + block, T)).dense()[:, 0].any(1)
            padded = torch.nn.functional.pad(seen, (0, -S % block))
            bands.append(padded.unflatten(-1, (-1, block)).any(-1))
        return torch.stack(bands, 1)
