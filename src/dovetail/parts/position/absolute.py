"""Absolute positions, added to the token vectors."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError, DataError
from dovetail.parts.context import Context
from dovetail.parts.position.base import PositionModule, Vectors, check_hooks, check_vectors
from dovetail.parts.weights import Lookup
from dovetail.spec import Slot, Spec, register
from dovetail.spec.categories import PositionPart
from dovetail.spec.ranges import Count, Natural, Positive


@register(
    "position",
    "learned",
    oracle="transformers gpt2 wpe, bart embed_positions",
    source="Gehring et al. 2017; Radford et al. 2018",
)
class Learned(Spec):
    """x + W[i] at position i, W learned.

    length: rows of W (the model's context unless given). offset: rows skipped at its start (BART stores two unused
    ones).
    """

    length: Count | None = None
    offset: Natural = 0

    def build(self, slot: Slot) -> nn.Module:
        length = self.length or slot.context
        if length is None:
            raise BuildError(
                "a learned position table without a length",
                where=slot.path,
                remedy="give length, or the model's context",
            )
        return LearnedModule(length, self.offset, slot)


class LearnedModule(Vectors):
    def __init__(self, length: int, offset: int, slot: Slot):
        super().__init__()
        self.limit, self.offset, self.path = length, offset, slot.path
        self.table = Lookup(length + offset, slot.dim, slot=slot, role="position")

    def vectors(self, x: Tensor, ctx: Context, state: Any = None) -> Tensor:
        self._check(ctx.positions)
        return self.table(ctx.positions[..., 0] + self.offset).to(x.dtype)

    def _check(self, positions: Tensor) -> None:
        """Raises DataError beyond the table. Only memory that the host can read is asked; compiled code does not ask.

        Elsewhere the model's state bounds what it decodes (`new_state`), and torch's own lookup asserts.
        """
        assert self.limit is not None
        if positions.device.type != "cpu" or torch.compiler.is_compiling() or not positions.numel():
            return
        far = int(positions[..., 0].max())
        if far >= self.limit:
            raise DataError(
                f"position {far} is beyond the learned table, which ends at {self.limit - 1}",
                where=self.path,
                remedy=f"give at most {self.limit} tokens a row, or a model with a larger context",
            )


@register(
    "position",
    "sinusoidal",
    oracle="formula: PE(p,2i)=sin(p/base^(2i/d)); transformers marian",
    source="Vaswani et al. 2017, section 3.5",
)
class Sinusoidal(Spec):
    """x + p with p[2m] = sin(i·base^(-2m/C)) and p[2m + 1] = cos(i·base^(-2m/C)) at position i.

    layout: "interleaved" puts sin and cos side by side (the paper), "half" all sines first (tensor2tensor).
    axes: position axes; each takes an equal share of the width, in order (DETR: rows, then columns).
    """

    base: Positive = 10_000.0
    layout: Literal["interleaved", "half"] = "interleaved"
    axes: int = 1

    def build(self, slot: Slot) -> nn.Module:
        if self.axes < 1 or slot.dim % (2 * self.axes):
            raise BuildError(
                f"sinusoidal position needs pairs for {self.axes} axes, not a width of {slot.dim}",
                where=slot.path,
                remedy=f"choose a multiple of {2 * max(self.axes, 1)}",
            )
        return SinusoidalModule(self, slot.dim)


class SinusoidalModule(Vectors):
    def __init__(self, spec: Sinusoidal, dim: int):
        super().__init__()
        self.dim, self.base, self.layout = dim // spec.axes, spec.base, spec.layout
        self.axes = spec.axes  # type: ignore[misc]

    def vectors(self, x: Tensor, ctx: Context, state: Any = None) -> Tensor:
        if ctx.positions.shape[-1] < self.axes:
            raise DataError(
                f"positions with {ctx.positions.shape[-1]} axes for a sinusoidal encoding of {self.axes}",
                remedy=f"give positions (batch, length, {self.axes})",
            )
        half = torch.arange(0, self.dim, 2, device=x.device, dtype=torch.float32)
        positions = ctx.positions[..., : self.axes, None].float()
        angle = positions * torch.exp(-math.log(self.base) / self.dim * half)  # (B,T,axes,dim/2)
        pair = (angle.sin(), angle.cos())
        table = torch.stack(pair, -1).flatten(-2) if self.layout == "interleaved" else torch.cat(pair, -1)
        return table.flatten(-2).to(x.dtype)


@register("position", "added", oracle="transformers detr", source="Carion et al. 2020 (DETR), appendix A.3")
class Added(Spec):
    """q = (x + p) W_q, k = (x + p) W_k and v = x W_v: positions p added in every layer, and never to values.

    query: for queries. key: for keys, which in cross-attention stand at the memory's positions; `query` unless given.
    Both are a vector for each position: learned (DETR's object queries, shared by refs), sinusoidal, floater.
    """

    query: PositionPart = Sinusoidal()
    key: PositionPart | None = None

    def build(self, slot: Slot) -> nn.Module:
        return AddedModule(self, slot)


class AddedModule(PositionModule):
    hooks: ClassVar[frozenset[str]] = frozenset({"embed_qk"})

    def __init__(self, spec: Added, slot: Slot):
        super().__init__()
        self.query: PositionModule = slot.build(spec.query, "query")
        self.key: PositionModule = self.query
        check_hooks(self.query, frozenset({"embed"}), spec.query.kind, f"{slot.path}.query")
        check_vectors(self.query, spec.query.kind, f"{slot.path}.query")
        if spec.key is not None:
            self.key = slot.build(spec.key, "key", dim=slot.dim if slot.memory_dim is None else slot.memory_dim)
            check_hooks(self.key, frozenset({"embed"}), spec.key.kind, f"{slot.path}.key")
            check_vectors(self.key, spec.key.kind, f"{slot.path}.key")
        self.axes = self.query.axes  # type: ignore[misc]

    def embed_qk(self, xq: Tensor, xk: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        own = xk is xq
        if own and self.key is self.query:
            both = self.query.embed(xq, ctx)
            return both, both
        return self.query.embed(xq, ctx), self.key.embed(xk, ctx if own else ctx.of_memory())
