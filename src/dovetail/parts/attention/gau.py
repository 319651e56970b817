"""Gated attention unit: attention and feed-forward in one layer, with one head whose values are gated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels.attention import Coords, Score
from dovetail.kernels.plan import Plan
from dovetail.parts.activation import Silu
from dovetail.parts.attention.normaliser import Normaliser, SoftmaxPlus
from dovetail.parts.attention.options import check_options, plans_of, score_like
from dovetail.parts.context import Context, refuse_memory
from dovetail.parts.mask import Causal, Full, Kept, Mask, Prefix, Window, interned, narrowed, within
from dovetail.parts.position.base import PositionModule, adds_values, check_axes, check_hooks
from dovetail.parts.position.rotary import Rope
from dovetail.parts.state import KVState, Room
from dovetail.parts.weights import Linear, Rng
from dovetail.spec import Slot, Spec, register
from dovetail.spec.categories import ActivationPart, MaskPart, NormaliserPart, PositionPart
from dovetail.spec.ranges import Chance, Count, Positive


class Gated(Spec):
    """Base of gated units with one head. hidden: width e of u and v, 2·dim unless given. key_dim: width s of the base z.
    bias: on both maps, and β of every view of z (GAU-alpha has none). activation: φ."""

    keeps: ClassVar[tuple[str, ...]] = ("hidden", "key_dim")
    hidden: Count | None = None
    key_dim: Count = 128
    bias: bool = True
    activation: ActivationPart = Silu()

    def width(self, dim: int) -> int:
        """e at a model width of `dim`."""
        return self.hidden or 2 * dim


@register(
    "mixer",
    "gau",
    oracle="JunnYu/GAU-alpha-pytorch GatedAttentionUnit",
    source="Hua et al. 2022 (FLASH), section 3.1; Su 2022, kexue.fm/archives/8934",
    causal=True,
    bidirectional=True,
)
class GatedAttentionUnit(Gated):
    """(u ⊙ A v) W_o, with u, v, z = φ(x W) and A from q = γ₁ ⊙ z + β₁, k = γ₂ ⊙ z + β₂: one head.

    It needs no feed-forward beside it: {mixer: gau, feedforward: null}; two such layers cost what an attention and a
    feed-forward do. hidden: width e of u and v, 2·dim unless given. key_dim: width s of z, q and k. bias: on both maps,
    and β (GAU-alpha has none). activation: φ. normaliser: how scores become A. scale: of q·k, 1/√s unless given.
    dropout: on A.
    """

    normaliser: NormaliserPart = SoftmaxPlus()
    scale: Positive | None = None
    dropout: Chance = 0.0
    mask: MaskPart | None = None
    position: PositionPart = Rope()

    def build(self, slot: Slot) -> nn.Module:
        return GauModule(self, slot)


class Affine(nn.Module):
    """γ ⊙ x + β, (..., D)."""

    bias: nn.Parameter | None

    def __init__(self, dim: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.register_parameter("bias", nn.Parameter(torch.empty(dim)) if bias else None)

    def initialise(self, rng: Rng) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if self.bias is None else torch.addcmul(self.bias, x, self.weight)


class GatedModule(nn.Module):
    """Base: u, v, z = φ(x W), and affine views of z. widths: e of u and v (`value_dim`), s of z (`head_dim`)."""

    views: ClassVar[tuple[str, ...]]  # names of the affine maps of z

    def __init__(self, spec: Gated, slot: Slot):
        super().__init__()
        if slot.memory_dim is not None:
            raise BuildError(
                f"a {spec.kind} (gated attention unit) does not read an encoder",
                where=slot.path,
                remedy="use attention there",
            )
        e, s = spec.width(slot.dim), spec.key_dim
        self.head_dim, self.value_dim = s, e
        self.path, self.causal = slot.path, slot.causal
        self.uvz = Linear(slot.dim, 2 * e + s, slot=slot, bias=spec.bias, parts=(("in", e), ("value", e), ("key", s)))
        for name in self.views:
            self.add_module(name, Affine(s, spec.bias))
        self.activation = slot.build(spec.activation, "activation")
        self.out = Linear(e, slot.width_out, slot=slot, bias=spec.bias, role="residual")

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B,T,C) -> u (B,T,e), v (B,T,e), z (B,T,s)."""
        u, v, z = self.activation(self.uvz(x)).split([self.value_dim, self.value_dim, self.head_dim], -1)
        return u, v, z


