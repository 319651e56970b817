"""ReRoPE and its kin: RoPE within a window, and beyond it as if queries and keys stood somewhere else.

Each is two plain attentions over disjoint regions, merged by their log-sum-exp: the near one is a window attention with
RoPE, the far one turns queries and keys to other positions. So keys are cached as they are.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels.attention import BoundMask, Coords, Region, Score, Side
from dovetail.kernels.rotary import turn
from dovetail.parts.context import Context
from dovetail.parts.mask import Beyond, Kept, Mask, Window, interned
from dovetail.parts.position.base import refuse_cross
from dovetail.parts.position.rotary import Rope, RopeModule
from dovetail.spec import Slot, register
from dovetail.spec.ranges import Positive


class NearAndFar(Rope):
    """Causal, and keys are cached raw. window: distances below it are RoPE's, whatever its other options; what lies
    beyond depends on the kind (`far`), and the factor of a scaling such as YaRN's on all.
    """

    window: int = 256

    def far(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where far queries and keys stand, from their positions (B,T,1) and (B,S,1); None: at 0, where nothing turns."""
        raise TypeError(f"{self.kind} does not say where far tokens stand")

    def beyond(self) -> Mask:
        """Which keys are far."""
        return Beyond(size=self.window)

    def reads(self) -> Kept | None:
        """What of the past is read; None for all of it."""
        return None

    def alike(self) -> int:
        """Tokens of the longest sequence in which every distance is RoPE's."""
        return self.window + 1

    def reach(self, trained: int) -> float:
        """Tokens of the longest sequence whose distances are all below `trained`."""
        return math.inf if self.alike() <= trained else trained

    def build(self, slot: Slot) -> nn.Module:
        refuse_cross(slot, self.kind)
        if not slot.causal:
            raise BuildError(f"{self.kind} is defined for causal attention", where=slot.path, remedy="use rope")
        if self.window < 1:
            raise BuildError(f"a {self.kind} window of {self.window}", where=slot.path, remedy="give at least 1")
        return NearAndFarModule(self, self.turned(slot), slot)


@register(
    "position",
    "rerope",
    oracle="formula: dense softmax over min(i - j, window); author's rerope_patch (bojone/rerope)",
    source="Su 2023, kexue.fm/archives/9708 (ReRoPE)",
)
class ReRope(NearAndFar):
    """RoPE whose distances stop growing at `window`: min(i - j, window) for query i and key j <= i.

    A window attention with RoPE, merged with a far attention of queries turned by `window` against keys that are
    not turned; so keys are cached raw. A window of a quarter to a half of the trained length is usual.
    """

    def far(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.full_like(q[:1, :1], self.window), None


@register(
    "position",
    "leaky_rerope",
    oracle="formula: dense softmax over piecewise distances; author's leaky_rerope_patch (bojone/rerope)",
    source="Su 2023, kexue.fm/archives/9708 (Leaky ReRoPE)",
)
class LeakyReRope(NearAndFar):
    """RoPE whose distances grow by 1/factor a token beyond `window`: d for d < window, window + (d - window)/factor.

    factor: as large as keeps the longest of these distances within the trained length, better within half of it.
    """

    factor: Positive = 16.0

    def far(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.window + (q - self.window) / self.factor, k / self.factor

    def reach(self, trained: int) -> float:
        return max(trained, self.window + (trained - 1 - self.window) * self.factor // 1 + 1)

    def build(self, slot: Slot) -> nn.Module:
        if self.factor <= 1:
            remedy = (
                "use rope" if self.factor == 1 else f"use {{kind: inverse_leaky_rerope, factor: {1 / self.factor:g}}}"
            )
            raise BuildError(f"leaky_rerope with a factor of {self.factor:g}", where=slot.path, remedy=remedy)
        return super().build(slot)


@register(
    "position",
    "inverse_leaky_rerope",
    oracle="formula: dense softmax over piecewise distances",
    source="Su 2023, kexue.fm/archives/9728 (InvLeaky ReRoPE)",
)
class InverseLeakyReRope(NearAndFar):
    """RoPE whose distances grow by `factor` a token beyond `window`: d for d < window, window + (d - window)·factor.

    For training: a model trained with it is given plain RoPE, {kind: rope}, for longer inputs, whose distances then lie
    within those it has seen, at RoPE's speed. factor: twice the growth in length that is meant; window: a quarter of
    the trained length.
    """

    window: int = 128
    factor: Positive = 16.0

    def far(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.window + (q - self.window) * self.factor, k * self.factor

    def reach(self, trained: int) -> float:
        return trained

    def build(self, slot: Slot) -> nn.Module:
        if self.factor <= 1:
            remedy = "use rope" if self.factor == 1 else f"use {{kind: leaky_rerope, factor: {1 / self.factor:g}}}"
            raise BuildError(f"inverse_leaky_rerope with a factor of {self.factor:g}", where=slot.path, remedy=remedy)
        return super().build(slot)


class NearAndFarModule(RopeModule):
    hooks: ClassVar[frozenset[str]] = frozenset({"regions"})

    def __init__(self, spec: NearAndFar, dim: int, slot: Slot):
        super().__init__(spec, dim, slot)
        self.said, self.window, self.caches = spec, spec.window, "raw"  # type: ignore[misc]
        self.kept = spec.reads()
        self.near, self.beyond = interned(Window(size=spec.window)), interned(spec.beyond())

    def rotate(self, q: Tensor, k: Tensor, at: Coords, ctx: Context) -> tuple[Tensor, Tensor]:
        return q, k

    def regions(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BoundMask, score: Score | None, ctx: Context
    ) -> list[Region]:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        near_q, near_k = super().rotate(q, k, mask.at, ctx)
        at_q, at_k = self.moved(mask.at)
        far_q = turn(q, *self.tables(at_q, q.dtype, mask.at.k), self.rope.layout)
        far_k = k if at_k is None else turn(k, *self.tables(at_k, k.dtype, mask.at.k), self.rope.layout)
        return [
            Region(near_k.transpose(1, 2), v, ctx.narrowed(mask, self.near), score, near_q.transpose(1, 2)),
            Region(far_k.transpose(1, 2), v, ctx.narrowed(mask, self.beyond), score, far_q.transpose(1, 2)),
        ]

    def moved(self, at: Coords) -> tuple[Side, Side | None]:
        """Where far queries and keys stand; None where keys are not turned. One for all layers of equal positions."""
        key = ("far", *self.key)
        if key not in at.memo:
            assert at.q.positions is not None and at.k.positions is not None
            q, k = self.said.far(at.q.positions[..., :1], at.k.positions[..., :1])
            if k is None and self.scaling is not None:  # its factor on cos and sin belongs to keys that stand at 0 too
                k = torch.zeros_like(at.k.positions[:1, :1, :1])
            at.memo[key] = Side(at.q.order, None, q), None if k is None else Side(at.k.order, None, k)
        return at.memo[key]
