"""Mamba: a state space whose steps, what it takes in and what it gives out are chosen by the token."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.errors import BuildError
from dovetail.kernels.chunks import without_autocast
from dovetail.kernels.plan import Plan
from dovetail.kernels.ssm_scan import plan, selective_scan
from dovetail.parts.activation import Silu
from dovetail.parts.context import Context, refuse_memory
from dovetail.parts.recurrent.borders import Borders
from dovetail.parts.recurrent.short_convolution import ShortConvolution
from dovetail.parts.state import Room, VectorState
from dovetail.parts.weights import Linear, Rng
from dovetail.spec import Slot, Spec, register
from dovetail.spec.categories import ActivationPart
from dovetail.spec.ranges import Count, Positive


@register(
    "mixer",
    "mamba",
    oracle="transformers MambaMixer",
    source="Gu and Dao 2023 (Mamba), algorithm 2 and section 3.4",
    causal=True,
    bidirectional=False,
    cross=False,
)
class Mamba(Spec):
    """W_o (y ⊙ silu(z)), y_t = C_t · h_t + D x_t, h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t, with N entries a channel.

    x, z = W u, x through a short convolution and `activation`; Δ = softplus(W_Δ W_δ x + b), B and C are maps of x. It
    needs no feed-forward beside it: {mixer: mamba, feedforward: null}. hidden: width E of x and z, 2·dim unless given.
    state: N. kernel: tokens of the convolution. dt_rank: width of W_δ x, dim/16 unless given. bias: on the maps from and
    to the stream; conv_bias: on the convolution. dt starts log-uniform between dt_min and dt_max, but not below
    dt_floor. decay: A starts at minus this for every entry, at -(1..N) unless given. One Δ both writes and
    fades, so that by the usual starts what lasts is hardly written; a Δ near 1 with a small decay starts closer to
    linear attention, which learns to recall sooner (Trockman et al. 2024). A takes no weight decay, nor does D.
    """

    hidden: Count | None = None
    state: Count = 16
    kernel: Count = 4
    dt_rank: Count | None = None
    bias: bool = False
    conv_bias: bool = True
    activation: ActivationPart = Silu()
    dt_min: Positive = 1e-3
    dt_max: Positive = 0.1
    dt_floor: Positive = 1e-4
    decay: Positive | None = None

    def build(self, slot: Slot) -> nn.Module:
        return MambaModule(self, slot)

    def sizes(self, dim: int) -> tuple[int, int]:
        """(hidden, dt_rank) at a model width of `dim`."""
        return self.hidden or 2 * dim, self.dt_rank or math.ceil(dim / 16)


class TimeStep(Linear):
    """Δ before its softplus, from dt_rank to the hidden width: started so that Δ itself is log-uniform."""

    def __init__(self, spec: Mamba, rank: int, hidden: int, slot: Slot):
        super().__init__(rank, hidden, slot=slot, bias=True)
        self.range, self.floor = (math.log(spec.dt_min), math.log(spec.dt_max)), spec.dt_floor

    def initialise(self, rng: Rng) -> None:
        bound = self.in_features**-0.5
        self.weight.uniform_(-bound, bound, generator=rng("weight"))
        dt = self.bias.uniform_(*self.range, generator=rng("bias")).float().exp().clamp_min(self.floor)
        self.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt


class MambaModule(nn.Module):
    """inward (2E,C), conv (E), choose (dt_rank + 2N,E), dt (E,dt_rank), A_log (E,N), D (E), out (C',E)."""

    undecayed: ClassVar[frozenset[str]] = frozenset({"A_log", "D"})

    def __init__(self, spec: Mamba, slot: Slot):
        super().__init__()
        if slot.memory_dim is not None:
            raise BuildError(
                "mamba cannot read an encoder's output", where=slot.path, remedy="use a mixer with cross=True"
            )
        if spec.dt_min > spec.dt_max:
            raise BuildError(
                f"dt_min {spec.dt_min} above dt_max {spec.dt_max}", where=slot.path, remedy="exchange them"
            )
        hidden, rank = spec.sizes(slot.dim)
        self.path, self.order, self.rank, self.hidden = slot.path, spec.state, rank, hidden
        self.decay = spec.decay
        self.inward = Linear(slot.dim, 2 * hidden, slot=slot, bias=spec.bias, parts=(("in", hidden), ("in", hidden)))
        self.conv = ShortConvolution(hidden, spec.kernel, slot, bias=spec.conv_bias)
        self.activation = slot.build(spec.activation, "activation")
        parts = (("in", rank), ("in", spec.state), ("in", spec.state))
        self.choose = Linear(hidden, rank + 2 * spec.state, slot=slot, parts=parts)
        self.dt = TimeStep(spec, rank, hidden, slot)
        self.A_log, self.D = nn.Parameter(torch.empty(hidden, spec.state)), nn.Parameter(torch.empty(hidden))
        self.out = Linear(hidden, slot.width_out, slot=slot, bias=spec.bias, role="residual")

    def initialise(self, rng: Rng) -> None:
        if self.decay is None:
            entries = torch.arange(1, self.order + 1, dtype=torch.float32, device=self.A_log.device)
            self.A_log.copy_(entries.log().expand_as(self.A_log))
        else:
            nn.init.constant_(self.A_log, math.log(self.decay))
        nn.init.ones_(self.D)

    def new_state(self, room: Room) -> VectorState:
        """last (B,kernel-1,E): what the convolution reads; h (B,E,N) in fp32 or better."""
        wide = torch.promote_types(room.dtype, torch.float32)
        h = torch.zeros(room.batch, self.hidden, self.order, dtype=wide, device=room.device)
        return VectorState(last=self.conv.last(room), h=h)

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
        u, z = self.inward(x).chunk(2, -1)
        u = self.activation(self.conv(u, ctx, state))
        low, b, c = self.choose(u).split([self.rank, self.order, self.order], -1)
        borders, wide = Borders.of(ctx, len(x)), torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            dt = F.softplus(self.dt(low.to(self.dt.dtype)).to(wide))
            dt = dt if borders is None else dt.masked_fill(~borders.real[..., None], 0.0)
            begin = u.new_zeros(len(x), self.hidden, self.order, dtype=wide) if state is None else state["h"]
            v, b, c = (t.to(wide) for t in (u, b, c))
            first = None if borders is None else borders.first
            y, end = selective_scan(v, dt, -self.A_log.to(wide).exp(), b, c, begin, first)
            y = y + v * self.D.to(wide)
        if state is not None:
            state.update(h=end)
        return self.out(y.to(x.dtype) * F.silu(z))

    def plans(self, device: str, length: int) -> dict[str, Plan]:
        """Which path each use of this layer takes, and why."""
        step = Plan("step", "one token: one update of the state")
        scan = plan(length, self.order, device=device, dtype=torch.promote_types(self.out.dtype, torch.float32))
        return {"training, prefill": scan, "padded or packed": scan, "decoding": step}
