"""How the scores of one query become the weights of its keys: a softmax, one that knows how many there are, relu², laplace.

Used by the gated attention unit, where the choice was studied (Su 2022, kexue.fm/archives/9019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels import laplace, squared_relu
from dovetail.kernels.attention import (
    BoundMask,
    Content,
    Coords,
    Region,
    Score,
    Term,
    attend,
    attend_regions,
    plan,
)
from dovetail.kernels.plan import Plan
from dovetail.spec import Slot, Spec, register
from dovetail.spec.ranges import Count


class Normaliser(nn.Module):
    """Base: the plain softmax. B batch, H heads, T queries, S keys."""

    adds_values: ClassVar[bool] = True  # whether a score's value terms reach the output

    def prepare(self, q: Tensor, score: Score | None, mask: BoundMask) -> tuple[Tensor, Score | None]:
        """q (B,H,T,D) and the score's terms, before the keys are split into regions."""
        return q, score

    def mix(self, parts: Sequence[Region], q: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
        """Weighted values (B,H,T,Dv) over disjoint regions; one region is the usual attention."""
        if len(parts) == 1 and parts[0].q is None:
            part = parts[0]
            return attend(q, part.k, part.v, mask=part.mask, score=part.score, scale=scale, dropout=dropout)
        return attend_regions(parts, q, scale=scale)

    def plan(
        self,
        device: str,
        dtype: torch.dtype,
        queries: int,
        width: int,
        mask: BoundMask,
        score: Score | None,
        dropout: float,
    ) -> Plan:
        """Which kernel `mix` would run, and why."""
        return plan(device=device, dtype=dtype, queries=queries, width=width, mask=mask, score=score, dropout=dropout)


@register("normaliser", "softmax", oracle="torch.softmax", source="Vaswani et al. 2017, eq. 1")
class Softmax(Spec):
    """softmax(scores)."""

    def build(self, slot: Slot) -> nn.Module:
        return Normaliser()


@register(
    "normaliser",
    "softmax_plus",
    oracle="formula: softmax(log(n)/log(base) · scores); JunnYu/GAU-alpha-pytorch attention_normalize",
    source="Su 2021, kexue.fm/archives/8823 (entropy invariance); 2022, kexue.fm/archives/9019",
)
class SoftmaxPlus(Spec):
    """softmax(log(n)/log(base) · scores) for a query that sees n keys, so that its attention stays as sharp as n grows.

    base: the length at which nothing changes. least: n counts as at least this (bert4keras takes 16, because very few
    keys make a very flat softmax).
    """

    base: Count = 512
    least: Count = 1

    def build(self, slot: Slot) -> nn.Module:
        if self.base < 2:
            raise BuildError("a base of 1, whose logarithm is 0", where=slot.path, remedy="give the trained length")
        return SoftmaxPlusModule(self)


class SoftmaxPlusModule(Normaliser):
    def __init__(self, spec: SoftmaxPlus):
        super().__init__()
        self.base, self.least = spec.base, spec.least

    def prepare(self, q: Tensor, score: Score | None, mask: BoundMask) -> tuple[Tensor, Score | None]:
        wide = torch.promote_types(q.dtype, torch.float32)
        key = ("softmax_plus", self.base, self.least, wide)
        if key not in mask.memo:
            mask.memo[key] = mask.counts().clamp_min(self.least).to(wide).log()[:, None, :, None] / math.log(self.base)
        factor = mask.memo[key]  # (B|1,1,T,1)
        if score is not None and len(score.terms):
            score = replace(score, terms=tuple(_times(term, factor, mask.at) for term in score.terms))
        return q * factor.to(q.dtype), score


@register(
    "normaliser",
    "relu2",
    oracle="formula: relu(scores)² / length",
    source="Hua et al. 2022 (FLASH), section 3.1; Su 2022, kexue.fm/archives/8934 (1/(n s))",
)
class SquaredReluWeights(Spec):
    """relu(scores)² / length: no competition between keys. length: the trained one unless given, whatever a row's is.

    With scores qk/√s that is relu(qk)²/(n s).
    """

    length: Count | None = None

    def build(self, slot: Slot) -> nn.Module:
        length = self.length or slot.context
        if length is None:
            raise BuildError(
                "relu² weights are divided by the trained length, which nobody says",
                where=slot.path,
                remedy="give length, or the model's context",
            )
        return SquaredReluModule(length)


class Summed(Normaliser):
    """Base of normalisers without a competition between keys: regions simply add up."""

    adds_values: ClassVar[bool] = False

    def weighted(self, part: Region, q: Tensor, scale: float, dropout: float) -> Tensor:
        """Weighted values (B,H,T,Dv) of one region."""
        raise TypeError(f"{type(self).__name__} does not say its weights")

    def mix(self, parts: Sequence[Region], q: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
        total: Tensor | None = None
        for part in parts:
            one = self.weighted(part, q if part.q is None else part.q, scale, dropout)
            total = one if total is None else total + one
        assert total is not None
        return total


class SquaredReluModule(Summed):
    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def weighted(self, part: Region, q: Tensor, scale: float, dropout: float) -> Tensor:
        known = {"mask": part.mask, "score": part.score, "scale": scale, "dropout": dropout}
        return squared_relu.squared_relu(q, part.k, part.v, count=self.length, **known)

    def plan(
        self,
        device: str,
        dtype: torch.dtype,
        queries: int,
        width: int,
        mask: BoundMask,
        score: Score | None,
        dropout: float,
    ) -> Plan:
        return squared_relu.plan()


@register(
    "normaliser",
    "laplace",
    oracle="transformers LaplaceActivation; golden: lucidrains/FLASH-pytorch GAU(laplace_attn_fn=True)",
    source="Ma et al. 2022 (MEGA), eq. 14 and section 3.2; facebookresearch/mega element_attention",
)
class LaplaceWeights(Spec):
    """½ (1 + erf((scores - μ) / (σ√2))), μ = √½, σ = 1/(2√π): no competition between keys, and no weight above 1.

    q·k, and what a position adds to it before the scale, is divided by how many keys the query sees; by `length` where
    that is given. (MEGA does not scale by 1/√s besides: the mixer's scale is 1 there.)
    """

    length: Count | None = None

    def build(self, slot: Slot) -> nn.Module:
        return LaplaceModule(self.length)


class LaplaceModule(Summed):
    def __init__(self, length: int | None):
        super().__init__()
        self.length = length

    def prepare(self, q: Tensor, score: Score | None, mask: BoundMask) -> tuple[Tensor, Score | None]:
        wide = torch.promote_types(q.dtype, torch.float32)
        key = ("laplace", self.length, wide)
        if key not in mask.memo:
            keys = mask.counts().clamp_min(1) if self.length is None else torch.full_like(mask.at.q.order, self.length)
            mask.memo[key] = keys.to(wide).reciprocal()[:, None, :, None]
        factor = mask.memo[key]  # (B|1,1,T,1)
        if score is not None and any(term.inside_scale for term in score.terms):
            terms = (_times(t, factor, mask.at) if t.inside_scale else t for t in score.terms)
            score = replace(score, terms=tuple(terms))
        return q * factor.to(q.dtype), score

    def weighted(self, part: Region, q: Tensor, scale: float, dropout: float) -> Tensor:
        return laplace.laplace(q, part.k, part.v, mask=part.mask, score=part.score, scale=scale, dropout=dropout)

    def plan(
        self,
        device: str,
        dtype: torch.dtype,
        queries: int,
        width: int,
        mask: BoundMask,
        score: Score | None,
        dropout: float,
    ) -> Plan:
        return laplace.plan()


def _times(term: Term, factor: Tensor, at: Coords) -> Content:
    """A term of the score times a factor (B|1,1,T,1) of each query."""

    def compute(start: int, stop: int) -> Tensor:
        rows = Coords(at.q.slice(start, stop), at.k)
        return term.rows(start, stop).dense(rows) * factor[:, :, start:stop]

    return Content(compute, factor.shape[2], term.inside_scale)
