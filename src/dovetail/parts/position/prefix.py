"""A learned prefix: keys and values of its own in front of the sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels.attention import BoundMask, Coords, Region, Score, Side
from dovetail.parts.context import Context
from dovetail.parts.position.base import NoPosition, PositionModule, adds_values, head_width, refuse_prefix
from dovetail.parts.weights import Rng
from dovetail.spec import Slot, Spec, register
from dovetail.spec.categories import PositionPart
from dovetail.spec.ranges import Count


@register(
    "position",
    "prefix",
    oracle="transformers past_key_values (peft prefix tuning)",
    source="Li and Liang 2021 (prefix tuning), eq. 3",
)
class Prefix(Spec):
    """softmax(q [P_k; k]ᵀ) [P_v; v]: `length` learned keys and values that every query sees, turned by no position.

    P_k and P_v stand beside the keys and values of `position`. The tokens stand behind the prefix: their positions
    begin at `length`.
    """

    length: Count
    position: PositionPart = NoPosition()

    def build(self, slot: Slot) -> nn.Module:
        return PrefixModule(self, slot)


def prefix_region(k: Tensor, v: Tensor, q: Tensor, mask: BoundMask | None, score: Score | None) -> Region:
    """Keys (B|1,P,G,D) and values (B|1,P,G,Dv) as a region for queries (B,H,T,D)."""
    keys, values = (t.transpose(1, 2).expand(q.shape[0], -1, -1, -1).to(q.dtype) for t in (k, v))
    return Region(keys, values, mask, score)


class PrefixModule(PositionModule):
    """k (P,G·D) and v (P,G·Dv) are a region of their own, before the regions of the position inside."""

    undecayed: ClassVar[frozenset[str]] = frozenset({"k", "v"})

    def __init__(self, spec: Prefix, slot: Slot):
        super().__init__()
        self.slot, self.length, head_dim = slot, spec.length, head_width(slot, spec.kind)
        self.position: PositionModule = slot.build(spec.position, "position")
        refuse_prefix(self.position, slot.path)
        if adds_values(self.position):
            raise BuildError(
                f"a prefix around position {spec.position.kind!r}, whose value terms an attention over regions cannot add",
                where=slot.path,
                remedy="use prompt tuning, or leave the value terms out: {kind: shaw, terms: [key]}",
            )
        self.hooks = self.position.hooks | {"regions"}  # type: ignore[misc]
        self.caches, self.axes = self.position.caches, self.position.axes  # type: ignore[misc]
        self.scales = self.position.scales  # type: ignore[misc]
        self.heads = slot.kv_heads
        self.k = nn.Parameter(torch.empty(spec.length, slot.kv_heads * head_dim))
        self.v = nn.Parameter(torch.empty(spec.length, slot.kv_heads * (slot.value_dim or head_dim)))

    def initialise(self, rng: Rng) -> None:
        for name, table in (("k", self.k), ("v", self.v)):
            self.slot.init.draw(table, "position", *table.shape, self.slot, rng(name))

    def embed_qk(self, xq: Tensor, xk: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        return self.position.embed_qk(xq, xk, self._behind(ctx))

    def rotate(self, q: Tensor, k: Tensor, at: Coords, ctx: Context) -> tuple[Tensor, Tensor]:
        return self.position.rotate(q, k, self._moved(at, ctx), ctx)

    def score(self, q: Tensor, k: Tensor, at: Coords, ctx: Context, project: Any) -> Score:
        return self.position.score(q, k, self._moved(at, ctx), ctx, project)

    def regions(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BoundMask, score: Score | None, ctx: Context
    ) -> list[Region]:
        own = None if score is None or score.cap is None else Score(cap=score.cap)

        keys, values = (table.unflatten(-1, (self.heads, -1))[None] for table in (self.k, self.v))
        return [prefix_region(keys, values, q, None, own), *self.position.regions(q, k, v, mask, score, ctx)]

    def _moved(self, at: Coords, ctx: Context) -> Coords:
        def behind(side: Side) -> Side:
            return replace(side, positions=None if side.positions is None else side.positions + self.length)

        return ctx.once(("prefix", self.length, id(at)), lambda: replace(at, q=behind(at.q), k=behind(at.k)))

    def _behind(self, ctx: Context) -> Context:
        return ctx.once(("prefix", self.length), lambda: replace(ctx, positions=ctx.positions + self.length, memo={}))
