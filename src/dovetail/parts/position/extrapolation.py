"""Positions that reach beyond the trained length by splitting the keys into regions."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels.attention import BoundMask, Coords, Region, Score, Side
from dovetail.parts.context import Context
from dovetail.parts.mask import Beyond, Window, interned
from dovetail.parts.position.base import refuse_cross
from dovetail.parts.position.rotary import Rope, RopeModule, turn
from dovetail.spec import Slot, register


@register(
    "position",
    "rerope",
    oracle="formula: dense softmax over min(i - j, window)",
    source="Su 2023, kexue.fm/archives/9708 (ReRoPE)",
)
class ReRope(Rope):
    """RoPE whose distances stop growing at `window`: min(i - j, window) for query i and key j <= i.

    A window attention with RoPE, merged with a far attention of queries turned by `window` against keys that are
    not turned; so keys are cached raw.
    """

    window: int = 256

    def build(self, slot: Slot) -> nn.Module:
        refuse_cross(slot, self.kind)
        if not slot.causal:
            raise BuildError("ReRoPE is defined for causal attention", where=slot.path, remedy="use rope")
        if self.window < 1:
            raise BuildError(f"a ReRoPE window of {self.window}", where=slot.path, remedy="give at least 1")
        return ReRopeModule(self, self.turned(slot), slot)


class ReRopeModule(RopeModule):
    hooks: ClassVar[frozenset[str]] = frozenset({"regions"})

    def __init__(self, spec: ReRope, dim: int, slot: Slot):
        super().__init__(spec, dim, slot)
        self.window, self.caches = spec.window, "raw"  # type: ignore[misc]
        self.near, self.far = interned(Window(size=spec.window)), interned(Beyond(size=spec.window))

    def rotate(self, q: Tensor, k: Tensor, at: Coords, ctx: Context) -> tuple[Tensor, Tensor]:
        return q, k

    def regions(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BoundMask, score: Score | None, ctx: Context
    ) -> list[Region]:
        near_q, near_k = super().rotate(q.transpose(1, 2), k.transpose(1, 2), mask.at, ctx)
        reach = ctx.once(("rerope", self.window), lambda: self._side(self.window, q.device))
        far_q = turn(q.transpose(1, 2), *self.tables(reach, q.dtype, mask.at.k), self.rope.layout)
        if self.scaling is not None:  # its factor on cos and sin belongs to far keys too, which stand at 0
            origin = ctx.once(("rerope", 0), lambda: self._side(0, q.device))
            k = turn(k.transpose(1, 2), *self.tables(origin, k.dtype, mask.at.k), self.rope.layout).transpose(1, 2)
        return [
            Region(near_k.transpose(1, 2), v, ctx.narrowed(mask, self.near), score, near_q.transpose(1, 2)),
            Region(k, v, ctx.narrowed(mask, self.far), score, far_q.transpose(1, 2)),
        ]

    @staticmethod
    def _side(position: int, device: torch.device) -> Side:
        """One token that stands at `position`."""
        order = torch.full((1, 1), position, device=device)
        return Side(order, None, order[..., None])