class GauModule(GatedModule):
    offers: ClassVar[frozenset[str]] = frozenset({"rotate", "score", "regions"})
    views: ClassVar[tuple[str, ...]] = ("q_affine", "k_affine")
    q_affine: Affine
    k_affine: Affine

    def __init__(self, spec: GatedAttentionUnit, slot: Slot):
        slot = replace(slot, heads=1, kv_heads=1, head_dim=spec.key_dim, value_dim=spec.width(slot.dim))
        super().__init__(spec, slot)
        self.heads, self.dropout = 1, spec.dropout
        self.scale = spec.key_dim**-0.5 if spec.scale is None else spec.scale
        self.normaliser: Normaliser = slot.build(spec.normaliser, "normaliser")
        self.position: PositionModule = slot.build(spec.position, "position")
        check_hooks(self.position, self.offers, spec.position.kind, f"{slot.path}.position", "a gau")
        check_axes(self.position, spec.position.kind, slot)
        check_options(spec, self.position, slot.path)
        if adds_values(self.position) and not self.normaliser.adds_values:
            raise BuildError(
                f"position {spec.position.kind!r}, which adds value terms, beside normaliser {spec.normaliser.kind!r}, "
                "which cannot",
                where=slot.path,
                remedy="use a softmax, or leave the value terms out: {kind: shaw, terms: [key]}",
            )
        extra: Any = spec.mask
        self.rule = narrowed(Causal() if slot.causal else Full(), extra, slot.path)
        self.kept = within(self.rule.kept(), self.position.kept) if slot.causal else None
        self.newest = {kept: interned(self.rule.for_newest(kept)) for kept in (None, self.kept)}
        self.seen = None if self.position.kept is None else interned(_read(self.position.kept))

    def new_state(self, room: Room) -> KVState:
        """Keys of width s and values of width e, one head of each."""
        return KVState(room.timeline(self.kept), 1, self.head_dim, self.value_dim, room.dtype)

    def forward(
        self, x: Tensor, ctx: Context, state: Any = None, *, keys: Tensor | None = None, values: Tensor | None = None
    ) -> Tensor:
        """x (B,T,C) -> (B,T,C')."""
        refuse_memory(keys, values, self.path)
        u, v, z = self.split(x)
        q, k, v = self.q_affine(z)[:, :, None], self.k_affine(z)[:, :, None], v[:, :, None]
        if state is None:
            q_raw, k_raw = q, k
            q, k = self.position.rotate(q, k, ctx.coords, ctx)
            return self.out(u * self._mixed(q, k, v, q_raw, k_raw, self.rule, ctx.coords, ctx))
        raw, q_raw = self.position.caches == "raw", q
        if not raw:
            q, k = self.position.rotate(q, k, ctx.once("fresh", lambda: Coords(ctx.side, ctx.side)), ctx)
        k, v, step = state.append(k, v)
        k_raw = k
        if raw:
            q, k = self.position.rotate(q, k, step.coords, ctx)
        rule = self.newest[state.timeline.kept] if step.newest else self.rule
        return self.out(u * self._mixed(q, k, v, q_raw, k_raw, rule, step.coords, ctx))

    def _mixed(
        self, q: Tensor, k: Tensor, v: Tensor, q_raw: Tensor, k_raw: Tensor, rule: Mask, at: Coords, ctx: Context
    ) -> Tensor:
        """A v, (B,T,e), from q (B,T,1,s), k (B,S,1,s), v (B,S,1,e)."""
        mask = ctx.bind(rule, at)
        score: Score | None = None
        if "score" in self.position.hooks:
            score = self.position.score(q_raw, k_raw, mask.at, ctx, self.project)
        seen = mask if self.seen is None else ctx.narrowed(mask, self.seen)
        qh, score = self.normaliser.prepare(q.transpose(1, 2), score, seen)
        kh, vh = k.transpose(1, 2), v.transpose(1, 2)
        parts = self.position.regions(qh, kh, vh, mask, score, ctx)
        scale = self.scale if score is None or score.scale is None else score.scale
        return self.normaliser.mix(parts, qh, scale, self.dropout if self.training else 0.0).squeeze(1)

    def project(self, x: Tensor, which: Literal["query", "key"]) -> Tensor:
        """The mixer's own map on other vectors (R,C) -> (R,1,s): DeBERTa's shared projections."""
        z = self.activation(self.uvz.rows(x, 2 * self.value_dim, 2 * self.value_dim + self.head_dim))
        return (self.q_affine if which == "query" else self.k_affine)(z)[:, None]

    def plans(self, device: str, length: int) -> dict[str, Plan]:
        """Which kernel would run each use of this layer on `device`, and why."""
        score = score_like(self.position)

        def chosen(ctx: Context, rule: Mask, queries: int) -> Plan:
            if "regions" in self.position.hooks:
                return Plan("regions", "the position splits the keys into regions: merged attentions")
            width, dtype = max(self.head_dim, self.value_dim), self.out.dtype
            return self.normaliser.plan(device, dtype, queries, width, ctx.bind(rule), score, self.dropout)

        return plans_of(length, self.rule, self.newest[self.kept] if self.causal else None, chosen)


def _read(kept: Kept) -> Mask:
    """The keys that regions read where they leave some out: those that a normaliser counts."""
    near = Window(size=kept.last)
    return near | Prefix(length=kept.first) if kept.first else near
