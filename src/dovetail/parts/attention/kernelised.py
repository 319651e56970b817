"""What attentions without a softmax share: maps to queries, keys and values, refusals, and a state that does not grow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels.linear_attention import plan
from dovetail.kernels.plan import Plan
from dovetail.parts.attention.options import by_name
from dovetail.parts.context import Context, refuse_memory
from dovetail.parts.position.base import PositionModule, check_axes, check_hooks
from dovetail.parts.state import Room, VectorState
from dovetail.parts.weights import Linear
from dovetail.spec import Slot, Spec
from dovetail.spec.ranges import Count


class Kernelised(Spec):
    """Base. heads: max(1, dim // 64) unless given. kv_heads: heads unless given. head_dim: dim / heads unless given;
    value_dim: head_dim unless given. bias: which maps carry one. Weights lie as in `attention`: qkv, out."""

    keeps: ClassVar[tuple[str, ...]] = ("heads", "kv_heads", "head_dim", "value_dim", "bias")
    heads: Count | None = None
    kv_heads: Count | None = None
    head_dim: Count | None = None
    value_dim: Count | None = None
    bias: Literal["none", "qkv", "out", "all"] = "none"

    def sizes(self, dim: int) -> tuple[int, int, int, int]:
        """(heads, key/value heads, head width, value width) at a model width of `dim`."""
        heads = self.heads or max(1, dim // 64)
        width = self.head_dim or dim // heads
        return heads, self.kv_heads or heads, width, self.value_dim or width

    def hands_on(self, dim: int | None) -> dict[str, Any]:
        return super().hands_on(dim) | ({} if dim is None else by_name(self.sizes(dim)))


class KernelisedModule(nn.Module):
    """Base: a subclass says in `mix` what becomes of the heads, and in `new_state` what it remembers.

    widths: (heads, key/value heads, head width, value width).
    """

    offers: ClassVar[frozenset[str]] = frozenset({"rotate"})
    position: PositionModule

    def __init__(self, spec: Kernelised, slot: Slot):
        super().__init__()
        refuse_encoder(slot, spec.kind)
        self.widths = H, G, D, E = spec.sizes(slot.dim)
        self.head_dim, self.value_dim = D, E
        check_heads(H, G, spec.head_dim is not None, slot)
        self.path, self.causal = slot.path, slot.causal
        bias = spec.bias in ("qkv", "all")
        reads = (("query", H * D), ("key", G * D), ("value", G * E))
        self.qkv = Linear(slot.dim, H * D + G * (D + E), slot=slot, bias=bias, parts=reads)
        self.out = Linear(H * E, slot.width_out, slot=slot, bias=spec.bias in ("out", "all"), role="residual")

    def new_state(self, room: Room) -> VectorState:
        raise TypeError(f"{type(self).__name__} does not say what it remembers")

    def mix(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: VectorState | None) -> Tensor:
        """(B,H,T,E) from q (B,T,H,D), k (B,T,G,D), v (B,G,T,E)."""
        raise TypeError(f"{type(self).__name__} does not say how it mixes")

    def forward(
        self, x: Tensor, ctx: Context, state: Any = None, *, keys: Tensor | None = None, values: Tensor | None = None
    ) -> Tensor:
        """x (B,T,C) -> (B,T,C')."""
        refuse_memory(keys, values, self.path)
        H, G, D, E = self.widths
        q, k, v = self.qkv(x).split([H * D, G * D, G * E], -1)
        v = v.unflatten(-1, (G, E)).transpose(1, 2)
        y = self.mix(q.unflatten(-1, (H, D)), k.unflatten(-1, (G, D)), v, ctx, state)
        return self.out(y.to(x.dtype).transpose(1, 2).flatten(-2))

    def plans(self, device: str, length: int) -> dict[str, Plan]:
        """Which kernel would run each use of this layer, and why."""
        _, _, D, E = self.widths
        return plans_of(self.causal, length, device, max(getattr(self, "features", D), E))


def plans_of(causal: bool, length: int, device: str, widest: int) -> dict[str, Plan]:
    """The plan of every use of a linear attention. widest: features or values of a head, whichever are more."""
    place = {"causal": causal, "device": device, "widest": widest}
    uses = {
        "training, prefill": plan(length, segments=False, state=False, **place),
        "padded or packed": plan(length, segments=True, state=False, **place),
    }
    return uses | {"decoding": plan(1, causal=True, segments=False, state=True)} if causal else uses


def zeros(room: Room, *sizes: int) -> Tensor:
    """(B, sizes) of a state, in fp32 or better, whatever the model's type."""
    wide = torch.promote_types(room.dtype, torch.float32)
    return torch.zeros(room.batch, *sizes, dtype=wide, device=room.device)


def built_position(spec: Any, slot: Slot, widths: tuple[int, int, int, int], dim: int) -> PositionModule:
    """The position of a mixer `spec`, which turns vectors of `dim` (of an odd width all but the last entry).

    Raises BuildError for one that works by more than turning, or needs the keys of the past once more.
    """
    inner = replace(slot, heads=widths[0], kv_heads=widths[1], head_dim=dim - dim % 2, value_dim=widths[3])
    position: PositionModule = inner.build(spec.position, "position")
    kind, where = spec.position.kind, f"{slot.path}.position"
    check_hooks(position, KernelisedModule.offers, kind, where, f"the mixer {spec.kind}")
    check_axes(position, kind, slot)
    if slot.causal and position.caches == "raw":
        raise BuildError(
            f"position {kind!r} turns the keys of the past anew at every step, and the mixer {spec.kind} keeps no keys",
            where=where,
            remedy="use one whose turned keys stay as they are (rope without a scaling that goes by the length), or an "
            "attention",
        )
    return position


def refuse_encoder(slot: Slot, kind: str) -> None:
    """Raises BuildError in the place of a cross-attention."""
    if slot.memory_dim is not None:
        raise BuildError(f"the mixer {kind} does not read an encoder", where=slot.path, remedy="use attention there")


def check_heads(heads: int, kv_heads: int, given: bool, slot: Slot) -> None:
    """Raises BuildError for numbers of heads that do not divide. given: whether the spec says their width."""
    if heads % kv_heads:
        raise BuildError(
            f"{heads} heads cannot share {kv_heads} key/value heads",
            where=slot.path,
            remedy="kv_heads must divide heads",
        )
    if not given and slot.dim % heads:
        raise BuildError(
            f"{heads} heads do not divide a width of {slot.dim}",
            where=slot.path,
            remedy="give head_dim, or another number of heads",
        )
