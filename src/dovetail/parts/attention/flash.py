"""FLASH: a gated attention unit of linear cost, relu² attention inside chunks and linear attention between them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dovetail.kernels.mixed_chunk import Heads, Past, mixed_chunk, plan
from dovetail.kernels.plan import Plan
from dovetail.parts.attention.gau import Affine, Gated, GatedModule
from dovetail.parts.attention.kernelised import built_position, zeros
from dovetail.parts.context import Context, refuse_memory
from dovetail.parts.position.rotary import Rope
from dovetail.parts.state import Room, VectorState
from dovetail.spec import Slot, register
from dovetail.spec.categories import PositionPart
from dovetail.spec.ranges import Chance, Count


@register(
    "mixer",
    "flash",
    oracle="golden: lucidrains/FLASH-pytorch FLASH; formula: two matrices of weights in fp64",
    source="Hua et al. 2022 (FLASH), section 3.2, eq. 5-7, and the listing of its appendix",
    causal=True,
    bidirectional=True,
)
class Flash(Gated):
    """(u ⊙ (relu(c · q k)² v / C + q' Σ k' v / n)) W_o: a gated attention unit with mixed chunk attention.

    q, k, q', k' are affine views γ ⊙ z + β of one base z, all turned by `position`. The first term is over the tokens
    of one's own chunk of C tokens, and not later ones where causal. The second is over all earlier chunks where causal
    and over the whole document, its own chunk too, elsewhere; n is the number of the tokens in that sum (the authors'
    code divides each chunk's sum by C, and their sum by the number of chunks). Chunks are counted from a document's
    first token, so that it gives the same alone, padded or packed.

    chunk: C. scale: c, 1/√C unless given, so that the first term is relu(q k / C)² as in the authors' code. dropout: on
    the weights inside chunks. The learned bias that the authors add to these by distance is left out: position enters
    by turning. Like a gau it needs no feed-forward beside it. Decoding keeps the newest chunk's keys and values and two
    matrices (s,e): earlier chunks', and the newest one's.
    """

    chunk: Count = 256
    scale: float | None = None
    dropout: Chance = 0.0
    position: PositionPart = Rope()

    def build(self, slot: Slot) -> nn.Module:
        return FlashModule(self, slot)


class FlashModule(GatedModule):
    views: ClassVar[tuple[str, ...]] = ("quad_q", "quad_k", "lin_q", "lin_k")
    quad_q: Affine
    quad_k: Affine
    lin_q: Affine
    lin_k: Affine

    def __init__(self, spec: Flash, slot: Slot):
        super().__init__(spec, slot)
        self.chunk, self.dropout = spec.chunk, spec.dropout
        self.scale = spec.chunk**-0.5 if spec.scale is None else spec.scale
        self.position = built_position(spec, slot, (1, 1, self.head_dim, self.value_dim), self.head_dim)

    def new_state(self, room: Room) -> VectorState:
        """Σ k' vᵀ of earlier chunks and of the newest one, (B,s,e) each, in fp32 or better; that one's k and v."""
        s, e = self.head_dim, self.value_dim
        slots = [torch.zeros(room.batch, self.chunk, width, dtype=room.dtype, device=room.device) for width in (s, e)]
        return VectorState(matrix=zeros(room, s, e), open=zeros(room, s, e), keys=slots[0], values=slots[1])

    def forward(
        self, x: Tensor, ctx: Context, state: Any = None, *, keys: Tensor | None = None, values: Tensor | None = None
    ) -> Tensor:
        """x (B,T,C) -> (B,T,C')."""
        refuse_memory(keys, values, self.path)
        u, v, z = self.split(x)
        q, k = (torch.stack([quad(z), lin(z)], 2) for quad, lin in self._pairs)  # (B,T,2,s)
        q, k = self.position.rotate(q, k, ctx.coords, ctx)
        (quad_q, lin_q), (quad_k, lin_k) = q.unbind(2), k.unbind(2)
        out, past = mixed_chunk(
            Heads(quad_q, quad_k, lin_q, lin_k),
            v,
            chunk=self.chunk,
            causal=self.causal,
            scale=self.scale,
            order=ctx.order,
            segments=ctx.segments,
            plain=ctx.aligned,
            past=None if state is None else Past(*(state[name] for name in Past._fields)),
            dropout=self.dropout if self.training else 0.0,
        )
        if state is not None and past is not None:
            state.update(**past._asdict())
        return self.out(u * out.to(u.dtype))

    @property
    def _pairs(self) -> tuple[tuple[Affine, Affine], tuple[Affine, Affine]]:
        return (self.quad_q, self.lin_q), (self.quad_k, self.lin_k)

    def plans(self, device: str, length: int) -> dict[str, Plan]:
        """Which form would run each use of this layer, and why."""

        def chosen(tokens: int, segments: bool, state: bool = False) -> Plan:
            return plan(
                tokens, chunk=self.chunk, causal=self.causal, segments=segments, state=state, device=device,
                width=self.head_dim, dtype=self.out.dtype, dropout=self.dropout > 0 and not state,
            )  # fmt: skip

        uses = {"training, prefill": chosen(length, False), "padded or packed": chosen(length, True)}
        return uses | {"decoding": chosen(1, False, True)} if self.causal else uses
