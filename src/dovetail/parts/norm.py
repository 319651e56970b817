"""Normalisation of hidden states over their last axis."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.parts.adaptable import Adaptable
from dovetail.parts.weights import Rng
from dovetail.spec import Slot, Spec, register


@register("norm", "rms", oracle="transformers LlamaRMSNorm, GemmaRMSNorm", source="Zhang and Sennrich 2019, eq. 4")
class RmsNorm(Spec):
    """x / rms(x) · w, computed in fp32.

    cast: "before" rounds x/rms to the input's dtype and then multiplies (LLaMA); "after" multiplies in
    fp32 and rounds last (Gemma). offset: 1 for weights stored as (w - 1), multiplied as (1 + w).
    """

    eps: float = 1e-6
    cast: Literal["before", "after"] = "before"
    offset: float = 0.0

    def build(self, slot: Slot) -> nn.Module:
        return RmsNormModule(self, slot.dim)


class RmsNormModule(nn.Module):
    def __init__(self, spec: RmsNorm, dim: int):
        super().__init__()
        self.eps, self.offset, self.late = spec.eps, spec.offset, spec.cast == "after"
        self.weight = nn.Parameter(torch.empty(dim))

    def initialise(self, rng: Rng) -> None:
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        # Late rounding also adds the offset wide: 1 + w has fewer bits than w in bf16.
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)) if self.late else self.weight
        weight = weight + self.offset if self.offset else weight
        if x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
            if x.is_cuda:
                return F.rms_norm(x, weight.shape, weight, self.eps)  # one kernel; on CPU slower than the formula
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * weight
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * weight.to(normed.dtype)).to(x.dtype) if self.late else weight * normed.to(x.dtype)


@register("norm", "layer", oracle="torch.nn.LayerNorm", source="Ba et al. 2016")
class LayerNorm(Spec):
    """(x - mean) / std · w + b. bias: False leaves b out; affine: False leaves both out."""

    eps: float = 1e-5
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


@register("norm", "none", oracle="formula: x", source="identity")
class NoNorm(Spec):
    """x itself."""

    def build(self, slot: Slot) -> nn.Module:
        return nn.Identity()
