"""The delta rule as a mixer: each token corrects what the memory answers to its key."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels.delta_rule import delta_rule, plan
from dovetail.kernels.plan import Plan
from dovetail.parts.activation import Silu
from dovetail.parts.context import Context, refuse_memory
from dovetail.parts.norm import L2Norm, RmsNorm
from dovetail.parts.recurrent.borders import Borders
from dovetail.parts.recurrent.matrix import by_head, check_place, matrix, per_head
from dovetail.parts.recurrent.short_convolution import ShortConvolution
from dovetail.parts.state import Room, VectorState
from dovetail.parts.weights import Linear
from dovetail.spec import Slot, Spec, register
from dovetail.spec.categories import ActivationPart, NormPart
from dovetail.spec.ranges import Count


class DeltaRule(Spec):
    """Base of the two.

    heads: of queries and keys, dim / 64 unless given. value_heads: heads of values, memories and outputs, a multiple of
    heads, which then share queries and keys; heads unless given. head_dim, value_dim: width of a key and of a value,
    dim / heads and dim / value_heads unless given. convolution: tokens that a short causal convolution over q, k and v
    reads; null leaves it out. activation: of q, k and v after it. qk_norm: of each query and key; keys longer than 1
    make the memory diverge. beta_max: β = beta_max · sigmoid; beyond 1 the memory can also turn what it held around
    (Grazzi et al. 2024). norm: of each head's output, with weights that all heads share. gate: φ; null for none.
    """

    keeps: ClassVar[tuple[str, ...]] = (
        "heads", "value_heads", "head_dim", "value_dim", "convolution", "activation", "qk_norm", "beta_max", "norm", "gate",
    )  # fmt: skip
    heads: Count | None = None
    value_heads: Count | None = None
    head_dim: Count | None = None
    value_dim: Count | None = None
    convolution: Count | None = 4
    activation: ActivationPart = Silu()
    qk_norm: NormPart = L2Norm(eps=1e-6)
    beta_max: Annotated[float, Field(gt=0, le=2)] = 1.0
    norm: NormPart = RmsNorm(eps=1e-5)
    gate: ActivationPart | None = None


@register(
    "mixer",
    "delta_net",
    oracle="formula: fla-org/flash-linear-attention fla/ops/delta_rule/naive.py, fla/layers/delta_net.py, in fp64",
    source="Yang et al. 2024 (Parallelizing Linear Transformers with the Delta Rule), eq. 1; Schlag et al. 2021",
    causal=True,
    bidirectional=False,
    cross=False,
)
class DeltaNet(DeltaRule):
    """S_t = S_{t-1} + β_t k_t (v_t - S_{t-1}ᵀ k_t)ᵀ, o_t = S_tᵀ q_t / √D, y = (norm(o) ⊙ φ(W_g x)) W_o for each head."""

    def build(self, slot: Slot) -> nn.Module:
        return DeltaNetModule(self, slot)


class DeltaNetModule(nn.Module):
    def __init__(self, spec: DeltaRule, slot: Slot):
        super().__init__()
        check_place(f"{spec.kind} (the delta rule)", slot)
        self.heads = H = spec.heads or max(1, slot.dim // 64)
        self.value_heads = Hv = spec.value_heads or H
        if Hv % H:
            raise BuildError(
                f"{Hv} value heads cannot share {H} heads of queries and keys",
                where=slot.path,
                remedy="value_heads must be a multiple of heads",
            )
        self.head_dim = D = spec.head_dim or per_head(slot.dim, H, "width", slot)
        self.value_dim = Dv = spec.value_dim or per_head(slot.dim, Hv, "width", slot)
        self.path, self.beta_max = slot.path, spec.beta_max
        reads = (("query", H * D), ("key", H * D), ("value", Hv * Dv))
        self.qkv = Linear(slot.dim, 2 * H * D + Hv * Dv, slot=slot, parts=reads)
        width = self.qkv.out_features
        self.convolution = None if spec.convolution is None else ShortConvolution(width, spec.convolution, slot)
        self.activation = slot.build(spec.activation, "activation")
        self.q_norm = slot.build(spec.qk_norm, "q_norm", dim=D)
        self.k_norm = slot.build(spec.qk_norm, "k_norm", dim=D)
        self.beta = Linear(slot.dim, Hv, slot=slot)
        self.gate = None if spec.gate is None else Linear(slot.dim, Hv * Dv, slot=slot)
        self.gate_activation: Any = None if spec.gate is None else slot.build(spec.gate, "gate_activation")
        self.norm = slot.build(spec.norm, "norm", dim=Dv)
        self.out = Linear(Hv * Dv, slot.width_out, slot=slot, role="residual")

    def new_state(self, room: Room) -> VectorState:
        """S (B,Hv,D,Dv) as "matrix", in fp32 or better, and the convolution's last tokens: of one size for ever."""
        tensors = {"matrix": matrix(room, self.value_heads, self.head_dim, self.value_dim)}
        if self.convolution is not None:
            tensors["last"] = self.convolution.last(room)
        return VectorState(**tensors)

    def log_decay(self, x: Tensor) -> Tensor | None:
        """log α (B,T,Hv) in fp32 or better; None where nothing fades."""
        return None

    def forward(
        self, x: Tensor, ctx: Context, state: Any = None, *, keys: Tensor | None = None, values: Tensor | None = None
    ) -> Tensor:
        """x (B,T,C) -> (B,T,C'). Each document starts from zero (the first of a row from `state`)."""
        refuse_memory(keys, values, self.path)
        keyed, D, Dv = self.heads * self.head_dim, self.head_dim, self.value_dim
        wide = torch.promote_types(x.dtype, torch.float32)  # what the rule computes in
        mixed = self.qkv(x).to(wide)
        mixed = mixed if self.convolution is None else self.convolution(mixed, ctx, state)
        q, k, v = self.activation(mixed).split([keyed, keyed, self.value_heads * Dv], -1)
        q, k = self.q_norm(by_head(q, D).to(x.dtype)), self.k_norm(by_head(k, D).to(x.dtype))
        if self.value_heads != self.heads:
            q, k = (t.repeat_interleave(self.value_heads // self.heads, 1) for t in (q, k))
        beta = self.beta(x).to(wide).sigmoid() * self.beta_max
        decay = self.log_decay(x)
        borders = Borders.of(ctx, x.shape[0])
        if borders is not None:  # padding neither writes nor fades
            padding = ~borders.real[..., None]
            beta = beta.masked_fill(padding, 0.0)
            decay = None if decay is None else decay.masked_fill(padding, 0.0)
        o, end = delta_rule(
            q,
            k,
            by_head(v, Dv),
            beta.transpose(1, 2),
            log_decay=None if decay is None else decay.transpose(1, 2),
            start=None if state is None else state["matrix"],
            reset=None if borders is None else borders.first,
        )
        if state is not None:
            state.update(matrix=end)
        o = self.norm(o.transpose(1, 2)).flatten(2)
        return self.out(o if self.gate is None else o * self.gate_activation(self.gate(x)))

    def plans(self, device: str, length: int) -> dict[str, Plan]:
        """Which kernel would run each use of this layer, and why."""
        row = plan(length, device=device, dtype=self.out.dtype, width=self.head_dim)
        return {"training, prefill": row, "decoding": plan(1)}
