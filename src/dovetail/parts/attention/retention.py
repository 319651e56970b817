"""Retention: linear attention without a normaliser, whose past decays at a rate of its own in each head."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels.linear_attention import linear_attention
from dovetail.kernels.plan import Plan
from dovetail.parts.activation import Silu
from dovetail.parts.attention.kernelised import built_position, check_heads, plans_of, refuse_encoder, zeros
from dovetail.parts.context import Context, refuse_memory
from dovetail.parts.norm import RmsNorm
from dovetail.parts.position.rotary import Rope
from dovetail.parts.state import Room, VectorState
from dovetail.parts.weights import Linear
from dovetail.spec import Slot, Spec, register
from dovetail.spec.categories import ActivationPart, NormPart, PositionPart
from dovetail.spec.ranges import Count


@register(
    "mixer",
    "retention",
    oracle="golden: microsoft/torchscale multiscale_retention.py",
    source="Sun et al. 2023 (Retentive Network), eq. 5-8",
    causal=True,
)
class Retention(Spec):
    """(φ(x W_g) ⊙ norm(Σ_{j<=i} γ^(i-j) (q_i·k_j/√D) v_j)) W_o, with γ = 1 - 2^(-5-h) in head h of H.

    heads: max(1, dim // 64) unless given. head_dim: dim / heads unless given; value_dim: twice that unless given.
    norm: over each head. activation: φ, of the gate. position: turns q and k; with the decay it is the paper's xPos, in
    the authors' code with 10000^(D/(D-2)) as rope's theta.
    """

    keeps: ClassVar[tuple[str, ...]] = ("heads", "head_dim", "value_dim", "position")
    heads: Count | None = None
    head_dim: Count | None = None
    value_dim: Count | None = None
    norm: NormPart = RmsNorm(affine=False)
    activation: ActivationPart = Silu()
    position: PositionPart = Rope(layout="interleaved")

    def build(self, slot: Slot) -> nn.Module:
        return RetentionModule(self, slot)

    def sizes(self, dim: int) -> tuple[int, int, int]:
        """(heads, head width, value width) at a model width of `dim`."""
        heads = self.heads or max(1, dim // 64)
        width = self.head_dim or dim // heads
        return heads, width, self.value_dim or 2 * width

    def hands_on(self, dim: int | None) -> dict[str, Any]:
        sizes = {} if dim is None else dict(zip(("heads", "head_dim", "value_dim"), self.sizes(dim), strict=True))
        return super().hands_on(dim) | sizes


class RetentionModule(nn.Module):
    offers: ClassVar[frozenset[str]] = frozenset({"rotate"})

    def __init__(self, spec: Retention, slot: Slot):
        super().__init__()
        refuse_encoder(slot, spec.kind)
        if not slot.causal:
            raise BuildError(
                "the mixer retention decays from the past on, and here every token sees the later ones",
                where=slot.path,
                remedy="use linear or attention in an encoder",
            )
        self.widths = H, D, E = spec.sizes(slot.dim)
        self.head_dim, self.value_dim = D, E
        check_heads(H, H, spec.head_dim is not None, slot)
        self.path = slot.path
        reads = (("query", H * D), ("key", H * D), ("value", H * E), ("in", H * E))
        self.qkvg = Linear(slot.dim, 2 * H * (D + E), slot=slot, parts=reads)
        self.norm = slot.build(spec.norm, "norm", dim=E)
        self.activation = slot.build(spec.activation, "activation")
        self.out = Linear(H * E, slot.width_out, slot=slot, role="residual")
        self.position = built_position(spec, slot, (H, H, D, E), D)

    def new_state(self, room: Room) -> VectorState:
        """What is left of Σ k vᵀ, (B,H,D,E)."""
        return VectorState(matrix=zeros(room, *self.widths))

    def forward(
        self, x: Tensor, ctx: Context, state: Any = None, *, keys: Tensor | None = None, values: Tensor | None = None
    ) -> Tensor:
        """x (B,T,C) -> (B,T,C')."""
        refuse_memory(keys, values, self.path)
        H, D, E = self.widths
        q, k, v, gate = self.qkvg(x).split([H * D, H * D, H * E, H * E], -1)
        q, k, v = (t.unflatten(-1, (H, -1)) for t in (q, k * D**-0.5, v))
        q, k = self.position.rotate(q, k, ctx.coords, ctx)
        y, end = linear_attention(
            *(t.transpose(1, 2) for t in (q, k, v)),
            causal=True,
            segments=ctx.segments,
            decay=log_decay(H, x.device)[:, None].expand(1, H, x.shape[1]),
            start=None if state is None else state["matrix"],
        )
        if state is not None and end is not None:
            state.update(matrix=end)
        y = self.norm(y.transpose(1, 2)).flatten(-2)
        return self.out((self.activation(gate) * y).to(x.dtype))

    def plans(self, device: str, length: int) -> dict[str, Plan]:
        """Which kernel would run each use of this layer, and why."""
        return plans_of(True, length, device, max(self.widths[1:]))


def log_decay(heads: int, device: torch.device) -> Tensor:
    """log γ of each head (H,): from 1 - 1/32 on, twice as long a memory from head to head. fp64."""
    head = torch.arange(heads, device=device, dtype=torch.float64)
    return torch.log1p(-torch.exp2(-5 - head))
