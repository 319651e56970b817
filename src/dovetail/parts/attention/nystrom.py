"""Nyström attention: softmax attention through a few landmarks, the means of stretches of the row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels.attention import BoundMask, Coords, Side, attend, plan
from dovetail.kernels.plan import Plan
from dovetail.parts.attention.low_rank import check_place, refuse_packed
from dovetail.parts.context import Context, refuse_memory
from dovetail.parts.mask import Padding
from dovetail.parts.position.cnn import Closed, neighbours, over_documents
from dovetail.parts.weights import Linear, Rng
from dovetail.spec import Slot, Spec, register
from dovetail.spec.ranges import Count

_PADDING = Padding()


@register(
    "mixer",
    "nystrom",
    oracle="transformers nystromformer NystromformerSelfAttention",
    source="Xiong et al. 2021 (Nyströmformer), eq. 13 and section 3.2",
    bidirectional=True,
    causal=False,
)
class Nystrom(Spec):
    """softmax(q k̃ᵀ) Z softmax(q̃ kᵀ) v, scores times 1/√D: q̃ and k̃ are the means of `landmarks` stretches of the row.

    Z: the pseudo-inverse of softmax(q̃ k̃ᵀ), by `iterations` of eq. 11 from its transpose over ‖·‖₁, for each head.
    Stretches of the row's real tokens are as equal as can be. conv: width of a convolution of the values along the row,
    one filter a head, added to the result.
    """

    keeps: ClassVar[tuple[str, ...]] = ("heads", "head_dim")
    landmarks: Count = 64
    iterations: Count = 6
    conv: Count | None = None
    heads: Count | None = None
    head_dim: Count | None = None
    bias: bool = False

    def build(self, slot: Slot) -> nn.Module:
        return NystromModule(self, slot)


class NystromModule(nn.Module):
    def __init__(self, spec: Nystrom, slot: Slot):
        super().__init__()
        self.heads, self.head_dim = H, D = check_place(slot, "nystrom", spec.heads, spec.head_dim)
        self.landmarks, self.iterations, self.path = spec.landmarks, spec.iterations, slot.path
        if spec.conv is not None and spec.conv % 2 == 0:
            raise BuildError(f"conv={spec.conv} has no middle", where=slot.path, remedy="give an odd width")
        slot = replace(slot, heads=H, kv_heads=H, head_dim=D, value_dim=D)
        parts = (("query", H * D), ("key", H * D), ("value", H * D))
        self.qkv = Linear(slot.dim, 3 * H * D, slot=slot, bias=spec.bias, parts=parts)
        self.out = Linear(H * D, slot.width_out, slot=slot, bias=spec.bias, role="residual")
        self.conv = None if spec.conv is None else HeadConvolution(H, spec.conv, slot.at("conv"))

    def forward(
        self, x: Tensor, ctx: Context, state: Any = None, *, keys: Tensor | None = None, values: Tensor | None = None
    ) -> Tensor:
        """x (B,T,C) -> (B,T,C'). Raises DataError for packed rows."""
        refuse_memory(keys, values, self.path)
        refuse_packed(ctx, "nystrom", self.path)
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2))
        means, there = ctx.once(("landmarks", self.landmarks), lambda: landmarks(ctx, self.landmarks))
        wide = torch.promote_types(x.dtype, torch.float32)
        q_means, k_means = ((means.to(wide) @ t.to(wide)) for t in (q, k))
        count = torch.arange(self.landmarks, device=x.device)[None]
        marks = Side(count, torch.where(there, 0, -1))
        full = attend(q_means, k_means, torch.eye(self.landmarks, device=x.device, dtype=wide).expand_as(
            q_means @ k_means.mT), mask=BoundMask(_PADDING, Coords(marks, marks)))  # fmt: skip
        # Landmarks without tokens: nobody sees them, and the inverse has ones there.
        full = torch.where(there[:, None, :, None], full, torch.diag_embed((~there).to(wide))[:, None])
        padding = BoundMask(_PADDING, Coords(marks, ctx.side)) if ctx.segments is not None else None
        seen = attend(q_means.to(x.dtype), k, v, mask=padding)
        seen = (inverse(full, self.iterations) @ seen.to(wide)).to(x.dtype)
        y = attend(q, k_means.to(x.dtype), seen, mask=BoundMask(_PADDING, Coords(ctx.side, marks))).transpose(1, 2)
        y = y.flatten(2)
        return self.out(y if self.conv is None else y + self.conv(v.transpose(1, 2).flatten(2), ctx))

    def plans(self, device: str, length: int) -> dict[str, Plan]:
        """Which kernel would run each use of this layer on `device`, and why."""
        found = plan(device=device, dtype=self.out.dtype, queries=length, mask=None, score=None)
        return {"queries to landmarks": found, "landmarks to keys": found}


class HeadConvolution(nn.Module):
    """Σ_j w_j v_{t+j} along each document, one filter a head: weight (H, kernel)."""

    def __init__(self, heads: int, kernel: int, slot: Slot):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, kernel))
        self.slot = slot

    def initialise(self, rng: Rng) -> None:
        self.slot.init.draw(self.weight, "in", self.weight.shape[1], 1, self.slot, rng("weight"))

    def forward(self, v: Tensor, ctx: Context) -> Tensor:
        """(B,T,H·D) -> (B,T,H·D)."""
        return over_documents(v, ctx, self._along)

    def _along(self, v: Tensor, closed: Closed | None) -> Tensor:
        heads, side = self.weight.shape[0], self.weight.shape[1] // 2
        near = torch.stack(neighbours(v, side, side, closed, None))
        return torch.einsum("jbthd,hj->bthd", near.unflatten(-1, (heads, -1)), self.weight).flatten(2)


def landmarks(ctx: Context, count: int) -> tuple[Tensor, Tensor]:
    """(means (B|1,1,count,T), there (B|1,count)): the weights of each landmark's mean, and whether it has tokens."""
    real = torch.ones_like(ctx.order, dtype=torch.bool) if ctx.segments is None else ctx.segments >= 0
    tokens = real.sum(-1, keepdim=True).clamp_min(1)
    stretch = torch.where(real, ctx.order * count // tokens, -1)
    belongs = stretch[:, None, :] == torch.arange(count, device=stretch.device)[:, None]
    size = belongs.sum(-1, keepdim=True)
    return (belongs / size.clamp_min(1))[:, None], size[..., 0] > 0


def inverse(a: Tensor, iterations: int) -> Tensor:
    """The pseudo-inverse of a (...,m,m) with rows that sum to 1, by Razavi et al.'s iteration of order three (eq. 11)."""
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = a.mT / a.sum(-2, keepdim=True).amax(-1, keepdim=True)
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
    return z
