"""What is added to q·k before the softmax: relative tables, content terms, a soft cap.

softmax(cap(scale * (q·k + inside terms) + outside terms)); distance is k_pos - q_pos.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dovetail.kernels.attention.coords import Coords


@dataclass(frozen=True)
class Toeplitz:
    """A bias that depends on the distance alone: table[h, bucket(distance)].

    table: (H, R). bucket maps integer distances (any shape) to 0..R-1. axis: position axis it reads.
    One table per axis pair (Swin's 2-D table) passes `axes=(0, 1)` and a bucket of stacked distances.
    reach: the distance from which on, either way, the bucket does not change; None where there is none.
    """

    table: Tensor
    bucket: Callable[..., Tensor]
    axes: tuple[int, ...] = (0,)
    inside_scale: bool = False
    reach: int | None = None

    @property
    def tabled(self) -> bool:
        """Whether it is a function of the distance along the first axis."""
        return self.axes == (0,)

    def along(self, distances: Tensor) -> Tensor:
        """(H,N) at distances (N,)."""
        return self.table[:, self.bucket(distances)]

    def dense(self, at: Coords) -> Tensor:
        """(B,H,T,S)."""
        index = self.bucket(*(at.distance(axis) for axis in self.axes))
        return self.table[:, index].transpose(0, 1)

    def rows(self, start: int, stop: int) -> Toeplitz:
        return self


@dataclass(frozen=True)
class Distance:
    """A bias computed from the distance, which has no end, where a table would have one (ALiBi, KERPLE, Sandwich).

    function: k_pos - q_pos (B|1,1,T,S), int64 -> (B|1,H,T,S); gradients reach what it closes over. axis: position
    axis it reads.
    """

    function: Callable[[Tensor], Tensor]
    axis: int = 0
    inside_scale: bool = False

    @property
    def tabled(self) -> bool:
        return self.axis == 0

    def along(self, distances: Tensor) -> Tensor:
        """(H,N) at distances (N,)."""
        return self.function(distances[None, None, None])[0, :, 0]

    def dense(self, at: Coords) -> Tensor:
        """(B|1,H,T,S)."""
        return self.function(at.distance(self.axis)[:, None])

    def rows(self, start: int, stop: int) -> Distance:
        return self


@dataclass(frozen=True)
class Content:
    """A term that depends on what queries or keys hold (Shaw, Transformer-XL, DeBERTa, SAM).

    compute(start, stop): the (B,H,stop-start,S) rows of the term. by_distance: (N,) k_pos - q_pos -> (H,N), where the
    term is a function of that after all and `compute` only another way to it (Sandwich).
    """

    compute: Callable[[int, int], Tensor]
    length: int
    inside_scale: bool = True
    start: int = 0
    by_distance: Callable[[Tensor], Tensor] | None = None

    @property
    def tabled(self) -> bool:
        return self.by_distance is not None

    def along(self, distances: Tensor) -> Tensor:
        """(H,N) at distances (N,)."""
        assert self.by_distance is not None
        return self.by_distance(distances)

    def dense(self, at: Coords) -> Tensor:
        return self.compute(self.start, self.start + self.length)

    def rows(self, start: int, stop: int) -> Content:
        return replace(self, length=stop - start, start=self.start + start)


@dataclass(frozen=True)
class RelativeLogits:
    """A term that depends on the query and on the distance alone (Shaw et al. 2018, eq. 4: q·a_K[d]).

    values: (B,H,T,back+ahead+1), the term of query i at distance d, clipped to [-back, ahead], at d + back. A small product,
    made and differentiated outside of the attention. axis: position axis it reads. by_key: values (B,H,S,...) is of key j
    instead (He et al. 2021, DeBERTa, eq. 4: position to content). places: a static promise that keys' positions along the
    axis are 0 to places - 1, few, as rows and columns of a grid are.
    """

    values: Tensor
    back: int
    axis: int = 0
    inside_scale: bool = True
    by_key: bool = False
    places: int | None = None
    tabled: ClassVar[bool] = False

    @property
    def ahead(self) -> int:
        return self.values.shape[3] - 1 - self.back

    def dense(self, at: Coords) -> Tensor:
        """(B,H,T,S)."""
        index = at.distance(self.axis).clamp(-self.back, self.ahead)[:, None] + self.back
        if self.by_key:
            return self.values.gather(-1, index.mT.expand(*self.values.shape[:3], -1)).mT
        return self.values.gather(-1, index.expand(*self.values.shape[:3], -1))

    def rows(self, start: int, stop: int) -> RelativeLogits:
        return self if self.by_key else replace(self, values=self.values[:, :, start:stop])


Term = Toeplitz | Distance | Content | RelativeLogits


@dataclass(frozen=True)
class Score:
    """scale: replaces 1/sqrt(D) when given. cap: soft cap c·tanh(s/c), after the terms.

    value_terms(probabilities, start, stop) -> (B,H,t,Dv) is added to the output (Shaw's second half).
    """

    terms: tuple[Term, ...] = ()
    scale: float | None = None
    cap: float | None = None
    value_terms: Callable[[Tensor, int, int], Tensor] | None = None

    @property
    def plain(self) -> bool:
        """Only a scale, if that."""
        return len(self.terms) == 0 and self.cap is None and self.value_terms is None

    @property
    def tabled(self) -> bool:
        """Nothing but terms that are functions of the distance along the first axis."""
        return all(t.tabled for t in self.terms) and self.cap is None and self.value_terms is None

    @property
    def relative(self) -> tuple[RelativeLogits, RelativeLogits | None] | None:
        """The terms of queries and of keys, where there is nothing else, both end alike, and they go by the first axis."""
        found = [t for t in self.terms if isinstance(t, RelativeLogits)]
        query, key = ([t for t in found if t.by_key is by] for by in (False, True))
        if self.cap is not None or self.value_terms is not None or len(query) != 1 or len(found) != len(self.terms):
            return None
        ends = {(t.back, t.ahead, t.axis, t.inside_scale) for t in found}
        if len(key) > 1 or len(ends) > 1 or query[0].axis or query[0].values.shape[3] == 1:
            return None
        return query[0], key[0] if key else None

    @property
    def gridded(self) -> tuple[RelativeLogits, ...]:
        """The terms, where they go by the query and few places of the keys, and there is nothing else; empty otherwise."""
        found = [t for t in self.terms if isinstance(t, RelativeLogits) and t.places is not None and not t.by_key]
        more = len(found) != len(self.terms) or self.cap is not None or self.value_terms is not None
        return () if more else tuple(found)

    def along(self, length: int, scale: float, device: torch.device) -> Tensor:
        """The terms' sum in units of the final score, (H, 2·reach+1): distance d at d + reach. `tabled` scores alone.

        reach: at most length - 1; from there on, either way, it is the same.
        """
        ends = [t.reach if isinstance(t, Toeplitz) and t.reach is not None else length - 1 for t in self.terms]
        reach = min(max(ends), length - 1)
        distances = torch.arange(-reach, reach + 1, device=device)
        tabled = [t for t in self.terms if not isinstance(t, RelativeLogits)]
        lines = [t.along(distances) * (scale if t.inside_scale else 1) for t in tabled]
        return torch.stack(lines).sum(0)

    def rows(self, start: int, stop: int) -> Score:
        values = self.value_terms
        shifted = None if values is None else (lambda p, a, b: values(p, a + start, b + start))
        return Score(tuple(t.rows(start, stop) for t in self.terms), self.scale, self.cap, shifted)

    def merged(self, other: Score | None) -> Score:
        """Both together. Two different scales or caps are refused by the caller, not here."""
        if other is None:
            return self
        return Score(
            self.terms + other.terms,
            self.scale if self.scale is not None else other.scale,
            self.cap if self.cap is not None else other.cap,
            self.value_terms or other.value_terms,
        )

    def bias(self, at: Coords, scale: float) -> Tensor | None:
        """Sum of the terms in units of the final score, (B,H,T,S), or None."""
        total: Tensor | None = None
        for term in self.terms:
            dense = term.dense(at)
            dense = dense * scale if term.inside_scale else dense
            total = dense if total is None else total + dense
        return total


def soft_cap(scores: Tensor, cap: float | None) -> Tensor:
    return scores if cap is None else cap * torch.tanh(scores / cap)
