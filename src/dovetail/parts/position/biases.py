"""Biases that depend on the distance alone, without a table in which it would end: ALiBi, KERPLE, Sandwich."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels.attention import Content, Coords, Distance, Score, Side
from dovetail.parts.context import Context
from dovetail.parts.position.base import PositionModule, refuse_cross
from dovetail.parts.position.waves import in_full, waves
from dovetail.parts.weights import Rng
from dovetail.spec import Slot, Spec, register
from dovetail.spec.ranges import Count, Positive


class BiasModule(PositionModule, ABC):
    """Base: `bias` of the distance, added to the scaled scores."""

    hooks: ClassVar[frozenset[str]] = frozenset({"score"})
    tabled: ClassVar[bool] = True

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads

    @abstractmethod
    def bias(self, away: Tensor) -> Tensor:
        """|i - j| (B|1,1,T,S), in fp32 or better -> (B|1,H,T,S)."""

    def score(self, q: Tensor, k: Tensor, at: Coords, ctx: Context, project: Callable[..., Any]) -> Score:
        wide = torch.promote_types(q.dtype, torch.float32)
        return Score((Distance(lambda distance: self.bias(distance.abs().to(wide))),))


@register(
    "position",
    "alibi",
    oracle="transformers bloom, mpt",
    source="Press et al. 2022 (ALiBi), section 3; slopes of other head counts: the authors' code",
    endless=True,
)
class Alibi(Spec):
    """-slope · |i - j|, one slope for each head and nothing learned.

    n heads, a power of two, have the slopes 2^(-max_bias·h/n), h = 1..n. Other counts take those of the power of two
    below, then every other one of the power above.
    """

    max_bias: Positive = 8.0

    def build(self, slot: Slot) -> nn.Module:
        refuse_cross(slot, self.kind)
        return AlibiModule(self, slot)


class AlibiModule(BiasModule):
    def __init__(self, spec: Alibi, slot: Slot):
        super().__init__(slot.heads)
        self.max_bias = spec.max_bias

    def slopes(self, like: Tensor) -> Tensor:
        """(H,) in the type and on the device of `like`."""
        below = 2 ** (self.heads.bit_length() - 1)
        h = torch.arange(1, self.heads + 1, device=like.device, dtype=like.dtype)
        share = torch.where(h <= below, h / below, (2 * (h - below) - 1) / (2 * below))
        return torch.exp2(-self.max_bias * share)

    def bias(self, away: Tensor) -> Tensor:
        return -self.slopes(away)[:, None, None] * away


@register(
    "position",
    "kerple",
    oracle="golden: chijames/KERPLE megatron/mpu/layers.py",
    source="Chi et al. 2022 (KERPLE), section 4: the power and the logarithmic kernel; start of the authors' code",
    endless=True,
)
class Kerple(Spec):
    """Kernels of the distance with two learned numbers a head: -r1 · log(1 + r2·|i - j|), or -r1 · |i - j|^r2.

    form: "log" or "power". Both numbers are positive and the power at most 2 whatever the optimiser does: learned are
    log r1, and log r2 or logit(r2 / 2). (The authors clamp them.) They start uniform: r1 in (0, 2) and r2 in (0, 1)
    for log, the other way round for power, both from 0.01.
    """

    form: Literal["log", "power"] = "log"

    def build(self, slot: Slot) -> nn.Module:
        refuse_cross(slot, self.kind)
        return KerpleModule(self, slot)


class KerpleModule(BiasModule):
    def __init__(self, spec: Kerple, slot: Slot):
        super().__init__(slot.heads)
        self.form = spec.form
        self.r1, self.r2 = nn.Parameter(torch.empty(slot.heads)), nn.Parameter(torch.empty(slot.heads))

    def initialise(self, rng: Rng) -> None:
        last = {"log": (2.0, 1.0), "power": (1.0, 2.0)}[self.form]
        drawn = [
            torch.empty_like(p).uniform_(0.01, end, generator=rng(name))
            for name, p, end in zip(("r1", "r2"), (self.r1, self.r2), last, strict=True)
        ]
        self.set(*drawn)

    def set(self, r1: Tensor, r2: Tensor) -> None:
        """Makes these (H,) the numbers of the formula. r1, r2 > 0; r2 < 2 for a power."""
        with torch.no_grad():
            self.r1.copy_(r1.log())
            self.r2.copy_(r2.log() if self.form == "log" else torch.logit((r2 / 2).clamp(max=1 - 1e-4)))

    def bias(self, away: Tensor) -> Tensor:
        first, second = (r.to(away.dtype)[:, None, None] for r in (self.r1, self.r2))
        if self.form == "log":
            return -first.exp() * torch.log1p(second.exp() * away)
        return -first.exp() * away.pow(2 * second.sigmoid())


@register(
    "position",
    "sandwich",
    oracle="formula: the sum of cosines, in fp64",
    source="Chi et al. 2023 (Sandwich), section 5; compression of the heads: the listing in the appendix",
    endless=True,
)
class Sandwich(Spec):
    """What sinusoidal embeddings of two positions have in common: (H / 8h) · sum of cos((i - j) / 10,000^(2n/width)).

    The sum is over n = 0 .. width/2 - 1; h = 1..H counts the heads, so that later ones are compressed. Nothing learned.
    Its value at distance 0 is taken off: a softmax does not notice, and near keys are not rounded in bf16.
    """

    width: Count = 128

    def build(self, slot: Slot) -> nn.Module:
        refuse_cross(slot, self.kind)
        if self.width % 2:
            raise BuildError(
                f"a sandwich of width {self.width}", where=slot.path, remedy="give an even one: its entries are pairs"
            )
        return SandwichModule(self, slot)


class SandwichModule(PositionModule):
    hooks: ClassVar[frozenset[str]] = frozenset({"score"})
    tabled: ClassVar[bool] = True

    def __init__(self, spec: Sandwich, slot: Slot):
        super().__init__()
        self.heads, self.width = slot.heads, spec.width

    def score(self, q: Tensor, k: Tensor, at: Coords, ctx: Context, project: Callable[..., Any]) -> Score:
        """cos(i - j) = cos i cos j + sin i sin j: a product of vectors, as in the sinusoidal embeddings themselves."""
        wide = torch.promote_types(q.dtype, torch.float32)
        queries, keys = (torch.cat(waves(side, self.width, wide), -1)[:, None] for side in (at.q, at.k))
        ratio = torch.arange(1, self.heads + 1, device=q.device, dtype=wide) * (8 / self.heads)

        def compute(start: int, stop: int) -> Tensor:
            return (in_full(queries[:, :, start:stop], keys.mT) - self.width // 2) / ratio[:, None, None]

        def by_distance(distance: Tensor) -> Tensor:
            at = Side(distance[None], None, distance[None, :, None])
            return (waves(at, self.width, wide)[0][0].sum(-1) - self.width // 2) / ratio[:, None]

        return Score((Content(compute, q.shape[1], inside_scale=False, by_distance=by_distance),))
