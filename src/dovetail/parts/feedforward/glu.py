"""Gated linear units on each position."""

from __future__ import annotations

from torch import Tensor, nn

from dovetail.kernels import gate
from dovetail.kernels.plan import Plan
from dovetail.parts.activation import Silu
from dovetail.parts.weights import Drops, Linear
from dovetail.spec import Slot, Spec, register
from dovetail.spec.categories import ActivationPart
from dovetail.spec.ranges import Chance, Count


@register(
    "feedforward", "glu", oracle="transformers llama LlamaMLP", source="Shazeer 2020, eq. 5-6; Dauphin et al. 2016"
)
class Glu(Spec):
    """W_down (act(W_gate x) · W_up x). With sigmoid it is GLU, relu ReGLU, gelu GEGLU, silu SwiGLU, identity bilinear.

    hidden: 8/3·dim rounded up to a multiple of 8 unless given (the parameters of a 4·dim MLP).
    """

    hidden: Count | None = None
    activation: ActivationPart = Silu()
    bias: bool = False
    dropout: Chance = 0.0

    def build(self, slot: Slot) -> nn.Module:
        return GluModule(self, slot)

    def width(self, dim: int) -> int:
        """The hidden width at a model width of `dim`."""
        return self.hidden or -(-8 * dim // 3 // 8) * 8


class GluModule(Drops):
    def __init__(self, spec: Glu, slot: Slot):
        super().__init__()
        hidden = spec.width(slot.dim)
        self.gate_up = Linear(slot.dim, 2 * hidden, slot=slot, bias=spec.bias, parts=[("in", hidden), ("in", hidden)])
        self.activation = slot.build(spec.activation, "activation", dim=hidden)
        self.drop = spec.dropout
        self.down = Linear(hidden, slot.width_out, slot=slot, bias=spec.bias, role="residual")

    def forward(self, x: Tensor) -> Tensor:
        """(B,T,C) -> (B,T,C')."""
        both, formula, weight = self.gate_up(x), self.formula, self.down.product
        if formula is not None and weight is not None and not (self.drop and self.training):
            return gate.projected(both, formula, weight, self.down.in_fp8)
        return self.down(self.dropout(self.gated(both)))

    def gated(self, both: Tensor) -> Tensor:
        """act(gate) · up (...,h) of both (...,2h)."""
        formula = self.formula
        if formula is not None:
            return gate.gated(both, formula)
        first, second = both.chunk(2, dim=-1)
        return self.activation(first) * second

    @property
    def formula(self) -> str | None:
        """What the kernels call the activation; None where they do not know it."""
        name = getattr(self.activation, "formula", None)
        return name if name in gate.ACTIVATIONS else None

    def plans(self, device: str, length: int) -> dict[str, Plan]:
        """use -> plan, for people."""
        return {"gate": gate.plan(self.formula, device, self.gate_up.dtype)}
