"""M-RoPE: a token stands at a time, a row and a column; each frequency reads one of them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError, DataError
from dovetail.parts.position.rotary import Rope, RopeModule
from dovetail.spec import Slot, register


@register(
    "position",
    "mrope",
    oracle="transformers qwen2_vl apply_multimodal_rotary_pos_emb",
    source="Wang et al. 2024 (Qwen2-VL), section 2.1",
    axes=3,
)
class MRope(Rope):
    """Multimodal RoPE over positions (B,T,3). sections: how many frequencies read each axis, in order.

    Text has one position for all three axes: positions (B,T) or (B,T,1) give plain RoPE.
    """

    sections: tuple[int, int, int]

    def build(self, slot: Slot) -> nn.Module:
        dim = self.turned(slot)
        if sum(self.sections) != dim // 2 or min(self.sections) < 0:
            raise BuildError(
                f"sections {self.sections} of {dim // 2} frequencies",
                where=slot.path,
                remedy=f"give three numbers that add up to {dim // 2}",
            )
        return MRopeModule(self, dim, slot)


class MRopeModule(RopeModule):
    axes: ClassVar[int] = 3

    def __init__(self, spec: MRope, dim: int, slot: Slot):
        super().__init__(spec, dim, slot)
        self.sections = spec.sections

    def angles(self, positions: Tensor, inverse: Tensor) -> Tensor:
        if positions.shape[-1] not in (1, 3):
            raise DataError(
                f"positions with {positions.shape[-1]} axes, and M-RoPE reads time, row and column",
                where=self.path,
                remedy="give positions (batch, length, 3), or (batch, length) for text alone",
            )
        parts = inverse.split(self.sections, -1)
        positions = positions.expand(*positions.shape[:2], 3).float()
        return torch.cat([positions[..., i, None] * part for i, part in enumerate(parts)], -1)
