"""Linear attention: feature maps in place of the softmax, so that keys and values add up to one matrix a head."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels.linear_attention import divided, linear_attention, normalised
from dovetail.parts.attention.feature_map import Elu1, FeatureMap
from dovetail.parts.attention.kernelised import Kernelised, KernelisedModule, built_position, zeros
from dovetail.parts.context import Context
from dovetail.parts.position.rotary import Rope
from dovetail.parts.state import Room, VectorState
from dovetail.spec import Slot, register
from dovetail.spec.categories import FeatureMapPart, PositionPart


@register(
    "mixer",
    "linear",
    oracle="formula: Σ φ(q_i)·φ(k_j) v_j / Σ φ(q_i)·φ(k_j)",
    source="Katharopoulos et al. 2020, eq. 4-12; Su et al. 2021 (RoFormer), eq. 19; Su 2020, kexue.fm/archives/7546",
    causal=True,
    bidirectional=True,
)
class LinearAttention(Kernelised):
    """Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j) over heads, in time and memory linear in the length.

    feature_map: φ. normalise: False leaves the denominator out. position: turns features in the numerator, not in
    the denominator, which stays positive (RoFormer). Decoding keeps a matrix (features, value width) a head.
    """

    keeps: ClassVar[tuple[str, ...]] = (*Kernelised.keeps, "position")
    feature_map: FeatureMapPart = Elu1()
    normalise: bool = True
    position: PositionPart = Rope()

    def build(self, slot: Slot) -> nn.Module:
        return LinearAttentionModule(self, slot)


class LinearAttentionModule(KernelisedModule):
    def __init__(self, spec: LinearAttention, slot: Slot):
        super().__init__(spec, slot)
        chosen = spec.feature_map
        assert isinstance(chosen, FeatureMap)
        if spec.normalise and not chosen.positive:
            raise BuildError(
                f"feature map {chosen.kind!r} gives weights of either sign, whose sum may vanish",
                where=slot.path,
                remedy="set normalise to false, or use another feature map, e.g. elu1",
            )
        self.features = chosen.width(self.widths[2])
        self.feature_map = slot.build(chosen, "feature_map", dim=self.widths[2])
        self.position = built_position(spec, slot, self.widths, self.features)
        self.turns, self.normalise = "rotate" in self.position.hooks, spec.normalise

    def new_state(self, room: Room) -> VectorState:
        """Σ φ(k) vᵀ (B,G,F,E), and Σ φ(k) (B,G,F,1) as its last column or, where the former is turned, beside it."""
        _, G, _, E = self.widths
        beside = {"total": zeros(room, G, self.features, 1)} if self.normalise and self.turns else {}
        return VectorState(matrix=zeros(room, G, self.features, E + (self.normalise and not self.turns)), **beside)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: VectorState | None) -> Tensor:
        q, k = self.feature_map(q), self.feature_map(k)
        turned = self.position.rotate(q, k, ctx.coords, ctx)
        # Features in the model's type, as the products take them; what adds up is wide.
        q, k, turned_q, turned_k = (t.transpose(1, 2).to(v.dtype) for t in (q, k, *turned))
        start = None if state is None else state["matrix"]
        if not self.normalise or self.turns:
            out, end = linear_attention(turned_q, turned_k, v, causal=self.causal, segments=ctx.segments, start=start)
        else:
            out, end = normalised(q, k, v, causal=self.causal, segments=ctx.segments, start=start)
        new = {"matrix": end}
        if self.normalise and self.turns:
            ones = v.new_ones(*v.shape[:-1], 1)
            start = None if state is None else state["total"]
            total, new["total"] = linear_attention(q, k, ones, causal=self.causal, segments=ctx.segments, start=start)
            out = divided(out, total)
        if state is not None:
            state.update(**{name: t for name, t in new.items() if t is not None})
        return out
