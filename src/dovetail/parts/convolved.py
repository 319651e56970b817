"""A convolution over neighbouring tokens beside a block: what stands close together is seen together from the start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.parts.activation import Tanh
from dovetail.parts.block import PostNorm, PostNormModule
from dovetail.parts.context import Context
from dovetail.parts.position.cnn import Closed, check_middle, last_tokens, neighbours, over_documents
from dovetail.parts.state import Room, VectorState
from dovetail.parts.weights import Rng
from dovetail.spec import Slot, register
from dovetail.spec.categories import ActivationPart
from dovetail.spec.ranges import Count


@register(
    "block",
    "post_convolved",
    oracle="transformers deberta_v2 ConvLayer",
    source="He et al. 2021 (DeBERTa), released code: n-gram induced input encoding",
)
class PostConvolved(PostNorm):
    """norm(y + act(b + Σ_k W_k x_{t+k})): y is what a post-norm block makes of x, W_k are C x C matrices.

    kernel: tokens that are read, the token itself in the middle; in a causal place the token itself and those before
    it. Beyond the ends of a document there are zeros; padding is skipped. dropout: on the convolution too.
    """

    kernel: Count = 3
    activation: ActivationPart = Tanh()

    def build(self, slot: Slot) -> nn.Module:
        check_middle(self.kernel, slot)
        return PostConvolvedModule(self, slot)


class PostConvolvedModule(PostNormModule):
    def __init__(self, spec: PostConvolved, slot: Slot):
        super().__init__(spec, slot)
        self.beside = TokenConvolution(spec.kernel, slot.at("beside"))
        self.norm_beside = slot.build(spec.norm, "norm_beside")
        self.activation = slot.build(spec.activation, "activation")

    def forward(self, x: Tensor, ctx: Context, state: dict[str, Any] | None = None) -> Tensor:
        near = self.beside(x, ctx, None if state is None else state["beside"]) if x.numel() else x
        return self.norm_beside(super().forward(x, ctx, state) + self.activation(self.dropout(near)))

    def new_state(self, room: Room) -> dict[str, Any]:
        return super().new_state(room) | {"beside": self.beside.new_state(room)}


class TokenConvolution(nn.Module):
    """b + Σ_k W_k x_{t+k} over the tokens of each document, W (C,C,kernel) as torch.nn.Conv1d keeps it."""

    def __init__(self, kernel: int, slot: Slot):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(slot.dim, slot.dim, kernel))
        self.bias = nn.Parameter(torch.empty(slot.dim))
        self.before = kernel - 1 if slot.causal else kernel // 2
        self.after = kernel - 1 - self.before
        self.slot = slot

    def initialise(self, rng: Rng) -> None:
        fan = self.slot.dim * self.weight.shape[2]
        self.slot.init.draw(self.weight.flatten(1), "in", fan, self.slot.dim, self.slot, rng("weight"))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, ctx: Context, state: VectorState | None = None) -> Tensor:
        """(B,T,C) -> (B,T,C). state: the last `before` real tokens of each row."""
        return over_documents(x, ctx, lambda x, closed: self._along(x, closed, state))

    def _along(self, x: Tensor, closed: Closed | None, state: VectorState | None) -> Tensor:
        y = self.bias.expand_as(x)
        for k, near in enumerate(neighbours(x, self.before, self.after, closed, state)):
            y = y + F.linear(near, self.weight[:, :, k])
        return y

    def new_state(self, room: Room) -> VectorState:
        return last_tokens(room, self.before, self.after, self.slot)
