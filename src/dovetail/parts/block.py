"""Blocks: a mixer and a feed-forward joined to the stream by norms and residuals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.parts.adaptable import Branch
from dovetail.parts.attention.softmax import Attention
from dovetail.parts.context import Context
from dovetail.parts.feedforward.glu import Glu
from dovetail.parts.init import Scaled
from dovetail.parts.norm import LayerNorm, RmsNorm
from dovetail.parts.state import Room
from dovetail.parts.weights import Drops
from dovetail.spec import Slot, Spec, register
from dovetail.spec.categories import FeedForwardPart, MixerPart, NormPart
from dovetail.spec.ranges import Chance, Positive


class Block(Spec):
    """Base of the blocks.

    mixer: moves information along the sequence. cross: reads the encoder output (decoders of
    encoder-decoders). feedforward: acts on each position; null for mixers that bring their own. dropout: on
    every branch before it joins the stream.
    """

    mixer: MixerPart = Attention()
    cross: MixerPart | None = None
    feedforward: FeedForwardPart | None = Glu()
    norm: NormPart = RmsNorm()
    dropout: Chance = 0.0

    def build(self, slot: Slot) -> nn.Module:
        return BlockModule(self, slot)


class BlockModule(Drops):
    """The branches in order: mixer, cross, feedforward. `join` says how each meets the stream."""

    norms = ("norm",)  # name prefixes of the norms that each branch has

    def __init__(self, spec: Block, slot: Slot):
        super().__init__()
        if spec.cross is not None and slot.memory_dim is None:
            raise BuildError(
                "a cross mixer where there is no encoder to look at",
                where=f"{slot.path}.cross",
                remedy="leave cross out, or put the block into an encoder-decoder's decoder",
            )
        inner = replace(slot, memory_dim=None)
        self.mixer = inner.build(spec.mixer, "mixer")
        self.cross = None if spec.cross is None else slot.build(spec.cross, "cross", causal=False)
        self.feedforward = None if spec.feedforward is None else inner.build(spec.feedforward, "feedforward")
        for branch in ("mixer", "cross", "feedforward"):
            for prefix in self.norms:
                if getattr(self, branch) is not None:
                    self.add_module(f"{prefix}_{branch}", inner.build(spec.norm, f"{prefix}_{branch}"))
        built = [branch for branch in ("mixer", "cross", "feedforward") if getattr(self, branch) is not None]
        self.places = nn.ModuleDict({branch: Branch(slot.dim) for branch in built})
        self.drop = spec.dropout

    def new_state(self, room: Room) -> dict[str, Any]:
        state = {"mixer": self.mixer.new_state(room)}
        if self.cross is not None:
            state["cross"] = self.cross.new_state(room)
        return state

    def remember(self, state: dict[str, Any], memory: Tensor, segments: Tensor | None) -> None:
        """Fills the cross part of a state with the encoder output."""
        if self.cross is not None:
            self.cross.remember(state["cross"], memory, segments)

    def forward(self, x: Tensor, ctx: Context, state: dict[str, Any] | None = None) -> Tensor:
        """(B,T,C) -> (B,T,C)."""
        own, other = (None, None) if state is None else (state["mixer"], state.get("cross"))
        x = self.join(x, "mixer", lambda h: self.branch("mixer", h, ctx, own))
        if self.cross is not None:
            x = self.join(x, "cross", lambda h: self.branch("cross", h, ctx, other))
        if self.feedforward is not None:
            x = self.join(x, "feedforward", lambda h: self.by_pieces(h, ctx.pieces))
        return x

    def by_pieces(self, x: Tensor, pieces: int) -> Tensor:
        """The feed-forward of x (B,T,C), so many pieces of T one after the other."""
        if pieces == 1:
            return self.branch("feedforward", x)
        return torch.cat([self.branch("feedforward", piece) for piece in x.chunk(pieces, 1)], 1)

    def branch(self, name: str, x: Tensor, *rest: Any) -> Tensor:
        """What a branch gives for x (B,T,C), through the adapters that stand around it."""
        if not x.numel():  # no rows, or rows of no tokens, which not every kernel knows
            return x
        run: Any = getattr(self, name)
        place: Any = self.places[name]
        return place.around(lambda h: run(h, *rest), x) if place.adapted else run(x, *rest)

    def normed(self, branch: str, x: Tensor, which: str = "norm") -> Tensor:
        """x through one of a branch's norms."""
        return getattr(self, f"{which}_{branch}")(x)

    def join(self, x: Tensor, branch: str, run: Any) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not say how branches join")


