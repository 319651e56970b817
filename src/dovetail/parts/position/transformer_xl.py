"""Transformer-XL: content against content and content against distance, each with a learned bias of the query."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels.attention import Content, Coords, RelativeLogits, Score, Side
from dovetail.parts.context import Context
from dovetail.parts.position.base import PositionModule, head_width, refuse_cross
from dovetail.parts.position.waves import waves
from dovetail.parts.weights import Linear, Rng
from dovetail.spec import Slot, Spec, register


@register(
    "position",
    "transformer_xl",
    oracle="golden: kimiyoung/transformer-xl pytorch/mem_transformer.py",
    source="Dai et al. 2019 (Transformer-XL), section 3.3",
    endless=True,
)
class TransformerXL(Spec):
    """(q + u)·k + (q + v)·W_r R(i - j), both inside the scale; R is sinusoidal: all sines, then all cosines.

    W_r (H·D, C) without bias, u and v (H, D) are learned, in every layer. The memory is what the state holds. Of T tokens
    the second half is a product of queries and distances: (B,H,T,T) numbers in the model's type, as a dense bias has
    (2T in a row where tokens ahead are seen), which own kernels read where they lie, without a shift.
    """

    def build(self, slot: Slot) -> nn.Module:
        return TransformerXLModule(self, slot)


class TransformerXLModule(PositionModule):
    hooks: ClassVar[frozenset[str]] = frozenset({"rotate", "score"})
    relative: ClassVar[bool] = True
    undecayed: ClassVar[frozenset[str]] = frozenset({"u", "v"})

    def __init__(self, spec: Spec, slot: Slot):
        super().__init__()
        refuse_cross(slot, spec.kind)
        width = head_width(slot, spec.kind)
        if slot.dim % 2:
            raise BuildError(
                f"position {spec.kind!r} makes sines and cosines, and the model's width is {slot.dim}",
                where=slot.path,
                remedy="choose an even width",
            )
        self.slot = slot
        self.r = Linear(slot.dim, slot.heads * width, slot=slot, role="key")
        self.r.read_whole = True
        self.u, self.v = (nn.Parameter(torch.empty(slot.heads, width)) for _ in range(2))

    def initialise(self, rng: Rng) -> None:
        for name, p in self.named_parameters(recurse=False):
            self.slot.init.draw(p, "position", p.shape[-2], p.shape[-1], self.slot, rng(name))

    def rotate(self, q: Tensor, k: Tensor, at: Coords, ctx: Context) -> tuple[Tensor, Tensor]:
        """q + u: the content's half needs no term of the score."""
        return q + self.u.to(q.dtype), k

    def score(self, q: Tensor, k: Tensor, at: Coords, ctx: Context, project: Callable[..., Any]) -> Score:
        same = at.in_step and (at.aligned or at.q is at.k)
        return Score((self._logits(q, ctx) if same else self._distance(q, at),))

    @property
    def _weight(self) -> Tensor:
        """W_r as it acts, (H·D,C)."""
        return self.r.matrix() * self.r.multiplier

    def _logits(self, q: Tensor, ctx: Context) -> RelativeLogits:
        """(q + v)·W_r R(i - j) of the tokens' own distances, which are less than their number: nothing is clipped."""
        T, H = q.shape[1:3]
        # A column more than there are distances ahead: rows of an even length are what products are fast for.
        back, ahead = max(T - 1, 1), 0 if self.slot.causal else T

        def made() -> Tensor:
            away = torch.arange(back, -ahead - 1, -1, device=q.device)[None]
            cos, sin = waves(Side(away, positions=away[..., None]), self.r.in_features, q.dtype)
            return torch.cat([sin, cos], -1)[0].T  # (C,back+ahead+1)

        known = ctx.once(("distances", back, ahead, self.r.in_features, q.dtype), made)
        vectors = (self._weight @ known).unflatten(0, (H, -1))  # (H,D,back+ahead+1)
        return RelativeLogits((q + self.v).transpose(1, 2) @ vectors, back)

    def _distance(self, q: Tensor, at: Coords) -> Content:
        """(q + v)·W_r R(i - j), as a product of what the query makes of its position with the waves of the key's.

        sin(i - j) = sin i cos j - cos i sin j, and so for the cosine: exact at any positions, whatever is padded,
        packed or remembered.
        """
        (_, T, H, D), C = q.shape, self.r.in_features
        weight = self._weight.unflatten(0, (H, D))
        cos_q, sin_q = (w[:, None] for w in waves(at.q, C, q.dtype))  # (B|1,1,T,C/2)
        keys = torch.cat(waves(at.k, C, q.dtype), -1)[:, None]  # (B|1,1,S,C)

        def compute(start: int, stop: int) -> Tensor:
            sines, cosines = torch.einsum("bthd,hdc->bhtc", q[:, start:stop] + self.v, weight).chunk(2, -1)
            cos, sin = cos_q[:, :, start:stop], sin_q[:, :, start:stop]
            turned = torch.cat([sines * sin + cosines * cos, cosines * sin - sines * cos], -1)
            return turned @ keys.mT

        return Content(compute, T)
