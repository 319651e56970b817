"""RoPE: queries and keys turned by their position, so that q·k depends on the distance alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels.attention import Coords, Side
from dovetail.kernels.cos_sin import cos_sin
from dovetail.kernels.rotary import Turning, turn
from dovetail.parts.context import Context
from dovetail.parts.position.base import PositionModule, head_width
from dovetail.parts.position.scaling import RopeScaling
from dovetail.parts.state import FAR
from dovetail.spec import Slot, Spec, register
from dovetail.spec.categories import RopeScalingPart
from dovetail.spec.ranges import Positive, Share


@register("position", "rope", oracle="transformers llama apply_rotary_pos_emb", source="Su et al. 2021, eq. 15 and 34")
class Rope(Spec):
    """Pair m of q and k at position i turned by the angle i·theta^(-2m/d), d entries in all: q·k depends on i - j alone.

    theta: base of the frequencies. layout: "half" pairs entry i with i + D/2 (transformers), "interleaved"
    pairs 2i with 2i + 1 (Meta, RoFormer). width: share of the head that is turned (the first entries).
    scaling: how the frequencies stretch beyond the trained length.
    """

    adopts: ClassVar[str | None] = "scaling"
    keeps: ClassVar[tuple[str, ...]] = ("theta", "layout", "width", "scaling")
    theta: Positive = 10_000.0
    layout: Literal["half", "interleaved"] = "half"
    width: Share = 1.0
    scaling: RopeScalingPart | None = None

    def build(self, slot: Slot) -> nn.Module:
        return RopeModule(self, self.turned(slot), slot)

    def reach(self, trained: int) -> float:
        """Tokens of the longest sequence that is like those of up to `trained` tokens, which its model has learned."""
        return trained

    def turned(self, slot: Slot) -> int:
        """How many entries of a head are turned. Raises BuildError when they make no pairs."""
        dim = int(head_width(slot, self.kind) * self.width)
        if dim < 2 or dim % 2:
            raise BuildError(
                f"RoPE turns pairs, and {self.width} of a head of {slot.head_dim} is {dim} entries",
                where=slot.path,
                remedy="choose a head width and share that give an even number",
            )
        return dim


class RopeModule(PositionModule):
    hooks: ClassVar[frozenset[str]] = frozenset({"rotate"})

    def __init__(self, spec: Rope, dim: int, slot: Slot):
        super().__init__()
        self.rope, self.dim, self.context, self.path = spec, dim, slot.context, slot.path
        # Equal for equal ropes; plain, so that compilers can hash it.
        self.key = ("rope", str(spec.to_dict()), dim, slot.context)
        scaling = spec.scaling
        assert scaling is None or isinstance(scaling, RopeScaling)
        self.scaling = scaling
        if scaling is not None:
            scaling.check(self.context, dim, slot.path)
        self.caches = "raw" if scaling is not None and scaling.needs_length else "rotated"  # type: ignore[misc]
        self.inverse, self.factor = self._frequencies(torch.get_default_device())

    def _frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        """Inverse frequencies (dim/2,) in fp32, whatever the model's dtype, and the factor on cos and sin."""
        if device.type == "meta":  # made anew once the model is real; arange there would import half of torch
            return torch.empty(self.dim // 2, device=device), 1.0
        if self.scaling is None or self.scaling.needs_length:
            return plain_frequencies(self.dim, self.rope.theta, device), 1.0
        return self.scaling.frequencies(self.dim, self.rope.theta, self.context, None, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves with the model but never rounds: the table is made anew in fp32 on the new device."""
        super()._apply(fn, recurse)
        self.inverse, self.factor = self._frequencies(fn(torch.empty(0, device=self.inverse.device)).device)
        return self

    def rotate(self, q: Tensor, k: Tensor, at: Coords, ctx: Context) -> tuple[Tensor, Tensor]:
        ends = at.k if self.caches == "raw" else None
        return (
            turn(q, *self.tables(at.q, q.dtype, ends), self.rope.layout),
            turn(k, *self.tables(at.k, k.dtype, ends), self.rope.layout),
        )

    @property
    def turns(self) -> bool:
        return type(self).rotate is RopeModule.rotate  # and not that of a part of another kind

    def turning(self, side: Side, dtype: torch.dtype) -> Turning:
        return Turning(*self.tables(side, dtype, side if self.caches == "raw" else None), self.rope.layout)

    def tables(self, side: Side, dtype: torch.dtype, ends: Side | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin (B|1,T,1,dim/2) for the positions of a side, computed once a forward for all equal ropes.

        ends: the keys whose farthest position tells the length in play; the side itself unless given.
        """
        positions = side.positions
        assert positions is not None

        def make() -> tuple[Tensor, Tensor]:
            inverse, factor = self.inverse, self.factor
            if self.scaling is not None and self.scaling.needs_length:
                far = side if ends is None else ends
                reached = torch.where(far.order < FAR, far.positions[..., 0], 0)  # type: ignore[index]
                length = reached.amax(-1)[:, None, None] + 1  # each row's own, so that its neighbours do not matter
                inverse, factor = self.scaling.frequencies(
                    self.dim, self.rope.theta, self.context, length, positions.device
                )
            cos, sin = cos_sin(self.angles(positions, inverse))
            return (cos * factor).to(dtype)[:, :, None], (sin * factor).to(dtype)[:, :, None]

        key = (*self.key, dtype, ends is None)
        if key not in side.memo:
            side.memo[key] = make()
        return side.memo[key]

    def angles(self, positions: Tensor, inverse: Tensor) -> Tensor:
        """(B,T,A) positions times frequencies (dim/2,) -> (B,T,dim/2), fp32. Text has one axis."""
        return positions[..., :1].float() * inverse


def plain_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/dim), i < dim/2, fp32."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