@register("block", "pre", default=True, oracle="transformers llama, gpt2", source="Xiong et al. 2020, figure 1b")
class PreNorm(Block):
    """x + f(norm(x))."""

    def build(self, slot: Slot) -> nn.Module:
        return PreNormModule(self, slot)


class PreNormModule(BlockModule):
    def join(self, x: Tensor, branch: str, run: Any) -> Tensor:
        return x + self.dropout(run(self.normed(branch, x)))


@register("block", "post", oracle="transformers bart", source="Vaswani et al. 2017, section 3.1")
class PostNorm(Block):
    """norm(x + f(x))."""

    norm: NormPart = LayerNorm()

    def build(self, slot: Slot) -> nn.Module:
        return PostNormModule(self, slot)


class PostNormModule(BlockModule):
    def join(self, x: Tensor, branch: str, run: Any) -> Tensor:
        return self.normed(branch, x + self.dropout(run(x)))


@register("block", "sandwich", oracle="transformers gemma2", source="Ding et al. 2021 (CogView), section 2.3; Gemma 2")
class Sandwich(Block):
    """x + norm(f(norm(x)))."""

    def build(self, slot: Slot) -> nn.Module:
        return SandwichModule(self, slot)


class SandwichModule(BlockModule):
    norms = ("norm", "after")

    def join(self, x: Tensor, branch: str, run: Any) -> Tensor:
        return x + self.normed(branch, self.dropout(run(self.normed(branch, x))), "after")


@register(
    "block",
    "parallel",
    oracle="transformers gpt_neox",
    source="Wang and Komatsuzaki 2021 (GPT-J); Chowdhery et al. 2022 (PaLM)",
)
class Parallel(Block):
    """x + mixer(norm(x)) + feedforward(norm(x)). shared: one norm for both branches (GPT-J), else two (GPT-NeoX)."""

    shared: bool = False

    def build(self, slot: Slot) -> nn.Module:
        return ParallelModule(self, slot)


class ParallelModule(BlockModule):
    def __init__(self, spec: Parallel, slot: Slot):
        super().__init__(spec, slot)
        if spec.shared and self.feedforward is None:
            raise BuildError(
                "one norm shared by two branches, and there is no feedforward to be the second",
                where=slot.path,
                remedy="leave shared out, or give feedforward",
            )
        if spec.shared:
            self.norm_feedforward = self.norm_mixer

    def forward(self, x: Tensor, ctx: Context, state: dict[str, Any] | None = None) -> Tensor:
        own, other = (None, None) if state is None else (state["mixer"], state.get("cross"))
        out = x + self.dropout(self.branch("mixer", self.normed("mixer", x), ctx, own))
        if self.cross is not None:
            out = out + self.dropout(self.branch("cross", self.normed("cross", x), ctx, other))
        if self.feedforward is not None:
            out = out + self.dropout(self.by_pieces(self.normed("feedforward", x), ctx.pieces))
        return out


@register(
    "block",
    "deepnorm",
    oracle="formula: norm(alpha x + f(x)), beta on v, out and feed-forward",
    source="Wang et al. 2022 (DeepNet), figure 2",
)
class DeepNorm(Block):
    """norm(alpha·x + f(x)) with value, output and feed-forward weights started beta times smaller.

    alpha = (2N)^¼, beta = (8N)^-¼ for N layers without cross-attention, (3M)^¼ and (12M)^-¼ for a decoder of M
    layers with it (the paper's encoder constants of an encoder-decoder are given by alpha and beta).
    """

    norm: NormPart = LayerNorm()
    alpha: Positive | None = None
    beta: Positive | None = None

    def build(self, slot: Slot) -> nn.Module:
        many = (3, 12) if self.cross is not None else (2, 8)
        alpha = self.alpha or (many[0] * slot.depth) ** 0.25
        beta = self.beta or (many[1] * slot.depth) ** -0.25
        init = None if slot.init is None else Scaled(base=slot.init, gain=beta, roles=("value", "in", "residual"))
        return DeepNormModule(self, replace(slot, init=init), alpha)


class DeepNormModule(BlockModule):
    def __init__(self, spec: Block, slot: Slot, alpha: float):
        super().__init__(spec, slot)
        self.alpha = alpha

    def join(self, x: Tensor, branch: str, run: Any) -> Tensor:
        return self.normed(branch, self.alpha * x + self.dropout(run(x)))
