"""XLNet: Transformer-XL's relative position, in both directions, and whether two tokens are of one segment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels.attention import Content, Coords, Score
from dovetail.parts.context import Context
from dovetail.parts.position.transformer_xl import TransformerXLModule
from dovetail.spec import Slot, Spec, register


@register(
    "position",
    "xlnet",
    oracle="transformers xlnet XLNetRelativeAttention",
    source="Yang et al. 2019 (XLNet), section 2.4-2.5; Dai et al. 2019",
    endless=True,
)
class XLNet(Spec):
    """(q + u)·k + (q + v)·W_r R(i - j) + (q + s)·e[segments differ], all inside the scale.

    u, v and s are r_w_bias, r_r_bias and r_s_bias of the published checkpoints, e (2, H, D) their seg_embed. Segments
    are a second position axis: positions (B,T,2) hold where a token stands and the number of its segment (sentence A
    or B), in every call of one sequence. Positions of one axis leave that term out, as a missing token_type_ids does.
    """

    def build(self, slot: Slot) -> nn.Module:
        if slot.on_grid:
            raise BuildError(
                "position 'xlnet' reads where a token stands and its segment, and here a row and a column",
                where=slot.path,
                remedy="use axial or relative_bias_2d",
            )
        return XLNetModule(self, slot)


class XLNetModule(TransformerXLModule):
    axes: ClassVar[int] = 2
    undecayed: ClassVar[frozenset[str]] = frozenset({"u", "v", "s", "e"})

    def __init__(self, spec: Spec, slot: Slot):
        super().__init__(spec, slot)
        self.s = nn.Parameter(torch.empty_like(self.u))
        self.e = nn.Parameter(torch.empty(2, *self.u.shape))

    def score(self, q: Tensor, k: Tensor, at: Coords, ctx: Context, project: Callable[..., Any]) -> Score:
        found = super().score(q, k, at, ctx, project)
        if ctx.positions.shape[-1] < 2:
            return found
        apart = ctx.once(("xlnet", id(at)), lambda: at.distance(1)[:, None] != 0)  # (B|1,1,T,S)

        def compute(start: int, stop: int) -> Tensor:
            term = torch.einsum("bthd,rhd->bhtr", q[:, start:stop] + self.s, self.e)
            return torch.where(apart[:, :, start:stop], term[..., 1:], term[..., :1])

        return replace(found, terms=(*found.terms, Content(compute, q.shape[1])))
