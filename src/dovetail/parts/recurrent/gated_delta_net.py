"""The gated delta rule as a mixer: the memory fades as each token says, and is then corrected."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.parts.activation import Silu
from dovetail.parts.recurrent.delta_net import DeltaNetModule, DeltaRule
from dovetail.parts.weights import Linear, Rng
from dovetail.spec import Slot, register
from dovetail.spec.categories import ActivationPart


@register(
    "mixer",
    "gated_delta_net",
    oracle="transformers qwen3_next Qwen3NextGatedDeltaNet",
    source="Yang et al. 2025 (Gated Delta Networks), eq. 10 and section 3.4; decay of Gu and Dao 2024 (Mamba-2)",
    causal=True,
    bidirectional=False,
    cross=False,
)
class GatedDeltaNet(DeltaRule):
    """S_t = α_t S_{t-1} + β_t k_t (v_t - α_t S_{t-1}ᵀ k_t)ᵀ, o_t = S_tᵀ q_t / √D, y = (norm(o) ⊙ φ(W_g x)) W_o.

    α = exp(-A · softplus(W_a x + b)), one for each value head. A starts uniform in 1..16, and softplus(b) between
    1e-3 and 0.1, uniform in its logarithm: memories of some tokens to some thousand.
    """

    gate: ActivationPart | None = Silu()

    def build(self, slot: Slot) -> nn.Module:
        return GatedDeltaNetModule(self, slot)


class GatedDeltaNetModule(DeltaNetModule):
    def __init__(self, spec: DeltaRule, slot: Slot):
        super().__init__(spec, slot)
        self.decay = Linear(slot.dim, self.value_heads, slot=slot)
        self.a_log = nn.Parameter(torch.empty(self.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads))

    def initialise(self, rng: Rng) -> None:
        self.a_log.uniform_(1.0, 16.0, generator=rng("a_log")).log_()
        self.dt_bias.uniform_(math.log(1e-3), math.log(0.1), generator=rng("dt_bias")).exp_()
        self.dt_bias.expm1_().log_()  # what softplus takes to that

    def log_decay(self, x: Tensor) -> Tensor:
        """-A · softplus(W_a x + b): (B,T,Hv)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        # log σ(-z) = -softplus(z), whose backward under AOTAutograd takes strides for others
        return self.a_log.to(wide).exp() * F.logsigmoid(-(self.decay(x).to(wide) + self.dt_bias.to(wide)))
