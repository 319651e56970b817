"""Absolute positions, added to the token vectors."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.parts.context import Context
from dovetail.parts.position.base import PositionModule
from dovetail.parts.weights import Lookup
from dovetail.spec import Slot, Spec, register


@register(
    "position",
    "learned",
    oracle="transformers gpt2 wpe, bart embed_positions",
    source="Gehring et al. 2017; Radford et al. 2018",
)
class Learned(Spec):
    """A learned vector for each position. length: rows (the model's context unless given).

    offset: rows skipped at the start of the table (BART stores two unused ones).
    """

    length: int | None = None
    offset: int = 0

    def build(self, slot: Slot) -> nn.Module:
        length = self.length or slot.context
        if length is None:
            raise BuildError(
                "a learned position table without a length",
                where=slot.path,
                remedy="give length, or the model's context",
            )
        return LearnedModule(length, self.offset, slot)


class LearnedModule(PositionModule):
    hooks: ClassVar[frozenset[str]] = frozenset({"embed"})

    def __init__(self, length: int, offset: int, slot: Slot):
        super().__init__()
        self.length, self.offset = length, offset
        self.table = Lookup(length + offset, slot.dim, slot=slot, role="position")

    def embed(self, x: Tensor, ctx: Context) -> Tensor:
        return x + self.table(ctx.positions[..., 0] + self.offset).to(x.dtype)


@register(
    "position",
    "sinusoidal",
    oracle="formula: PE(p,2i)=sin(p/base^(2i/d)); transformers marian",
    source="Vaswani et al. 2017, section 3.5",
)
class Sinusoidal(Spec):
    """Sines and cosines of geometrically spaced frequencies.

    layout: "interleaved" puts sin and cos side by side (the paper), "half" all sines first (tensor2tensor).
    """

    base: float = 10_000.0
    layout: Literal["interleaved", "half"] = "interleaved"

    def build(self, slot: Slot) -> nn.Module:
        if slot.dim % 2:
            raise BuildError(
                f"sinusoidal position needs an even width, not {slot.dim}", where=slot.path, remedy="choose an even dim"
            )
        return SinusoidalModule(self, slot.dim)


class SinusoidalModule(PositionModule):
    hooks: ClassVar[frozenset[str]] = frozenset({"embed"})

    def __init__(self, spec: Sinusoidal, dim: int):
        super().__init__()
        self.dim, self.base, self.layout = dim, spec.base, spec.layout

    def embed(self, x: Tensor, ctx: Context) -> Tensor:
        half = torch.arange(0, self.dim, 2, device=x.device, dtype=torch.float32)
        angle = ctx.positions[..., :1].float() * torch.exp(-math.log(self.base) / self.dim * half)
        pair = (angle.sin(), angle.cos())
        table = torch.stack(pair, -1).flatten(-2) if self.layout == "interleaved" else torch.cat(pair, -1)
        return x + table.to(x.dtype)
