"""Linformer: attention to a fixed number of weighted sums of the keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dovetail.errors import DataError
from dovetail.kernels.attention import attend, plan
from dovetail.kernels.plan import Plan
from dovetail.parts.attention.low_rank import check_place, refuse_packed
from dovetail.parts.context import Context, refuse_memory
from dovetail.parts.weights import Linear, Rng
from dovetail.spec import Slot, Spec, register
from dovetail.spec.ranges import Count


@register(
    "mixer",
    "linformer",
    oracle="formula: Wang et al. 2020, eq. 7; softmax attention by the identity",
    source="Wang et al. 2020 (Linformer), section 4, eq. 7",
    bidirectional=True,
    causal=False,
)
class Linformer(Spec):
    """softmax(q (E k)ᵀ·scale) (F v): E and F (rank, length) sum keys and values along the row, O(length · rank).

    length: tokens of a row at most; a shorter one uses the first columns, and padding adds nothing. share: E and F are
    of each head ("none"), the same for all heads ("heads"), or one matrix for all heads, keys and values ("key_value").
    """

    keeps: ClassVar[tuple[str, ...]] = ("heads", "head_dim")
    length: Count
    rank: Count = 256
    heads: Count | None = None
    head_dim: Count | None = None
    share: Literal["none", "heads", "key_value"] = "heads"
    bias: bool = False

    def build(self, slot: Slot) -> nn.Module:
        return LinformerModule(self, slot)


class LinformerModule(nn.Module):
    def __init__(self, spec: Linformer, slot: Slot):
        super().__init__()
        self.heads, self.head_dim = H, D = check_place(slot, "linformer", spec.heads, spec.head_dim)
        self.length, self.path = spec.length, slot.path
        slot = replace(slot, heads=H, kv_heads=H, head_dim=D, value_dim=D)
        parts = (("query", H * D), ("key", H * D), ("value", H * D))
        self.qkv = Linear(slot.dim, 3 * H * D, slot=slot, bias=spec.bias, parts=parts)
        self.out = Linear(H * D, slot.width_out, slot=slot, bias=spec.bias, role="residual")
        several = H if spec.share == "none" else 1
        both = 1 if spec.share == "key_value" else 2
        self.along = Along(both, several, spec.rank, spec.length, slot.at("along"))

    def forward(
        self, x: Tensor, ctx: Context, state: Any = None, *, keys: Tensor | None = None, values: Tensor | None = None
    ) -> Tensor:
        """x (B,T,C) -> (B,T,C'). Raises DataError for rows longer than `length`, or packed."""
        refuse_memory(keys, values, self.path)
        refuse_packed(ctx, "linformer", self.path)
        if x.shape[1] > self.length:
            raise DataError(
                f"a row of {x.shape[1]} tokens in a linformer for {self.length}",
                where=self.path,
                remedy="cut the row, or build it with a larger length",
            )
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        k, v = self.along(k, v, ctx)
        return self.out(attend(q.transpose(1, 2), k, v).transpose(1, 2).flatten(2))

    def plans(self, device: str, length: int) -> dict[str, Plan]:
        """Which kernel would run each use of this layer on `device`, and why."""
        found = plan(device=device, dtype=self.out.dtype, queries=length, mask=None, score=None)
        return {"whole rows": found, "padded": found}


class Along(nn.Module):
    """Weighted sums along the row: weight (1 or 2, 1 or H, rank, length), of keys and values or one for both."""

    def __init__(self, both: int, heads: int, rank: int, length: int, slot: Slot):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(both, heads, rank, length))
        self.slot = slot

    def initialise(self, rng: Rng) -> None:
        rank, length = self.weight.shape[2:]
        flat = self.weight.view(-1, length)
        self.slot.init.draw(flat, "in", length, rank, self.slot, rng("weight"))

    def forward(self, k: Tensor, v: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """k, v (B,T,H,D) -> (B,H,rank,D)."""
        first, last = self.weight[0], self.weight[-1]
        if ctx.segments is None:
            T = k.shape[1]
            found = [torch.einsum("hrt,bthd->bhrd", self._every(w[..., :T], k), t) for w, t in ((first, k), (last, v))]
            return found[0], found[1]
        real = (ctx.segments >= 0)[..., None, None]
        summed = []
        for w, t in ((first, k), (last, v)):
            columns = self._every(w, k)[:, :, ctx.order.expand(k.shape[:2])]  # a token's column, wherever it stands
            summed.append(torch.einsum("hrbt,bthd->bhrd", columns, torch.where(real, t, 0)))
        return summed[0], summed[1]

    def _every(self, weight: Tensor, k: Tensor) -> Tensor:
        """(1 or H, rank, length) -> (H, rank, length)."""
        return weight.expand(k.shape[2], -1, -1)
