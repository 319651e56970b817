"""The HiPPO recurrence: a gated hidden vector beside a memory of everything that it has said so far."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels import legs_recurrence as legs
from dovetail.kernels.chunks import without_autocast
from dovetail.kernels.plan import Plan
from dovetail.parts.context import Context, refuse_memory
from dovetail.parts.state import Room, VectorState
from dovetail.parts.weights import Linear
from dovetail.spec import Slot, Spec, register
from dovetail.spec.ranges import Count


@register(
    "mixer",
    "hippo",
    oracle="formula: HiPPO-LegS by its whole matrices, fp64",
    source="Gu et al. 2020 (HiPPO), figure 2 and section 3.2",
    causal=True,
    bidirectional=False,
    cross=False,
)
class HippoRnn(Spec):
    """h = (1 - g)·h + g·tanh(W [x, c] + b), g = σ(V [x, c] + d), c the LegS coefficients of f = u·[x, h] + e so far.

    One function f of time is remembered, all of it at every time, by the bilinear rule at the token's number in its
    document; it runs token by token, on plain rows in chunks with matrices for their numbers
    (`kernels.legs_recurrence`). hidden: width of h; the stream's width unless given, and where it is not, a linear map
    `out` follows. order: coefficients; hidden unless given.
    """

    hidden: Count | None = None
    order: Count | None = None

    def build(self, slot: Slot) -> nn.Module:
        return HippoRnnModule(self, slot)


class HippoRnnModule(nn.Module):
    """read (1 + 2·hidden,C): f, W and V of x, with e, b and d; told (1,hidden): f of h; recall (2·hidden,N): of c."""

    def __init__(self, spec: HippoRnn, slot: Slot):
        super().__init__()
        if slot.memory_dim is not None:
            raise BuildError(
                "hippo cannot read an encoder's output", where=slot.path, remedy="use a mixer with cross=True"
            )
        self.path, self.hidden = slot.path, spec.hidden or slot.dim
        self.order = spec.order or self.hidden
        both = (("in", self.hidden), ("in", self.hidden))
        self.read = Linear(slot.dim, 1 + 2 * self.hidden, slot=slot, bias=True, parts=(("in", 1), *both))
        self.told = Linear(self.hidden, 1, slot=slot)
        self.recall = Linear(self.order, 2 * self.hidden, slot=slot, parts=both)
        self.told.read_whole = self.recall.read_whole = True
        same = self.hidden == slot.width_out
        self.out = None if same else Linear(self.hidden, slot.width_out, slot=slot, role="residual")

    def new_state(self, room: Room) -> VectorState:
        """h (B,hidden) and c (B,N), in fp32 or better."""
        wide = torch.promote_types(room.dtype, torch.float32)
        sizes = {"h": self.hidden, "c": self.order}
        return VectorState(**{n: torch.zeros(room.batch, s, dtype=wide, device=room.device) for n, s in sizes.items()})

    def forward(
        self,
        x: Tensor,
        ctx: Context,
        state: VectorState | None = None,
        *,
        keys: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        """x (B,T,C) -> (B,T,C'). Each document starts from zero (or from `state`); padding is passed by."""
        refuse_memory(keys, values, self.path)
        wide, (B, T) = torch.promote_types(x.dtype, torch.float32), x.shape[:2]
        given = self.read(x).to(wide)
        with without_autocast(x):
            told, recall = self.told.matrix().to(wide), self.recall.matrix().to(wide)
            plain = state is None and ctx.aligned and not torch.compiler.is_compiling()
            if legs.plan(T, self.order, plain=plain).path == "chunks":
                y = legs.recurrence(given, told, recall)
            else:
                real = None if ctx.segments is None else (ctx.segments >= 0).expand(B, T)
                h = given.new_zeros(B, self.hidden) if state is None else state["h"].to(wide)
                c = given.new_zeros(B, self.order) if state is None else state["c"].to(wide)
                y, h, c = legs.reference.recurrence(given, told, recall, ctx.order.expand(B, T), real, h, c)
                if state is not None:
                    state.update(h=h, c=c)
        y = y.to(x.dtype)
        return y if self.out is None else self.out(y)

    def plans(self, device: str, length: int) -> dict[str, Plan]:
        """Which path each use of this layer takes, and why."""
        step, whole = (legs.plan(length, self.order, plain=p, device=device) for p in (False, True))
        return {"training": whole, "padded or packed": step, "decoding": step}
