"""Locality-sensitive hashing attention: a query sees only keys that random rotations put into its bucket."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels.attention import BoundMask, Coords, Side
from dovetail.kernels.attention.rounds import INDEX, Near, attend_rounds, attend_sorted, sorting
from dovetail.kernels.plan import Plan
from dovetail.parts.context import Context, refuse_memory
from dovetail.parts.state import FAR, KVState, Room
from dovetail.parts.weights import Linear
from dovetail.spec import Slot, Spec, register
from dovetail.spec.ranges import Chance, Count, Natural

_BUCKET = 2**20  # a place in a bucket is bucket · _BUCKET + chunk of the bucket


@register(
    "mixer",
    "lsh",
    oracle="transformers reformer LSHSelfAttention",
    source="Kitaev et al. 2020 (Reformer), section 2",
    causal=True,
    bidirectional=True,
)
class LshAttention(Spec):
    """softmax(q kᵀ) v over the keys of one's bucket, k = q/‖q‖; buckets are argmax([x R; -x R]) of random rotations R.

    A token sees itself only where it would see nothing. rounds: hashings whose softmaxes become one; a key met in two
    counts twice. buckets: 1, or an even number, or several whose product they are (each with rotations of its own).
    seed: of the rotations. chunk: tokens that attend together; None takes buckets whole (quadratic memory).
    chunks_of: "bucket" cuts every bucket into chunks by its own count, and a token sees its own chunk, `before` chunks
    before it and `after` behind it: what comes later changes nothing. "sorted" cuts the row sorted by bucket, across
    buckets, as Reformer does (whose first chunk also sees the last one, which is left out here): in a causal place
    later tokens then decide *which* earlier ones are seen, so it cannot decode. Positions enter at the stack.
    """

    keeps: ClassVar[tuple[str, ...]] = ("heads", "head_dim", "dropout")
    heads: Count | None = None
    head_dim: Count | None = None
    buckets: Count | tuple[Count, ...] = 32
    rounds: Count = 4
    seed: Natural = 0
    chunk: Count | None = 64
    before: Natural = 1
    after: Natural = 0
    chunks_of: Literal["bucket", "sorted"] = "bucket"
    dropout: Chance = 0.0

    def build(self, slot: Slot) -> nn.Module:
        return LshModule(self, slot)

    def factors(self) -> tuple[int, ...]:
        return (self.buckets,) if isinstance(self.buckets, int) else self.buckets


class LshModule(nn.Module):
    def __init__(self, spec: LshAttention, slot: Slot):
        super().__init__()
        H = spec.heads or max(1, slot.dim // 64)
        D = spec.head_dim or slot.dim // H
        _check(spec, slot, H)
        self.heads, self.head_dim, self.path, self.causal = H, D, slot.path, slot.causal
        self.factors, self.chunk, self.per_bucket = spec.factors(), spec.chunk, spec.chunks_of == "bucket"
        self.dropout = spec.dropout
        self.rule = Near(*((spec.before, spec.after) if spec.chunk else (0, 0)), causal=slot.causal)
        slot = replace(slot, heads=H, kv_heads=H, head_dim=D, value_dim=D)
        self.qkv = Linear(slot.dim, 2 * H * D, slot=slot, parts=(("key", H * D), ("value", H * D)))
        self.out = Linear(H * D, slot.width_out, slot=slot, role="residual")
        rng = torch.Generator("cpu").manual_seed(spec.seed * 1_000_003 + slot.layer)
        columns = sum(factor // 2 for factor in self.factors)
        self.rotations = torch.randn(H, D, spec.rounds, columns, generator=rng, device="cpu")  # (no weight)

    def new_state(self, room: Room) -> KVState:
        """Queries (which are the keys) before their normalisation, and values; they are hashed again at every step."""
        if not self.per_bucket:
            raise BuildError(
                "lsh with chunks_of='sorted' cannot decode: tokens to come decide which earlier ones are seen",
                where=self.path,
                remedy="use chunks_of='bucket', whose chunks only the past decides",
            )
        return KVState(room.timeline(), self.heads, self.head_dim, self.head_dim, room.dtype)

    def forward(
        self, x: Tensor, ctx: Context, state: Any = None, *, keys: Tensor | None = None, values: Tensor | None = None
    ) -> Tensor:
        """x (B,T,C) -> (B,T,C')."""
        refuse_memory(keys, values, self.path)
        q, v = self.qkv(x).unflatten(-1, (2, self.heads, self.head_dim)).unbind(2)
        order, segments = ctx.order, ctx.segments
        if state is not None:
            stored_q, stored_v, step = state.append(q, v)
            if not step.coords.aligned:
                return self._mapped(self._decoded(q, v, stored_q, stored_v, step.coords), x)
        whole = segments is None
        order, segments = self._folded_side(order, torch.zeros_like(order) if segments is None else segments, x)
        q, v = _folded(q), _folded(v)
        k, orders = _unit(q), self._orders(q, order, segments)
        dropout = self.dropout if self.training else 0.0
        if self.chunk is None or self.chunk >= x.shape[1]:
            side = [Side(o, segments) for o in orders]
            masks = [BoundMask(self.rule, Coords(s, s)) for s in side]
            return self._mapped(attend_rounds(q, k, v, masks, v, 1.0, dropout), x)
        ragged = 0 if whole and not self.per_bucket else 1  # chunks and pieces begin elsewhere
        behind = 0 if self.per_bucket and self.causal else self.rule.after + ragged
        reach = (self.rule.before + ragged, behind)
        y = attend_sorted(q, k, v, orders, segments, self.rule, self.chunk, reach, 1.0, dropout)
        return self._mapped(y, x)

    def _decoded(self, q: Tensor, v: Tensor, stored: Tensor, values: Tensor, at: Coords) -> Tensor:
        """New tokens (B,T,H,D) against all that are stored (B,S,H,D), whose slots are numbered by their order."""
        there = at.k.order < FAR
        order, segments = torch.where(there, at.k.order, 0), torch.where(there, 0, -1)
        order, segments = self._folded_side(order, segments, stored)
        own = at.q.order.repeat_interleave(self.heads, 0)
        raw = _folded(stored)
        orders = self._orders(raw, order, segments)
        k_sides = [Side(o, segments) for o in orders]
        masks = [BoundMask(self.rule, Coords(Side(s.order.gather(1, own), torch.zeros_like(own)), s)) for s in k_sides]
        return attend_rounds(_folded(q), _unit(raw), _folded(values), masks, _folded(v), 1.0)

    def _mapped(self, y: Tensor, x: Tensor) -> Tensor:
        """(B·H,T,D) -> (B,T,C')."""
        return self.out(y.unflatten(0, (x.shape[0], self.heads)).transpose(1, 2).flatten(2))

    def _folded_side(self, order: Tensor, segments: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B|1,S) -> (B·H,S)."""
        order, segments = (t.expand(x.shape[0], -1).repeat_interleave(self.heads, 0) for t in (order, segments))
        return order, segments

    def _orders(self, x: Tensor, order: Tensor, segments: Tensor) -> list[Tensor]:
        """place · INDEX + order of every token in every round, (B·H,S) each; x (B·H,S,D)."""
        return [self._placed(bucket, order, segments) * INDEX + order for bucket in self.buckets(x)]

    def buckets(self, x: Tensor) -> list[Tensor]:
        """Of every round (B·H,S), from x (B·H,S,D); hashed in fp32 or better."""
        wide = torch.promote_types(x.dtype, torch.float32)
        rotations = self.rotations.to(x.device, wide)
        turned = torch.einsum("bhsd,hdrc->rbhsc", x.detach().to(wide).unflatten(0, (-1, self.heads)), rotations)
        found, stride, start = torch.zeros(turned.shape[:-1], dtype=torch.long, device=x.device), 1, 0
        for factor in self.factors:
            part = turned[..., start : start + factor // 2]
            if factor > 1:
                found = found + stride * torch.cat([part, -part], -1).argmax(-1)
            stride, start = stride * factor, start + factor // 2
        return list(found.flatten(1, 2))

    def _placed(self, bucket: Tensor, order: Tensor, segments: Tensor) -> Tensor:
        """Chunk of the bucket, or of the sorted document, that each token is in: (B·H,S)."""
        if self.chunk is None:
            return bucket
        sort = sorting(bucket * INDEX + order, segments)
        group = segments.gather(1, sort)
        group = group * prod(self.factors) + bucket.gather(1, sort) if self.per_bucket else group
        number = torch.arange(group.shape[1], device=group.device).expand_as(group)
        begins = torch.cat([torch.ones_like(group[:, :1], dtype=torch.bool), group[:, 1:] != group[:, :-1]], 1)
        rank = number - torch.where(begins, number, 0).cummax(-1).values
        chunk = torch.zeros_like(rank).scatter(1, sort, rank // self.chunk)
        return bucket * _BUCKET + chunk if self.per_bucket else chunk

    def plans(self, device: str, length: int) -> dict[str, Plan]:
        """Which kernel would run each use of this layer on `device`, and why."""
        if self.chunk is None or self.chunk >= length:
            whole = Plan("tiled", "hashed keys without chunks: plain attention under the mask of each round")
        else:
            whole = Plan("tiled", f"hashed keys: each round sorted, plain attention in chunks of {self.chunk}")
        step = Plan("tiled", "one query: plain attention over the stored keys under the mask of each round")
        return {"training, prefill": whole, "padded or packed": whole} | ({"decoding": step} if self.causal else {})


def _check(spec: LshAttention, slot: Slot, heads: int) -> None:
    def refuse(what: str, remedy: str) -> None:
        raise BuildError(what, where=slot.path, remedy=remedy)

    if slot.memory_dim is not None:
        refuse("an lsh attention shares queries and keys, and cannot read an encoder", "use attention there")
    if spec.head_dim is None and slot.dim % heads:
        refuse(f"{heads} heads do not divide a width of {slot.dim}", "give head_dim, or another number of heads")
    odd = [factor for factor in spec.factors() if factor % 2 and spec.buckets != 1]
    if odd or not spec.factors():
        refuse(f"buckets={spec.buckets}", "give 1, or even numbers: a rotation has two ends")
    if spec.chunk is None and (spec.chunks_of == "sorted" or (spec.before, spec.after) != (1, 0)):
        refuse("chunks_of, before or after without a chunk, which they speak of", "give chunk, or leave them out")
    if spec.after and slot.causal and spec.chunks_of == "bucket":
        refuse(f"after={spec.after} in a causal place: chunks behind one's own hold later tokens", "leave after out")


def _folded(x: Tensor) -> Tensor:
    """(B,S,H,D) -> (B·H,S,D)."""
    return x.transpose(1, 2).flatten(0, 1)


def _unit(q: Tensor) -> Tensor:
    """q/‖q‖ as Reformer computes it: by the mean square, with 1e-6 added."""
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * q.shape[-1] ** -0.5).to(q.dtype)
