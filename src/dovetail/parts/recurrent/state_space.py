"""What the layers of one law for all times share: a convolution over whole rows, a recurrence while decoding.

Plain rows are convolved. Rows that are padded or packed are cut into their documents, which are convolved side by side
and put back (their number is data, so that path waits for the device). With a state the recurrence runs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.errors import BuildError
from dovetail.kernels.chunks import without_autocast
from dovetail.kernels.plan import Plan
from dovetail.kernels.ssm_convolution import convolve, plan
from dovetail.parts.activation import Gelu
from dovetail.parts.context import Context, refuse_memory
from dovetail.parts.recurrent.borders import Borders, cut
from dovetail.parts.state import Room, VectorState
from dovetail.parts.weights import Linear, Rng
from dovetail.spec import Slot, Spec
from dovetail.spec.categories import ActivationPart
from dovetail.spec.ranges import Chance, Count, Positive

COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


class StateSpace(Spec):
    """Base: out(activation(y)) with y_t = C h_t + D x_t, h' = A h + B x at steps of length dt, one such law a channel.

    state: N, entries of h a channel. dt_min, dt_max: dt starts log-uniform between them. activation: before the map
    `out` to twice the width, a gated linear unit (Gu et al. 2022b, section 4). dropout: behind the activation, of whole
    channels: what falls out of a row does so at all its times (the released code's tie_dropout). A, B and dt take no
    weight decay.
    """

    state: Count = 64
    dt_min: Positive = 1e-3
    dt_max: Positive = 0.1
    activation: ActivationPart = Gelu()
    dropout: Chance = 0.0


class StateSpaceModule(nn.Module, ABC):
    """Parameters log_dt (H), C as the subclass has it, D (H); `out`."""

    undecayed: ClassVar[frozenset[str]] = frozenset({"log_dt"})

    def __init__(self, spec: Any, slot: Slot):
        super().__init__()
        if slot.memory_dim is not None:
            raise BuildError(
                f"{spec.kind} cannot read an encoder's output", where=slot.path, remedy="use a mixer with cross=True"
            )
        if spec.dt_min > spec.dt_max:
            raise BuildError(
                f"dt_min {spec.dt_min} above dt_max {spec.dt_max}", where=slot.path, remedy="exchange them"
            )
        self.path, self.channels, self.order = slot.path, slot.dim, spec.state
        self.range = (math.log(spec.dt_min), math.log(spec.dt_max))
        self.log_dt, self.D = (nn.Parameter(torch.empty(slot.dim)) for _ in range(2))
        self.activation, self.drop = slot.build(spec.activation, "activation"), spec.dropout
        parts = (("residual", slot.width_out), ("in", slot.width_out))
        self.out = Linear(slot.dim, 2 * slot.width_out, slot=slot, bias=True, parts=parts)

    def initialise(self, rng: Rng) -> None:
        self.log_dt.uniform_(*self.range, generator=rng("log_dt"))
        self.D.normal_(generator=rng("D"))

    @abstractmethod
    def kernel(self, length: int, dtype: torch.dtype) -> Tensor:
        """What h answers to a single 1, (H,length)."""

    def response(self, length: int, dtype: torch.dtype) -> Tensor:
        """`kernel`, and D at its head: so D x needs no passes over x of its own."""
        kernel = self.kernel(length, dtype)
        return torch.cat([kernel[:, :1] + self.D.to(dtype)[:, None], kernel[:, 1:]], 1)

    @abstractmethod
    def stepping(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What `scan` goes by, for x of this dtype."""

    @abstractmethod
    def scan(self, x: Tensor, law: Sequence[Tensor], start: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """(C h (B,T,H), last h) of x (B,T,H) behind `start`; real (B,T): false for padding."""

    def sizes(self) -> tuple[int, ...]:
        """The shape of one row's h."""
        return (self.channels, self.order)

    @torch.no_grad()
    def new_state(self, room: Room) -> LawState:
        """h (B,H,N), or its real and imaginary parts, in fp32 or better."""
        wide = torch.promote_types(room.dtype, torch.float32)
        h = torch.zeros(room.batch, *self.sizes(), dtype=wide, device=room.device)
        return LawState(self.stepping(wide), h=h)

    def forward(
        self,
        x: Tensor,
        ctx: Context,
        state: LawState | None = None,
        *,
        keys: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        """x (B,T,C) -> (B,T,C'). Each document starts from zero (or from `state`)."""
        refuse_memory(keys, values, self.path)
        with without_autocast(x):
            u = x.to(torch.promote_types(x.dtype, torch.float32))
            if state is not None:
                borders, u = Borders.of(ctx, len(x)), u.to(state["h"].dtype)  # the law's
                y, end = self.scan(u, state.law, state["h"], None if borders is None else borders.real)
                state.update(h=end)
                y = y + u * self.D.to(u.dtype)
            elif ctx.segments is None:
                y = convolve(u, self.response(x.shape[1], u.dtype))
            else:
                segments = ctx.segments
                cut: Documents = ctx.once("documents side by side", lambda: Documents.of(segments.expand(x.shape[:2])))
                y = cut.back(convolve(cut.apart(u), self.response(cut.at.shape[1], u.dtype)), u)
        y = self.activation(y.to(x.dtype))
        if self.drop and self.training:
            y = F.dropout1d(y.mT, self.drop).mT
        return F.glu(self.out(y), -1)

    def plans(self, device: str, length: int) -> dict[str, Plan]:
        """Which path each use of this layer takes, and why."""
        step = Plan("step", "one token: one update of the state")
        scan = Plan("scan", "a state behind the row: the recurrence in chunks")
        whole = plan(length, device)
        apart = Plan(whole.path, "documents side by side, each convolved by itself")
        return {"training": whole, "padded or packed": apart, "prefill": scan, "decoding": step}


class LawState(VectorState):
    """h (B,...), and the law that it goes by: discretised once, with the weights as they were then."""

    def __init__(self, law: tuple[Tensor, ...], **tensors: Tensor):
        super().__init__(**tensors)
        self.law = law

    def snapshot(self) -> LawState:
        return LawState(self.law, **{name: t.clone() for name, t in self.tensors.items()})

    def buffers(self) -> list[Tensor]:
        return [*super().buffers(), *self.law]

    def nbytes(self) -> int:
        """Of h: the law is one for all rows."""
        return self["h"].nbytes


@dataclass(frozen=True)
class Documents:
    """Padded or packed rows as one document a row: at (documents, longest), flat indices of their tokens.

    token (N,): flat indices of the real tokens; place (N,): where each stands among those of `at`.
    """

    at: Tensor
    token: Tensor
    place: Tensor

    @staticmethod
    def of(segments: Tensor) -> Documents:
        """segments (B,T): document numbers, negative for padding. Padding inside a document is skipped."""
        token, document, first = cut(segments)
        time = torch.arange(len(token), device=token.device) - first[document]
        count, longest = (int(t.max()) + 1 if len(token) else 1 for t in (document, time))
        place = document * longest + time
        at = torch.zeros(count * longest, dtype=torch.long, device=token.device)
        return Documents(at.index_copy(0, place, token).view(count, longest), token, place)

    def apart(self, x: Tensor) -> Tensor:
        """x (B,T,C) as (documents, longest, C); behind the end of a document stands what it does not see."""
        return x.flatten(0, 1)[self.at]

    def back(self, y: Tensor, like: Tensor) -> Tensor:
        """y (documents, longest, C) where its tokens stood in `like` (B,T,C); padding gives zero."""
        found = y.flatten(0, 1)[self.place]
        return torch.zeros_like(like).flatten(0, 1).index_copy(0, self.token, found).view_as(like)


def check_even(spec: Any, slot: Slot) -> None:
    """Raises BuildError for a state that does not fall into conjugate pairs."""
    if spec.state % 2:
        raise BuildError(
            f"a state of {spec.state} entries, which come in conjugate pairs",
            where=slot.path,
            remedy=f"set state to {spec.state + 1}",
        )
