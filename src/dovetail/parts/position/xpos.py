"""XPos: RoPE whose products decay with distance."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError, DataError
from dovetail.kernels.attention import Coords, Side
from dovetail.parts.context import Context
from dovetail.parts.position.rotary import Rope, RopeModule
from dovetail.spec import Slot, register
from dovetail.spec.ranges import Positive


@register(
    "position",
    "xpos",
    oracle="golden: microsoft/torchscale xpos_relative_position.py",
    source="Sun et al. 2022 (A Length-Extrapolatable Transformer), algorithm 1",
)
class XPos(Rope):
    """RoPE times ζ^((i - j) / decay), ζ_n = (2n/D + gamma) / (1 + gamma): pair n of query i and key j <= i.

    The query is multiplied by ζ^(i / decay) and the key by its inverse, both counted from the middle of the queries at
    hand; so keys are cached raw, and decoding works at any length. One forward has as many queries as the number type
    can tell apart: 24,000 in bf16 and fp32, 3,000 in fp16, at a decay of 512. scaling stretches the rotation alone.
    """

    decay: Positive = 512.0
    gamma: Positive = 0.4

    def reach(self, trained: int) -> float:
        return math.inf  # what lies farther back counts for less and less

    def build(self, slot: Slot) -> nn.Module:
        if not slot.causal:
            raise BuildError(
                "XPos decays towards the past; towards the future it would grow", where=slot.path, remedy="use rope"
            )
        return XPosModule(self, self.turned(slot), slot)


class XPosModule(RopeModule):
    turns_all: ClassVar[bool] = True

    def __init__(self, spec: XPos, dim: int, slot: Slot):
        super().__init__(spec, dim, slot)
        self.caches, self.decay, self.gamma = "raw", spec.decay, spec.gamma  # type: ignore[misc]

    def rotate(self, q: Tensor, k: Tensor, at: Coords, ctx: Context) -> tuple[Tensor, Tensor]:
        self._check(q)
        q, k = super().rotate(q, k, at, ctx)
        up, down = self._factors(at, q.dtype)
        return self._times(q, up), self._times(k, down)

    def _check(self, q: Tensor) -> None:
        """Raises DataError where the largest factor between two queries would leave the range of their type.

        A third of the range is left to the queries and keys themselves.
        """
        steepest = math.log((1 + self.gamma) / self.gamma) / self.decay  # of the first pair, a token
        most = int(math.log(torch.finfo(q.dtype).max) * 2 / 3 / steepest) + 1
        if q.shape[1] > most:
            raise DataError(
                f"{q.shape[1]:,} tokens at once, and XPos with a decay of {self.decay:g} can tell {most:,} apart in "
                f"{str(q.dtype).removeprefix('torch.')}",
                where=self.path,
                remedy=f"feed them in chunks of {most:,} with a state, or use a larger decay",
            )

    def _factors(self, at: Coords, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of queries (B|1,T,1,dim/2) and of keys (B|1,S,1,dim/2); once a forward. Exponents are in fp64."""
        key = (*self.key, "factors", dtype)
        if key not in at.memo:
            pair = torch.arange(self.dim // 2, device=self.inverse.device, dtype=torch.float64)
            zeta = torch.log((2 * pair / self.dim + self.gamma) / (1 + self.gamma)) / self.decay
            first, last = self._line(at.q).aminmax(dim=1, keepdim=True)
            middle = (first + last) / 2
            up, down = ((self._line(side) - middle)[..., None, None] * zeta for side in (at.q, at.k))
            at.memo[key] = up.exp().to(dtype), (-down).exp().to(dtype)
        return at.memo[key]

    def _line(self, side: Side) -> Tensor:
        assert side.positions is not None
        return side.positions[..., 0].double()

    def _times(self, x: Tensor, factor: Tensor) -> Tensor:
        """The turned entries of x (B,N,H,D), each pair by its factor (B|1,N,1,dim/2)."""
        if self.rope.layout == "half":
            factor = torch.cat([factor, factor], -1)
        else:
            factor = factor.repeat_interleave(2, -1)
        rest = x.shape[-1] - self.dim
        return x * (factor if not rest else torch.nn.functional.pad(factor, (0, rest), value=1.0))
