"""Multi-head latent attention: keys and values are read from one small latent, which is all that decoding keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels.attention import BoundMask, Coords, attend, plan
from dovetail.kernels.plan import Plan
from dovetail.parts.attention.options import plans_of
from dovetail.parts.context import Context, refuse_memory
from dovetail.parts.mask import Causal, Full, Mask, interned, narrowed
from dovetail.parts.norm import RmsNorm
from dovetail.parts.position.base import PositionModule, check_axes, check_hooks
from dovetail.parts.position.rotary import Rope
from dovetail.parts.state import KVState, Room
from dovetail.parts.weights import Linear
from dovetail.spec import Slot, Spec, register
from dovetail.spec.categories import MaskPart, NormPart, PositionPart
from dovetail.spec.ranges import Chance, Count, Natural, Positive


@register(
    "mixer",
    "latent",
    oracle="transformers deepseek_v2",
    source="DeepSeek-AI 2024 (DeepSeek-V2), section 2.1 and eq. 37-47",
    causal=True,
    bidirectional=True,
)
class LatentAttention(Spec):
    """MLA. rank: width of the key/value latent. query_rank: width of the queries' latent; none unless given.

    nope_dim, rope_dim: parts of a head without and with position, the turned part of the key shared by all heads;
    value_dim: width of a value. Defaults: dim / heads, half of it, and nope_dim. bias: on the maps into the latents
    and out of the heads. norm: of the latents. scale: 1/sqrt(nope_dim + rope_dim) unless given. A state keeps
    rank + rope_dim numbers a token.
    """

    rank: Count
    query_rank: Count | None = None
    heads: Count | None = None
    nope_dim: Count | None = None
    rope_dim: Natural | None = None
    value_dim: Count | None = None
    bias: bool = False
    norm: NormPart = RmsNorm()
    scale: Positive | None = None
    dropout: Chance = 0.0
    mask: MaskPart | None = None
    position: PositionPart = Rope(layout="interleaved")

    def build(self, slot: Slot) -> nn.Module:
        return LatentModule(self, slot)

    def sizes(self, dim: int) -> tuple[int, int, int, int]:
        """(heads, unturned width, turned width, value width) at a model width of `dim`."""
        heads = self.heads or max(1, dim // 64)
        nope = dim // heads if self.nope_dim is None else self.nope_dim
        rope = max(2, nope // 4 * 2) if self.rope_dim is None else self.rope_dim
        return heads, nope, rope, self.value_dim or nope


class LatentModule(nn.Module):
    offers: ClassVar[frozenset[str]] = frozenset({"rotate"})

    def __init__(self, spec: LatentAttention, slot: Slot):
        super().__init__()
        H, nope, rope, Dv = self.sizes = spec.sizes(slot.dim)
        self.rank, self.dropout, self.path, self.causal = spec.rank, spec.dropout, slot.path, slot.causal
        self.scale = (nope + rope) ** -0.5 if spec.scale is None else spec.scale
        if slot.memory_dim is not None:
            raise BuildError("latent attention does not read an encoder", where=slot.path, remedy="use attention")
        inside = replace(slot, heads=H, head_dim=rope)
        if spec.query_rank is None:
            self.q = Linear(slot.dim, H * (nope + rope), slot=inside, role="query")
        else:
            self.q_down = Linear(slot.dim, spec.query_rank, slot=inside, bias=spec.bias)
            self.q_norm = inside.build(spec.norm, "q_norm", dim=spec.query_rank)
            self.q = Linear(spec.query_rank, H * (nope + rope), slot=inside, role="query")
        self.query_latent = spec.query_rank is not None
        self.kv_down = Linear(slot.dim, spec.rank + rope, slot=inside, bias=spec.bias)
        self.kv_norm = inside.build(spec.norm, "kv_norm", dim=spec.rank)
        self.kv_up = Linear(spec.rank, H * (nope + Dv), slot=inside)
        self.out = Linear(H * Dv, slot.width_out, slot=slot, bias=spec.bias, role="residual")
        self.position: PositionModule = inside.build(spec.position, "position")
        check_hooks(self.position, self.offers, spec.position.kind, f"{slot.path}.position", "latent attention")
        check_axes(self.position, spec.position.kind, slot)
        rule: Mask = Causal() if slot.causal else Full()
        extra: Any = spec.mask
        self.rule = narrowed(rule, extra, slot.path)
        self.kept = self.rule.kept() if slot.causal else None
        self.newest = {kept: interned(self.rule.for_newest(kept)) for kept in (None, self.kept)}

    def new_state(self, room: Room) -> KVState:
        """Latent and turned key side by side, as one head of keys without values."""
        return KVState(room.timeline(self.kept), 1, self.rank + self.sizes[2], 0, room.dtype)

    def forward(
        self, x: Tensor, ctx: Context, state: Any = None, *, keys: Tensor | None = None, values: Tensor | None = None
    ) -> Tensor:
        """x (B,T,C) -> (B,T,C')."""
        refuse_memory(keys, values, self.path)
        H, nope, rope, _ = self.sizes
        q = self.q(self.q_norm(self.q_down(x))) if self.query_latent else self.q(x)
        q, q_turned = q.unflatten(-1, (H, nope + rope)).split([nope, rope], -1)
        latent, k_turned = self.kv_down(x).split([self.rank, rope], -1)
        latent, k_turned = self.kv_norm(latent), k_turned[:, :, None]
        if state is None:
            at = ctx.coords
            q_turned, k_turned = self.position.rotate(q_turned, k_turned, at, ctx)
            return self._expanded(q, q_turned, latent, k_turned, self.rule, at, ctx)
        raw = self.position.caches == "raw"
        if not raw:
            fresh = ctx.once("fresh", lambda: Coords(ctx.side, ctx.side))
            q_turned, k_turned = self.position.rotate(q_turned, k_turned, fresh, ctx)
        stored, none = torch.cat([latent[:, :, None], k_turned], -1), x.new_empty(*x.shape[:2], 1, 0)
        stored, _, step = state.append(stored, none)
        latent, k_turned = stored[:, :, 0, : self.rank], stored[..., self.rank :]
        if raw:
            q_turned, k_turned = self.position.rotate(q_turned, k_turned, step.coords, ctx)
        rule = self.newest[state.timeline.kept] if step.newest else self.rule
        if self._absorbs(ctx.bind(rule, step.coords), q, stored.shape[1]):
            k = torch.cat([latent[:, :, None], k_turned], -1) if raw else stored
            return self._absorbed(q, q_turned, k, rule, step.coords, ctx)
        return self._expanded(q, q_turned, latent, k_turned, rule, step.coords, ctx)

    def plans(self, device: str, length: int) -> dict[str, Plan]:
        """Which kernel would run each use of this layer on `device`, and why."""

        def chosen(ctx: Context, rule: Mask, queries: int) -> Plan:
            mask, dtype = ctx.bind(rule), self.out.dtype
            absorbed = self._fewer_operations(queries, length)
            width = self.rank + self.sizes[2] if absorbed else max(sum(self.sizes[1:3]), self.sizes[3])
            asked: dict[str, Any] = {"device": device, "dtype": dtype, "queries": queries, "width": width}
            found = plan(**asked, mask=mask, score=None, dropout=self.dropout)
            how = "maps absorbed, one shared head" if absorbed else "latents expanded"
            return Plan(found.path, f"{how}; {found.why}")

        return plans_of(length, self.rule, self.newest[self.kept] if self.causal else None, chosen)

    def _absorbs(self, mask: BoundMask, q: Tensor, stored: int) -> bool:
        """Whether the new tokens, of queries q (B,T,H,D), are read in the latent. On CUDA, several only where a kernel takes
        heads of its width: fused attention ends below, and plain attention would repeat the shared head for every other."""
        new = q.shape[1]
        if new > 1 and q.is_cuda:
            width = self.rank + self.sizes[2]
            found = plan(device="cuda", dtype=q.dtype, queries=new, width=width, mask=mask, score=None)
            if found.path != "split keys":
                return False
        return self._fewer_operations(new, stored)

    def _fewer_operations(self, new: int, stored: int) -> bool:
        """Whether `new` tokens against `stored` ones, themselves among them, take fewer multiplications absorbed."""
        # Of one head, r the rank, d and e the unturned and turned width, v the value's:
        #   expanded  stored·r·(d+v) for keys and values, new·stored·(d+e+v) for the attention over them;
        #   absorbed  new·r·(d+v) for queries and results, new·stored·((r+e)+r) for the attention over latents.
        # For DeepSeek-V2 (512, 128, 64, 128) before many tokens that is up to 170 new ones. Bytes only lean further that way:
        # expanded keys and values are written and read again, stored·(d+e+v) of every head. Timed on a CPU for it, 16
        # heads and 1,024 tokens, expanded took 4.7, 1.9 and 1.2 times as long for 16, 64 and 128, by the count 7.0, 1.95 and 1.1.
        _, nope, rope, Dv = self.sizes
        maps = self.rank * (nope + Dv)
        expanded = stored * maps + new * stored * (nope + rope + Dv)
        return new < stored and new * maps + new * stored * (2 * self.rank + rope) < expanded

    def _expanded(
        self, q: Tensor, q_turned: Tensor, latent: Tensor, k_turned: Tensor, rule: Mask, at: Coords, ctx: Context
    ) -> Tensor:
        """Keys and values of every head from the latents (B,S,rank): for many queries."""
        H, nope, _, Dv = self.sizes
        k, v = self.kv_up(latent).unflatten(-1, (H, nope + Dv)).split([nope, Dv], -1)
        q, k = torch.cat([q, q_turned], -1), torch.cat([k, k_turned.expand(-1, -1, H, -1)], -1)
        return self._attend(q, k, v, rule, at, ctx)

    def _absorbed(self, q: Tensor, q_turned: Tensor, k: Tensor, rule: Mask, at: Coords, ctx: Context) -> Tensor:
        """The key map moved into the query and the value map behind the softmax: one shared head k (B,S,1,rank+rope), of
        which the values are the first part; nothing expanded or copied."""
        H, nope, _, Dv = self.sizes
        weight, bias = self.kv_up.effective(self.kv_up.dense(), self.kv_up.bias)
        up = weight.unflatten(0, (H, nope + Dv)) * self.kv_up.multiplier
        q = torch.cat([torch.einsum("bthd,hdr->bthr", q, up[:, :nope]), q_turned], -1)
        mixed = self._softmax(q, k, k[..., : self.rank], rule, at, ctx)
        y = torch.einsum("bhtr,hdr->bthd", mixed, up[:, nope:])
        if bias is not None:  # of an adapter. Its keys add the same to every score; its values' weights sum to one
            y = y + (bias.unflatten(0, (H, nope + Dv))[:, nope:] * self.kv_up.multiplier).to(y.dtype)
        return self.out(y.flatten(-2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, rule: Mask, at: Coords, ctx: Context) -> Tensor:
        return self.out(self._softmax(q, k, v, rule, at, ctx).transpose(1, 2).flatten(-2))

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, rule: Mask, at: Coords, ctx: Context) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return attend(q, k, v, mask=ctx.bind(rule, at), scale=self.scale, dropout=dropout)
