"""Ids to vectors, and hidden states to logits (by a head of its own, or by the embedding through a ref)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dovetail.kernels.linear import linear
from dovetail.parts.weights import Linear, Lookup, Rng
from dovetail.spec import Slot, Spec, register


@register(
    "embedding",
    "token",
    default=True,
    oracle="torch.nn.Embedding",
    source="Vaswani et al. 2017, section 3.4",
    also="head",
)
class TokenEmbedding(Spec):
    """A row for each id, times `scale` (sqrt(dim) in the original Transformer)."""

    scale: float = 1.0

    def build(self, slot: Slot) -> nn.Module:
        return TokenEmbeddingModule(self, slot)


class TokenEmbeddingModule(nn.Module):
    def __init__(self, spec: TokenEmbedding, slot: Slot):
        super().__init__()
        assert slot.dim_out is not None, "an embedding's slot says dim_out = vocabulary"
        self.scale = spec.scale
        self.table = Lookup(slot.dim_out, slot.dim, slot=slot)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B,T) int64 -> (B,T,C)."""
        x = self.table(tokens)
        return x if self.scale == 1.0 else x * self.scale

    def logits(self, h: Tensor) -> Tensor:
        """(B,T,C) -> (B,T,V) by the same rows: what a tied head does."""
        return self.table.times(h, self.table.weight, linear)


@register("head", "linear", oracle="torch.nn.Linear", source="Vaswani et al. 2017, section 3.4")
class LinearHead(Spec):
    """W h (+ b)."""

    bias: bool = False

    def build(self, slot: Slot) -> nn.Module:
        return LinearHeadModule(self, slot)


class LinearHeadModule(nn.Module):
    def __init__(self, spec: LinearHead, slot: Slot):
        super().__init__()
        self.linear = Linear(slot.dim, slot.width_out, slot=slot, bias=spec.bias, role="head")

    def logits(self, h: Tensor) -> Tensor:
        """(B,T,C) -> (B,T,V)."""
        return self.linear(h)


class LogitsBias(nn.Module):
    """A bias on the logits of a tied head (BART's final_logits_bias): stored (1,V), added as it is."""

    def __init__(self, vocab: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, vocab), requires_grad=False)

    def initialise(self, rng: Rng) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.weight
