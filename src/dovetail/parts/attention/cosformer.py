"""cosFormer: linear attention whose weights fall off with the distance, as a cosine that splits into two features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.errors import BuildError, DataError
from dovetail.kernels.linear_attention import normalised
from dovetail.parts.attention.kernelised import Kernelised, KernelisedModule, zeros
from dovetail.parts.context import Context
from dovetail.parts.state import Room, VectorState
from dovetail.spec import Slot, register
from dovetail.spec.ranges import Count

UNKNOWN = 4096  # tokens, where the place knows no trained length


@register(
    "mixer",
    "cosformer",
    oracle="formula: relu(q)·relu(k) cos(π(i - j)/2M)",
    source="Qin et al. 2022, eq. 9-12",
    causal=True,
    bidirectional=True,
)
class CosFormer(Kernelised):
    """Weights relu(q_i)·relu(k_j) cos(π(i - j) / 2M), divided by their sum.

    length: M, the longest row, beyond which a weight would be negative; the model's context unless given, 4,096 where
    that is unknown. (The authors take each batch's own length, with which no step of decoding gives what training saw.)
    The weights are the position: there is no other.
    """

    length: Count | None = None

    def build(self, slot: Slot) -> nn.Module:
        return CosFormerModule(self, slot)


class CosFormerModule(KernelisedModule):
    def __init__(self, spec: CosFormer, slot: Slot):
        super().__init__(spec, slot)
        self.features = 2 * self.widths[2]
        self.length = spec.length or slot.context or UNKNOWN
        if slot.context is not None and self.length < slot.context:
            raise BuildError(
                f"a cosformer of length {self.length} in a model of {slot.context} tokens: weights would be negative",
                where=slot.path,
                remedy="leave length out, or give at least the model's context",
            )

    def new_state(self, room: Room) -> VectorState:
        """Σ φ(k) vᵀ and Σ φ(k), (B,G,2D,E+1)."""
        _, G, _, E = self.widths
        return VectorState(matrix=zeros(room, G, self.features, E + 1))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: VectorState | None) -> Tensor:
        if ctx.segments is None and q.shape[1] > self.length:
            raise DataError(
                f"rows of {q.shape[1]} tokens in a cosformer of {self.length}",
                where=self.path,
                remedy="give shorter rows, or set the mixer's length",
            )
        wide = torch.promote_types(q.dtype, torch.float32)
        turn = ctx.once(("cosformer", self.length, wide), lambda: self._turn(ctx, wide))
        q, k = ((F.relu(t.to(wide))[..., None, :] * turn).flatten(-2).transpose(1, 2) for t in (q, k))
        start = None if state is None else state["matrix"]
        out, end = normalised(q, k, v, causal=self.causal, segments=ctx.segments, start=start)
        if state is not None and end is not None:
            state.update(matrix=end)
        return out

    def _turn(self, ctx: Context, wide: torch.dtype) -> Tensor:
        """cos and sin of each token's angle, (B|1,T,1,2,1)."""
        angle = ctx.order.to(torch.float64) * (math.pi / 2 / self.length)
        return torch.stack([angle.cos(), angle.sin()], -1).to(wide)[:, :, None, :, None]
