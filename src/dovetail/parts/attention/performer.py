"""Performer: softmax attention in linear time, by random features whose products are unbiased for exp(q·k)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dovetail.kernels.chunks import without_autocast
from dovetail.kernels.linear_attention import LOW, document_max, normalised, running_max
from dovetail.parts.attention.kernelised import Kernelised, KernelisedModule, built_position, zeros
from dovetail.parts.context import Context
from dovetail.parts.position.rotary import Rope
from dovetail.parts.state import Room, VectorState
from dovetail.parts.weights import generator
from dovetail.spec import Slot, register
from dovetail.spec.categories import PositionPart
from dovetail.spec.ranges import Count, Natural

STEEPEST = -80.0  # log of a decay; what is left beyond it is nothing in fp32


@register(
    "mixer",
    "performer",
    oracle="formula: features with their row norms, in one matrix; softmax attention in expectation",
    source="Choromanski et al. 2021 (FAVOR+), lemma 1, theorem 2 and section 2.4",
    causal=True,
    bidirectional=True,
)
class Performer(Kernelised):
    """Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j), φ(x) = exp(W x' - |x'|²/2) / √m with x' = x / D^¼ and random W (m,D).

    E φ(q)·φ(k) = exp(q·k/√D). features: m, D·ln D unless given. orthogonal: rows of W at right angles, D at a time,
    with the norms of Gaussian vectors. hyperbolic: exp(-W x') beside exp(W x'), twice the features. seed: of W, together
    with the layer's path. redraw: training steps after which W is drawn anew; 0 keeps it. A model that is loaded has
    the first W. position: turns q and k before φ, as in the softmax that this stands for.
    """

    keeps: ClassVar[tuple[str, ...]] = (*Kernelised.keeps, "position")
    features: Count | None = None
    orthogonal: bool = True
    hyperbolic: bool = False
    seed: Natural = 0
    redraw: Natural = 0
    position: PositionPart = Rope()

    def build(self, slot: Slot) -> nn.Module:
        return PerformerModule(self, slot)


class PerformerModule(KernelisedModule):
    def __init__(self, spec: Performer, slot: Slot):
        super().__init__(spec, slot)
        D = self.widths[2]
        self.rows = spec.features or max(1, round(D * math.log(D)))
        self.features = self.rows * (2 if spec.hyperbolic else 1)
        self.orthogonal, self.hyperbolic, self.seed, self.redraw = (
            spec.orthogonal, spec.hyperbolic, spec.seed, spec.redraw,
        )  # fmt: skip
        self.position = built_position(spec, slot, self.widths, D)
        self.drawn = 0
        self.projection = self._draw(torch.get_default_device())

    def at_step(self, step: int) -> None:
        """The W of training step `step`, from 0: the same in every run and after every resumption."""
        drawn = step // self.redraw if self.redraw else 0
        if drawn != self.drawn:
            self.drawn = drawn
            self.projection.copy_(self._draw(self.projection.device))

    def new_state(self, room: Room) -> VectorState:
        """Σ φ(k) [v, 1]ᵀ (B,G,F,E+1), divided by exp(top); top (B,G): the largest log φ(k) so far."""
        _, G, _, E = self.widths
        return VectorState(matrix=zeros(room, G, self.features, E + 1), top=zeros(room, G).fill_(LOW))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: VectorState | None) -> Tensor:
        q, k = self.position.rotate(q, k, ctx.coords, ctx)
        wide = torch.promote_types(q.dtype, torch.float32)
        projection = self.projection.to(wide)
        q, k = (
            log_features(t.transpose(1, 2).to(wide) * t.shape[-1] ** -0.25, projection, self.hyperbolic) for t in (q, k)
        )
        # What a query's features are multiplied with falls out of the ratio.
        narrow = v.dtype if v.dtype == torch.bfloat16 else wide  # as probabilities are; fp16 would lose small features
        q = (q - q.detach().amax(-1, keepdim=True)).exp().to(narrow)
        # So does a factor on all keys: theirs is the largest so far, in which the past is expressed anew when it grows.
        top, decay = self._top(k.detach().amax(-1), ctx, None if state is None else state["top"])
        k = (k - top[..., None]).clamp_max(0).exp().to(narrow)  # above it is padding alone
        start = None if state is None else state["matrix"]
        least = 1e-20  # φ(q)·φ(k) of far vectors is that small, not empty
        out, end = normalised(q, k, v, causal=self.causal, segments=ctx.segments, decay=decay, start=start, least=least)
        if state is not None and end is not None:
            state.update(matrix=end, top=top[..., -1])
        return out

    def _top(self, largest: Tensor, ctx: Context, start: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What is taken off log φ(k), (B,G,T), and the decay that it means for the past, None where there is none."""
        document = None
        if ctx.segments is not None:
            real = (ctx.segments >= 0)[:, None]
            largest = torch.where(real, largest, LOW)
            document = ctx.segments.expand(largest.shape[0], -1)
        if not self.causal:
            return document_max(largest, document), None
        if document is not None:
            document = document.clamp_min(0).cummax(1).values
        top = running_max(largest, document, start)
        before = torch.cat([top[..., :1] if start is None else start[..., None], top[..., :-1]], -1)
        return top, (before - top).clamp(STEEPEST, 0)

    def _draw(self, device: torch.device) -> Tensor:
        """W (m,D) in fp32, whatever the model's dtype."""
        if device.type == "meta":  # made anew once the model is real
            return torch.empty(self.rows, self.widths[2], device=device)
        name = f"{self.path}.projection.{self.drawn}"
        return draw(self.rows, self.widths[2], self.orthogonal, generator(self.seed, name)).to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves with the model but never rounds: W is drawn again on the new device."""
        super()._apply(fn, recurse)
        self.projection = self._draw(fn(torch.empty(0, device=self.projection.device)).device)
        return self


def log_features(x: Tensor, projection: Tensor, hyperbolic: bool = False) -> Tensor:
    """log φ(x), (..., m or 2m), of x (..., D) as it enters exp(x·y), and W (m,D)."""
    with without_autocast(x):  # they are logarithms: 0.05 off is 5% of a feature
        along = x @ projection.T
    along = torch.cat([along, -along], -1) if hyperbolic else along
    return along - x.square().sum(-1, keepdim=True) / 2 - math.log(along.shape[-1]) / 2


def draw(rows: int, dim: int, orthogonal: bool, rng: torch.Generator) -> Tensor:
    """Random W (rows, dim) in fp32, each row standard normal; orthogonal: at right angles in blocks of `dim` rows."""
    wide = {"dtype": torch.float64, "generator": rng, "device": "cpu"}
    plain = torch.randn(rows, dim, **wide)  # type: ignore[call-overload]
    if orthogonal:
        blocks = [torch.linalg.qr(torch.randn(dim, dim, **wide)) for _ in range(-(-rows // dim))]  # type: ignore[call-overload]
        # With R's diagonal positive, Q is uniform among the orthogonal matrices.
        turned = torch.cat([(q * r.diagonal().sign()).T for q, r in blocks])[:rows]
        plain = turned * plain.norm(dim=1, keepdim=True)
    return plain.to(torch.float32)
