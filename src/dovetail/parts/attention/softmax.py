"""Softmax attention: multi-head, multi-query, grouped; self or cross; any head width."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels import rotary
from dovetail.kernels.attention import (
    Ahead,
    BoundMask,
    Coords,
    Region,
    Score,
    Side,
    attend,
    attend_regions,
    plan,
)
from dovetail.kernels.plan import Plan
from dovetail.kernels.rotary import Heads
from dovetail.parts.adaptable import Adaptable
from dovetail.parts.attention.options import by_name, check_options, plans_of, score_like
from dovetail.parts.context import Context, refuse_memory
from dovetail.parts.mask import Causal, Full, Mask, Padding, interned, narrowed, within
from dovetail.parts.position.base import PositionModule, check_axes, check_hooks
from dovetail.parts.position.prefix import prefix_region
from dovetail.parts.position.rotary import Rope
from dovetail.parts.state import CrossState, KVState, Room
from dovetail.parts.virtual import Rows, rows_of
from dovetail.parts.weights import Linear
from dovetail.spec import Slot, Spec, register
from dovetail.spec.categories import MaskPart, NormPart, PositionPart
from dovetail.spec.ranges import Chance, Count, Positive


@register(
    "mixer",
    "attention",
    oracle="transformers llama, qwen3, gpt2, bart",
    source="Vaswani et al. 2017, section 3.2; Ainslie et al. 2023 (GQA)",
    causal=True,
    bidirectional=True,
    cross=True,
)
class Attention(Spec):
    """softmax(q kᵀ·scale + position terms) v over heads.

    heads: max(1, dim // 64) unless given. kv_heads: heads unless given; 1 is multi-query. head_dim: dim / heads
    unless given; value_dim: head_dim unless given. bias: which maps carry one. qk_norm: norm on queries and keys,
    over each head or over all heads together, and on both or on one of them; with l2 and a scale of 1 on keys it is
    KeyNorm, on both with a scale of λ cosine attention. scale: 1/sqrt(head_dim) unless given. cap: soft cap on scores
    (Gemma 2). mask: what is hidden beside causality and padding (a window, say). dropout: on the weights.
    """

    keeps: ClassVar[tuple[str, ...]] = (
        "heads", "kv_heads", "head_dim", "value_dim", "bias", "dropout", "mask", "position",
    )  # fmt: skip
    heads: Count | None = None
    kv_heads: Count | None = None
    head_dim: Count | None = None
    value_dim: Count | None = None
    bias: Literal["none", "qkv", "out", "all"] = "none"
    qk_norm: NormPart | None = None
    qk_norm_over: Literal["head", "all"] = "head"
    qk_norm_on: Literal["both", "query", "key"] = "both"
    scale: Positive | None = None
    cap: Positive | None = None
    dropout: Chance = 0.0
    mask: MaskPart | None = None
    position: PositionPart = Rope()

    def build(self, slot: Slot) -> nn.Module:
        return AttentionModule(self, slot)

    def sizes(self, dim: int) -> tuple[int, int, int, int]:
        """(heads, key/value heads, head width, value width) at a model width of `dim`."""
        heads = self.heads or max(1, dim // 64)
        width = self.head_dim or dim // heads
        return heads, self.kv_heads or heads, width, self.value_dim or width

    def hands_on(self, dim: int | None) -> dict[str, Any]:
        return super().hands_on(dim) | ({} if dim is None else by_name(self.sizes(dim)))


class AttentionModule(Adaptable):
    """The place of a prefix: adapters here are virtual tokens, whose keys and values stand before the others."""

    offers: ClassVar[frozenset[str]] = frozenset({"embed_qk", "rotate", "score", "regions"})

    def __init__(self, spec: Attention, slot: Slot):
        super().__init__()
        H, G, D, Dv = spec.sizes(slot.dim)
        if H % G:
            raise BuildError(
                f"{H} heads cannot share {G} key/value heads", where=slot.path, remedy="kv_heads must divide heads"
            )
        if spec.head_dim is None and slot.dim % H:
            raise BuildError(
                f"{H} heads do not divide a width of {slot.dim}",
                where=slot.path,
                remedy="give head_dim, or another number of heads",
            )
        self.heads, self.kv_heads, self.head_dim, self.value_dim = H, G, D, Dv
        self.path, self.cross, self.causal = slot.path, slot.memory_dim is not None, slot.causal
        self.dropout, self.scale, self.cap = spec.dropout, spec.scale, spec.cap
        slot = replace(slot, heads=H, kv_heads=G, head_dim=D, value_dim=Dv)
        bias = spec.bias in ("qkv", "all")
        reads = (("query", H * D), ("key", G * D), ("value", G * Dv))
        if self.cross:
            assert slot.memory_dim is not None
            self.q = Linear(slot.dim, H * D, slot=slot, bias=bias, role="query")
            self.kv = Linear(slot.memory_dim, G * (D + Dv), slot=slot, bias=bias, parts=reads[1:])
        else:
            self.qkv = Linear(slot.dim, H * D + G * (D + Dv), slot=slot, bias=bias, parts=reads)
        self.out = Linear(H * Dv, slot.width_out, slot=slot, bias=spec.bias in ("out", "all"), role="residual")
        if spec.qk_norm is None and spec.qk_norm_over != "head":
            raise BuildError(
                f"qk_norm_over={spec.qk_norm_over!r} without a qk_norm, which it speaks of",
                where=slot.path,
                remedy="give qk_norm, or leave qk_norm_over out",
            )
        if spec.qk_norm is None and spec.qk_norm_on != "both":
            raise BuildError(
                f"qk_norm_on={spec.qk_norm_on!r} without a qk_norm, which it speaks of",
                where=slot.path,
                remedy="give qk_norm, e.g. l2, or leave qk_norm_on out",
            )
        self.over_all = spec.qk_norm_over == "all"
        on = {"both": "qk", "query": "q", "key": "k"}[spec.qk_norm_on]
        self.normed = "" if spec.qk_norm is None else on
        if spec.qk_norm is not None and "q" in on:
            self.q_norm = slot.build(spec.qk_norm, "q_norm", dim=H * D if self.over_all else D)
        if spec.qk_norm is not None and "k" in on:
            self.k_norm = slot.build(spec.qk_norm, "k_norm", dim=G * D if self.over_all else D)
        self.position: PositionModule = slot.build(spec.position, "position")
        if self.cross and "rotate" in self.position.hooks:
            raise BuildError(
                f"position {spec.position.kind!r} works by rotate, which this place never calls: "
                "a cross-attention has no distance to its memory",
                where=f"{slot.path}.position",
                remedy="set the cross mixer's position to none (rope is its default), added, or a prefix",
            )
        check_hooks(self.position, self.offers, spec.position.kind, f"{slot.path}.position", "an attention")
        check_axes(self.position, spec.position.kind, slot)
        check_options(spec, self.position, slot.path)
        rule: Mask = Causal() if slot.causal and not self.cross else Full()
        extra: Any = spec.mask
        if extra is not None and self.cross:
            raise BuildError(
                "a cross-attention with a mask of its own",
                where=slot.path,
                remedy="leave mask out: padding of the memory is hidden anyway",
            )
        self.rule = narrowed(rule, extra, slot.path)
        self.kept = within(self.rule.kept(), self.position.kept) if slot.causal else None
        self.newest = {kept: interned(self.rule.for_newest(kept)) for kept in (None, self.kept)}

    def new_state(self, room: Room) -> KVState | CrossState:
        if self.cross:
            if "embed_qk" in self.position.hooks:
                raise BuildError(
                    "a cross-attention whose keys get a position of their own cannot be projected once",
                    where=self.path,
                    remedy="run it without a state",
                )
            return CrossState()
        return KVState(room.timeline(self.kept), self.kv_heads, self.head_dim, self.value_dim, room.dtype)

    def remember(self, state: CrossState, memory: Tensor, segments: Tensor | None) -> None:
        """Projects the encoder output (B,S,C) once, for all decoding steps."""
        state.k, state.v = self._memory(memory, memory)
        state.segments = segments

    def forward(
        self,
        x: Tensor,
        ctx: Context,
        state: Any = None,
        *,
        keys: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        """x (B,T,C) -> (B,T,C'). Cross-attention reads keys and values (B,S,memory_dim), or its state."""
        if self.cross:
            return self._cross(x, ctx, state, keys, values)
        refuse_memory(keys, values, self.path)
        if state is None:
            return self._finish(*self._whole(x, ctx), self.rule, ctx.coords, ctx)
        q, k, v = self._project(x, ctx)
        fresh = ctx.once("fresh", lambda: Coords(ctx.side, ctx.side))
        raw = self.position.caches == "raw"
        q_raw = q
        if not raw:
            q, k = self.position.rotate(q, k, fresh, ctx)
        k, v, step = state.append(k, v)
        k_raw = k
        if raw:
            q, k = self.position.rotate(q, k, step.coords, ctx)
        rule = self.newest[state.timeline.kept] if step.newest else self.rule
        return self._finish(q, k, v, q_raw, k_raw, rule, step.coords, ctx)

    def _whole(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k and v of whole rows, q and k rotated, and then as they were, which scores ask for."""
        if self.normed or "embed_qk" in self.position.hooks:
            q, k, v = self._project(x, ctx)
        else:  # nothing stands between the product and the rotation
            y = self.qkv(x)
            if self.position.turns and "score" not in self.position.hooks:  # nobody asks for them as they were
                heads = Heads(self.heads, self.kv_heads, self.head_dim, self.value_dim)
                q, k, v = rotary.turned(y, heads, self.position.turning(ctx.side, y.dtype))
                return q, k, v, q, k
            q, k, v = self._split(y)
        return *self.position.rotate(q, k, ctx.coords, ctx), v, q, k

    def _project(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        H, G, D = self.heads, self.kv_heads, self.head_dim
        if "embed_qk" in self.position.hooks:
            xq, xk = self.position.embed_qk(x, x, ctx)
            q, k = self.qkv.rows(xq, 0, H * D), self.qkv.rows(xk, H * D, (H + G) * D)
            v = self.qkv.rows(x, (H + G) * D, self.qkv.out_features)
            return self._heads(q, H, "q"), self._heads(k, G, "k"), v.unflatten(-1, (G, self.value_dim))
        return self._split(self.qkv(x))

    def _split(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        H, G, D = self.heads, self.kv_heads, self.head_dim
        q, k, v = y.split([H * D, G * D, G * self.value_dim], dim=-1)
        return self._heads(q, H, "q"), self._heads(k, G, "k"), v.unflatten(-1, (G, self.value_dim))

    def _heads(self, x: Tensor, heads: int, which: str) -> Tensor:
        """(B,N,heads·D) -> (B,N,heads,D), normed as the spec says."""
        if which not in self.normed:
            return x.unflatten(-1, (heads, self.head_dim))
        norm = self.q_norm if which == "q" else self.k_norm
        if self.over_all:
            return norm(x).unflatten(-1, (heads, self.head_dim))
        return norm(x.unflatten(-1, (heads, self.head_dim)))

    def _memory(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        G, D, Dv = self.kv_heads, self.head_dim, self.value_dim
        if keys is values:
            k, v = self.kv(keys).split([G * D, G * Dv], dim=-1)
        else:
            k, v = self.kv.rows(keys, 0, G * D), self.kv.rows(values, G * D, self.kv.out_features)
        return self._heads(k, G, "k"), v.unflatten(-1, (G, Dv))

    def _cross(self, x: Tensor, ctx: Context, state: Any, keys: Tensor | None, values: Tensor | None) -> Tensor:
        segments = ctx.memory_segments
        xq = x
        if state is not None and state.k is not None:
            refuse_memory(keys, values, f"{self.path} (whose state holds them already)")
            k, v, segments = state.k, state.v, state.segments
        else:
            keys = ctx.needs_memory(self.path) if keys is None else keys
            values = keys if values is None else values
            xq, xk = self.position.embed_qk(x, keys, ctx)
            k, v = self._memory(xk, values)
        q = self._heads(self.q(xq), self.heads, "q")
        at = ctx.once(("memory", k.shape[1]), lambda: _memory_coords(ctx, k.shape[1], segments))
        rule = _FULL if segments is None else _PADDING
        return self._finish(q, k, v, q, k, rule, at, ctx)

    def _finish(
        self, q: Tensor, k: Tensor, v: Tensor, q_raw: Tensor, k_raw: Tensor, rule: Mask, at: Coords, ctx: Context
    ) -> Tensor:
        mask = ctx.bind(rule, at)
        apart = "regions" in self.position.hooks
        prefix = rows_of(self, q.shape[0]) if self.adapted else None
        if prefix is not None and not apart:
            k, v, k_raw, mask = self._behind(prefix, k, v, k_raw, mask, ctx)
        qh, kh, vh = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        score = Score(cap=self.cap) if self.cap is not None else None
        if "score" in self.position.hooks:
            score = self.position.score(q_raw, k_raw, mask.at, ctx, self.project).merged(score)
        if apart:
            parts = self.position.regions(qh, kh, vh, mask, score, ctx)
            if prefix is not None:
                parts = [self._region(prefix, qh, mask, ctx), *parts]
            scale = self.scale if score is None or score.scale is None else score.scale
            out = attend_regions(parts, qh, scale=scale)
        else:
            out = attend(qh, kh, vh, mask=mask, score=score, scale=self.scale, dropout=dropout)
        return self.out(out.transpose(1, 2).flatten(-2))

    def _behind(
        self, prefix: Rows, k: Tensor, v: Tensor, k_raw: Tensor, mask: BoundMask, ctx: Context
    ) -> tuple[Tensor, Tensor, Tensor, BoundMask]:
        """k, v, k_raw (B,S,G,...) and mask with what adapters put before: cached tokens at positions 0, 1, ..., as they
        are, that every query sees. One attention over all keys: faster than a region of its own, and the same."""
        own_k, own_v = (t.to(k.dtype).expand(k.shape[0], -1, -1, -1) for t in prefix.tensors)
        joined = ctx.once(("behind", prefix.counts, id(mask)), lambda: _ahead(prefix, mask))
        same = k_raw is k
        k = torch.cat([own_k, k], 1)
        return k, torch.cat([own_v, v], 1), k if same else torch.cat([own_k, k_raw], 1), joined

    def _region(self, prefix: Rows, q: Tensor, mask: BoundMask, ctx: Context) -> Region:
        """What adapters put before keys that a position splits into regions: one more, without its terms."""
        k, v = prefix.tensors
        ahead = ctx.once(("ahead", prefix.counts, id(mask)), lambda: _ahead(prefix, mask, alone=True))
        return prefix_region(k, v, q, ahead, None if self.cap is None else Score(cap=self.cap))

    def plans(self, device: str, length: int) -> dict[str, Plan]:
        """Which kernel would run each use of this layer on `device`, and why."""
        score = score_like(self.position, self.cap)

        def chosen(ctx: Context, rule: Mask, queries: int) -> Plan:
            if "regions" in self.position.hooks:
                return Plan("regions", "the position splits the keys into regions: merged attentions")
            mask, dtype = ctx.bind(rule), self.out.dtype
            prefix = rows_of(self, 1) if self.active else None
            mask = mask if prefix is None else _ahead(prefix, mask)
            return plan(
                device=device,
                dtype=dtype,
                queries=queries,
                width=max(self.head_dim, self.value_dim),
                mask=mask,
                score=score,
                dropout=self.dropout,
            )

        if self.cross:
            return {"cross": chosen(Context.of(1, length, torch.device("meta")), Full(), length)}
        found = plans_of(length, self.rule, self.newest[self.kept] if self.causal else None, chosen)
        if self.position.turns and not self.normed:
            found["positions"] = rotary.plan(device, self.out.dtype)
        return found

    def project(self, x: Tensor, which: Literal["query", "key"]) -> Tensor:
        """The mixer's own map on other vectors (R,C) -> (R,heads,D): DeBERTa's shared projections."""
        H, G, D = self.heads, self.kv_heads, self.head_dim
        start, heads = (0, H) if which == "query" else (H * D, G)
        return self.qkv.rows(x, start, start + heads * D).unflatten(-1, (heads, D))


_FULL, _PADDING = interned(Full()), interned(Padding())


def _memory_coords(ctx: Context, length: int, segments: Tensor | None) -> Coords:
    order = torch.arange(length, device=ctx.order.device)[None]
    positions = order[..., None] if ctx.memory_positions is None else ctx.memory_positions
    return Coords(Side(ctx.order, None, ctx.positions), Side(order, segments, positions))


def _ahead(prefix: Rows, mask: BoundMask, alone: bool = False) -> BoundMask:
    """`mask` over keys that begin with a prefix; alone: over the prefix only."""
    q, k, there = mask.at.q, mask.at.k, prefix.there
    count = prefix.tensors[0].shape[1]
    order = torch.arange(count, device=k.order.device)[None]
    segments = None if there is None else torch.where(there, 0, -1)
    axes = 1 if k.positions is None else k.positions.shape[-1]
    side = Side(order - count, segments, order[..., None].expand(-1, -1, axes))
    rule = Ahead(mask.rule, there is not None)
    return BoundMask(rule, Coords(q, side if alone else _joined(side, k)))


def _joined(a: Side, b: Side) -> Side:
    """The tokens of both sides, in that order."""

    def cat(x: Tensor, y: Tensor) -> Tensor:
        rows = max(x.shape[0], y.shape[0])
        return torch.cat([t.expand(rows, *t.shape[1:]) for t in (x, y)], 1)

    segments = None
    if a.segments is not None or b.segments is not None:
        segments = cat(*(torch.zeros_like(s.order) if s.segments is None else s.segments for s in (a, b)))
    positions = None if a.positions is None or b.positions is None else cat(a.positions, b.positions)
    return Side(cat(a.order, b.order), segments, positions)
