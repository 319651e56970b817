"""FLOATER: position encodings as the path of a small learned dynamical system."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.errors import DataError
from dovetail.kernels.path import follow
from dovetail.parts.init import Xavier
from dovetail.parts.position.base import Vectors
from dovetail.parts.state import LayerState, Room
from dovetail.parts.weights import Linear, Rng
from dovetail.spec import Slot, Spec, register
from dovetail.spec.ranges import Count, Positive

INTERVAL, LONGEST = 0.01, 255  # the authors': time between positions, and the rows they train on


@register(
    "position",
    "floater",
    oracle="golden numbers of xuanqing94/FLOATER",
    source="Liu et al. 2020 (FLOATER), section 3.1, at the input",
)
class Floater(Spec):
    """x + p(Δ·i) at position i, where dp/dτ = h(τ, p) = W₂[relu(W₁[p; τ] + b₁); τ] + b₂ and p(0) is learned.

    Kutta's 3/8 rule of order four with fixed steps follows the path, as the authors' solver does, and gradients go
    through it. It can be followed as far as one likes: there is no longest row. It takes 4·steps evaluations of h a
    position, one after another, once a forward, and once for a whole decoding state. Compiled code cannot read positions:
    it follows the path as far as the row is long.
    hidden: width of h; the stream's unless given. interval: Δ; unless given, such that the model's context takes 2.55,
    the time of the authors' 255 positions 0.01 apart (much less, and positions begin all alike; much more, and the last
    ones outgrow the tokens). steps: of the solver, from one position to the next; the authors take 5, and at 0.01 apart
    1 differs by less than 1e-9 from that. The start of h is theirs (Xavier normal, no bias), whatever the model's init
    says, which rules p(0) alone.
    """

    hidden: Count | None = None
    interval: Positive | None = None
    steps: Count = 1

    def build(self, slot: Slot) -> nn.Module:
        return FloaterModule(self, slot)


class FloaterModule(Vectors):
    def __init__(self, spec: Floater, slot: Slot):
        super().__init__()
        own = replace(slot, init=Xavier(distribution="normal"))
        hidden = spec.hidden or slot.dim
        self.inner = Linear(slot.dim + 1, hidden, slot=own, bias=True)  # the last column is the time's
        self.outer = Linear(hidden + 1, slot.dim, slot=own, bias=True)
        self.start = nn.Parameter(torch.empty(slot.dim))
        self.interval = spec.interval or INTERVAL * LONGEST / (slot.context or LONGEST)
        self.steps, self.slot = spec.steps, slot

    def initialise(self, rng: Rng) -> None:
        self.slot.init.draw(self.start[None], "position", 1, self.slot.dim, self.slot, rng("start"))

    def path(self, count: int) -> Tensor:
        """p at positions 0 .. count-1, (count,C), in fp32 or wider."""
        wide = torch.promote_types(self.start.dtype, torch.float32)
        step = self.interval / self.steps
        steps = (count - 1) * self.steps
        thirds = torch.arange(3 * steps + 1, dtype=wide, device=self.start.device) * (step / 3)
        (w1, from1), (w2, from2) = (_with_time(m, thirds) for m in (self.inner, self.outer))
        return follow(self.start.to(wide), w1, from1, w2, from2, step)[:: self.steps]

    def vectors(self, x: Tensor, ctx: Any, state: Path | None = None) -> Tensor:
        positions = ctx.positions[..., 0]
        path = self.path(self._count(positions, x.shape[1])) if state is None else state.path
        self._check(positions, path.shape[0])
        return F.embedding(positions, path).to(x.dtype)

    def new_state(self, room: Room, held: int = 0) -> Path:
        with torch.no_grad():
            return Path(self.path(room.capacity + held))

    def _count(self, positions: Tensor, length: int) -> int:
        """How far the path must be followed: known from the row's length where values cannot be read."""
        if torch.compiler.is_compiling() or positions.is_meta or not positions.numel():
            return max(1, length)
        return max(1, int(positions.max()) + 1)

    def _check(self, positions: Tensor, count: int) -> None:
        """Raises DataError for positions that the path does not have. Only memory that the host can read is asked."""
        if positions.device.type != "cpu" or torch.compiler.is_compiling() or not positions.numel():
            return
        low, high = (int(end) for end in positions.aminmax())
        if low < 0 or high >= count:
            raise DataError(
                f"position {low if low < 0 else high} on a path that was followed from 0 to {count - 1}",
                where=self.slot.path,
                remedy="give positions from 0, and while decoding below the state's capacity",
            )


def _with_time(linear: Linear, times: Tensor) -> tuple[Tensor, Tensor]:
    """(weight without the time's column, what time and bias add at each of `times`: a row each)."""
    weight, bias = linear.effective(linear.dense(), linear.bias)
    assert bias is not None
    weight, bias = weight.to(times.dtype), bias.to(times.dtype)
    return weight[:, :-1].contiguous(), torch.outer(times, weight[:, -1]) + bias


class Path(LayerState):
    """The path followed once, (capacity,C), for every step of decoding to look up. Rows share it, and nothing writes it."""

    def __init__(self, path: Tensor):
        self.path = path

    def reorder(self, indices: Tensor) -> None:
        """The same for every row."""

    def truncate(self, length: int) -> None:
        """It says nothing of tokens."""

    def snapshot(self) -> Path:
        return self

    def buffers(self) -> list[Tensor]:
        return [self.path]
