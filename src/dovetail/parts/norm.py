"""Normalisation of hidden states over their last axis."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.kernels import twins
from dovetail.parts.adaptable import Adaptable
from dovetail.parts.weights import Rng
from dovetail.spec import Slot, Spec, register
from dovetail.spec.ranges import Positive


@register("norm", "rms", oracle="transformers LlamaRMSNorm, GemmaRMSNorm", source="Zhang and Sennrich 2019, eq. 4")
class RmsNorm(Spec):
    """x / rms(x) · w, computed in fp32.

    cast: "before" rounds x/rms to the input's dtype and then multiplies (LLaMA); "after" multiplies in
    fp32 and rounds last (Gemma). offset: 1 for weights stored as (w - 1), multiplied as (1 + w). affine: False
    leaves w out (GAU-alpha, RoFormerV2).
    """

    eps: Positive = 1e-6
    cast: Literal["before", "after"] = "before"
    offset: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    affine: bool = True

    def build(self, slot: Slot) -> nn.Module:
        return RmsNormModule(self, slot.dim)


class RmsNormModule(nn.Module):
    weight: nn.Parameter | None

    def __init__(self, spec: RmsNorm, dim: int):
        super().__init__()
        self.eps, self.offset, self.late = spec.eps, spec.offset, spec.cast == "after"
        self.register_parameter("weight", nn.Parameter(torch.empty(dim)) if spec.affine else None)

    def initialise(self, rng: Rng) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        # Late rounding also adds the offset wide: 1 + w has fewer bits than w in bf16.
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)) if self.late else self.weight
        weight = weight + self.offset if self.offset else weight
        if x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
            if x.is_cuda and not twins.asked():
                return F.rms_norm(x, weight.shape, weight, self.eps)  # one kernel; on CPU slower than the formula
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * weight
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * weight.to(normed.dtype)).to(x.dtype) if self.late else weight * normed.to(x.dtype)


@register("norm", "layer", oracle="torch.nn.LayerNorm", source="Ba et al. 2016")
class LayerNorm(Spec):
    """(x - mean) / std · w + b. bias: False leaves b out; affine: False leaves both out."""

    eps: Positive = 1e-5
    bias: bool = True
    affine: bool = True

    def build(self, slot: Slot) -> nn.Module:
        return LayerNormModule(self, slot.dim)


class LayerNormModule(Adaptable, nn.LayerNorm):
    def __init__(self, spec: LayerNorm, dim: int):
        super().__init__(dim, eps=spec.eps, elementwise_affine=spec.affine, bias=spec.bias)

    def initialise(self, rng: Rng) -> None:
        super().reset_parameters()

    def reset_parameters(self) -> None:
        """Nothing: `initialise` draws the start once the model stands."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.around(self.plain, x) if self.adapted else self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        """The norm without adapters."""
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


@register(
    "norm",
    "l2",
    oracle="torch.nn.functional.normalize",
    source="Henry et al. 2020, eq. 3 (QKNorm); Su 2023, kexue.fm/archives/9859 (KeyNorm, cosine attention)",
)
class L2Norm(Spec):
    """x / |x|, computed in fp32: a direction alone. gain: where a learned factor starts; none unless given.

    KeyNorm is `qk_norm: l2, qk_norm_on: key, scale: 1.0` in an attention; cosine attention `qk_norm: l2, scale: λ` with
    λ = 4 ln n, n half the trained length, or n = i + 1 at query i by `scale: 4 ln m` beside position
    {kind: logn, trained: m, clip: false}. A learned λ is the product of two gains, with a scale of 1.
    eps: added to |x|².
    """

    eps: Positive = 1e-12
    gain: Positive | None = None

    def build(self, slot: Slot) -> nn.Module:
        return L2NormModule(self)


class L2NormModule(nn.Module):
    def __init__(self, spec: L2Norm):
        super().__init__()
        self.eps, self.start = spec.eps, spec.gain
        self.gain = None if spec.gain is None else nn.Parameter(torch.empty(1))

    def initialise(self, rng: Rng) -> None:
        if self.gain is not None:
            nn.init.constant_(self.gain, self.start or 0.0)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + self.eps)
        return (normed if self.gain is None else normed * self.gain).to(x.dtype)


@register("norm", "none", oracle="formula: x", source="identity")
class NoNorm(Spec):
    """x itself."""

    def build(self, slot: Slot) -> nn.Module:
        return nn.Identity()
