"""Gated linear attention: linear attention whose memory fades, channel by channel, as each token says."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.kernels.gated_linear import gated_linear, plan
from dovetail.kernels.plan import Plan
from dovetail.parts.activation import Silu
from dovetail.parts.context import Context, refuse_memory
from dovetail.parts.norm import RmsNorm
from dovetail.parts.recurrent.borders import Borders
from dovetail.parts.recurrent.matrix import by_head, check_place, matrix, per_head
from dovetail.parts.state import Room, VectorState
from dovetail.parts.weights import Linear
from dovetail.spec import Slot, Spec, register
from dovetail.spec.categories import ActivationPart, NormPart
from dovetail.spec.ranges import Count, Positive


@register(
    "mixer",
    "gla",
    oracle="formula: fla-org/flash-linear-attention fla/ops/gla/naive.py, fla/layers/gla.py, token by token in fp64",
    source="Yang et al. 2024 (Gated Linear Attention), eq. 3 and section 4.4",
    causal=True,
    bidirectional=False,
    cross=False,
)
class GatedLinearAttention(Spec):
    """S_t = diag(α_t) S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t / √D, y = (norm(o) ⊙ φ(W_g x)) W_o for each head.

    α = sigmoid(W₂ W₁ x + b)^(1/τ), one for each key channel, W₁ down to `gate_rank`. heads: dim / 64 unless given.
    head_dim: width D of a key, dim / (2·heads) unless given; value_dim: width of a value, dim / heads unless given.
    gate_temperature: τ; large ones forget slowly. norm: of each head's output, with weights that all heads share.
    gate: φ; null leaves the output gate out.
    """

    keeps: ClassVar[tuple[str, ...]] = ("heads", "head_dim", "value_dim", "gate")
    heads: Count | None = None
    head_dim: Count | None = None
    value_dim: Count | None = None
    gate_rank: Count = 16
    gate_temperature: Positive = 16.0
    norm: NormPart = RmsNorm(eps=1e-5)
    gate: ActivationPart | None = Silu()

    def build(self, slot: Slot) -> nn.Module:
        return GlaModule(self, slot)

    def hands_on(self, dim: int | None) -> dict[str, Any]:
        heads = self.heads or max(1, (dim or 64) // 64)
        widths = {} if dim is None else {"head_dim": dim // (2 * heads), "value_dim": dim // heads}
        return super().hands_on(dim) | {"heads": heads} | {n: getattr(self, n) or width for n, width in widths.items()}


class GlaModule(nn.Module):
    def __init__(self, spec: GatedLinearAttention, slot: Slot):
        super().__init__()
        check_place("gla (gated linear attention)", slot)
        self.heads = H = spec.heads or max(1, slot.dim // 64)
        self.head_dim = D = spec.head_dim or per_head(slot.dim, 2 * H, "width", slot)
        self.value_dim = Dv = spec.value_dim or per_head(slot.dim, H, "width", slot)
        self.path, self.temperature = slot.path, spec.gate_temperature
        reads = (("query", H * D), ("key", H * D), ("value", H * Dv))
        self.qkv = Linear(slot.dim, H * (2 * D + Dv), slot=slot, parts=reads)
        self.decay_down = Linear(slot.dim, spec.gate_rank, slot=slot)
        self.decay_up = Linear(spec.gate_rank, H * D, slot=slot, bias=True)
        self.gate = None if spec.gate is None else Linear(slot.dim, H * Dv, slot=slot)
        self.activation: Any = None if spec.gate is None else slot.build(spec.gate, "activation")
        self.norm = slot.build(spec.norm, "norm", dim=Dv)
        self.out = Linear(H * Dv, slot.width_out, slot=slot, role="residual")

    def new_state(self, room: Room) -> VectorState:
        """S (B,H,D,Dv) as "matrix", in fp32 or better: the same size after any number of tokens."""
        return VectorState(matrix=matrix(room, self.heads, self.head_dim, self.value_dim))

    def forward(
        self, x: Tensor, ctx: Context, state: Any = None, *, keys: Tensor | None = None, values: Tensor | None = None
    ) -> Tensor:
        """x (B,T,C) -> (B,T,C'). Each document starts from zero (the first of a row from `state`)."""
        refuse_memory(keys, values, self.path)
        H, D, Dv = self.heads, self.head_dim, self.value_dim
        q, k, v = self.qkv(x).split([H * D, H * D, H * Dv], -1)
        logits = self.decay_up(self.decay_down(x))
        decay = F.logsigmoid(logits.to(torch.promote_types(x.dtype, torch.float32))) / self.temperature
        borders = Borders.of(ctx, x.shape[0])
        if borders is not None:  # padding neither writes nor fades
            k, decay = (t.masked_fill(~borders.real[..., None], 0.0) for t in (k, decay))
        o, end = gated_linear(
            by_head(q, D),
            by_head(k, D),
            by_head(v, Dv),
            by_head(decay, D),
            start=None if state is None else state["matrix"],
            reset=None if borders is None else borders.first,
        )
        if state is not None:
            state.update(matrix=end)
        o = self.norm(o.transpose(1, 2)).flatten(2)
        return self.out(o if self.gate is None else o * self.activation(self.gate(x)))

    def plans(self, device: str, length: int) -> dict[str, Plan]:
        """Which kernel would run each use of this layer, and why."""
        width = max(self.head_dim, self.value_dim)
        return {"training, prefill": plan(length, device, self.out.dtype, width), "decoding": plan(1)}
