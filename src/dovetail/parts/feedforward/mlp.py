"""The two-layer perceptron on each position."""

from __future__ import annotations

from torch import Tensor, nn

from dovetail.parts.activation import Gelu
from dovetail.parts.weights import Drops, Linear
from dovetail.spec import Slot, Spec, register
from dovetail.spec.categories import ActivationPart
from dovetail.spec.ranges import Chance, Count


@register("feedforward", "mlp", oracle="transformers gpt2, bart", source="Vaswani et al. 2017, eq. 2")
class Mlp(Spec):
    """W₂ act(W₁ x). hidden: 4·dim unless given. dropout: after the activation (BART's activation_dropout)."""

    hidden: Count | None = None
    activation: ActivationPart = Gelu()
    bias: bool = True
    dropout: Chance = 0.0

    def build(self, slot: Slot) -> nn.Module:
        return MlpModule(self, slot)

    def width(self, dim: int) -> int:
        """The hidden width at a model width of `dim`."""
        return self.hidden or 4 * dim


class MlpModule(Drops):
    def __init__(self, spec: Mlp, slot: Slot):
        super().__init__()
        hidden = spec.width(slot.dim)
        self.up = Linear(slot.dim, hidden, slot=slot, bias=spec.bias)
        self.activation = slot.build(spec.activation, "activation", dim=hidden)
        self.drop = spec.dropout
        self.down = Linear(hidden, slot.width_out, slot=slot, bias=spec.bias, role="residual")

    def forward(self, x: Tensor) -> Tensor:
        """(B,T,C) -> (B,T,C')."""
        return self.down(self.dropout(self.activation(self.up(x))))
