"""How weights start, as a stated choice. Each scheme draws a matrix by its role and fans.

Roles: "query", "key", "value" and "in" (read the stream), "residual" (writes to it), "head" (to logits),
"embedding", "position".
Weights are (fan_out, fan_in). Only NTK and muP also set a forward multiplier or a learning-rate scale.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dovetail.spec import Slot, Spec, register
from dovetail.spec.categories import InitPart
from dovetail.spec.ranges import Count

Spread = Annotated[float, Field(ge=0)]  # a standard deviation, or a factor on one
_TRUNCATED_STD = 0.8796256610342398  # std of a standard normal cut at ±2


class Init(Spec):
    """Base of the schemes."""

    def draw(self, weight: Tensor, role: str, fan_in: int, fan_out: int, slot: Slot, rng: torch.Generator) -> None:
        """Fills `weight` in place."""
        raise TypeError(f"{self.kind} does not say how it draws")

    def multiplier(self, role: str, fan_in: int, fan_out: int) -> float:
        """Factor on a linear map's output; 1 unless the scheme is a parametrisation."""
        return 1.0

    def lr_scale(self, role: str, fan_in: int, fan_out: int) -> float:
        """Factor on the learning rate of a weight of this role; 1 unless the scheme is a parametrisation."""
        return 1.0


def truncated_normal(weight: Tensor, std: float, rng: torch.Generator) -> None:
    """A normal cut at two sigma, widened so that its std is `std` after the cut."""
    torch.nn.init.trunc_normal_(weight, std=1.0, a=-2.0, b=2.0, generator=rng)
    weight.mul_(std / _TRUNCATED_STD)


@register("init", "normal", oracle="formula: N(0, std²)", source="Radford et al. 2018 (GPT), section 4.1")
class Normal(Init):
    """N(0, std²) for every matrix."""

    std: Spread = 0.02

    def draw(self, weight: Tensor, role: str, fan_in: int, fan_out: int, slot: Slot, rng: torch.Generator) -> None:
        weight.normal_(0.0, self.std, generator=rng)


@register(
    "init",
    "truncated",
    oracle="formula: cut at 2 sigma, std kept",
    source="Dosovitskiy et al. 2020 (JAX variance scaling)",
)
class Truncated(Init):
    """A normal cut at ±2 sigma whose std is `std` after the correction 0.8796."""

    std: Spread = 0.02

    def draw(self, weight: Tensor, role: str, fan_in: int, fan_out: int, slot: Slot, rng: torch.Generator) -> None:
        truncated_normal(weight, self.std, rng)


@register("init", "gpt2", oracle="formula: residual maps / sqrt(2 depth)", source="Radford et al. 2019, section 2.3")
class Gpt2(Init):
    """N(0, std²), residual maps scaled by 1/sqrt(2·depth)."""

    std: Spread = 0.02

    def draw(self, weight: Tensor, role: str, fan_in: int, fan_out: int, slot: Slot, rng: torch.Generator) -> None:
        scale = (2 * slot.depth) ** -0.5 if role == "residual" else 1.0
        weight.normal_(0.0, self.std * scale, generator=rng)


class VarianceScaling(Init):
    """var = gain² / fan. distribution: normal, truncated or uniform."""

    gain: Spread = 1.0
    fan: Literal["in", "out", "average"] = "in"
    distribution: Literal["normal", "truncated", "uniform"] = "normal"

    def draw(self, weight: Tensor, role: str, fan_in: int, fan_out: int, slot: Slot, rng: torch.Generator) -> None:
        if role in ("embedding", "position"):
            fan = weight.shape[-1]  # a row is one vector of the stream
        else:
            fan = {"in": fan_in, "out": fan_out, "average": (fan_in + fan_out) / 2}[self.fan]
        std = self.gain / math.sqrt(fan)
        if self.distribution == "normal":
            weight.normal_(0.0, std, generator=rng)
        elif self.distribution == "truncated":
            truncated_normal(weight, std, rng)
        else:
            weight.uniform_(-std * math.sqrt(3), std * math.sqrt(3), generator=rng)


@register("init", "lecun", oracle="formula: var = 1/fan_in", source="LeCun et al. 1998, eq. 16")
class Lecun(VarianceScaling):
    """var = 1/fan_in: keeps the variance of a linear layer's output."""


@register("init", "xavier", oracle="torch.nn.init.xavier_uniform_", source="Glorot and Bengio 2010, eq. 16")
class Xavier(VarianceScaling):
    """var = 2/(fan_in + fan_out): between keeping the output's and the gradient's variance."""

    fan: Literal["in", "out", "average"] = "average"
    distribution: Literal["normal", "truncated", "uniform"] = "uniform"


@register("init", "he", oracle="torch.nn.init.kaiming_normal_", source="He et al. 2015, eq. 10")
class He(VarianceScaling):
    """var = 2/fan_in: ReLU halves the variance, so the weights double it."""

    gain: Spread = math.sqrt(2.0)


@register("init", "orthogonal", oracle="formula: WᵀW = gain² I", source="Saxe et al. 2013")
class Orthogonal(Init):
    """Orthonormal rows or columns, whichever are fewer."""

    gain: Spread = 1.0

    def draw(self, weight: Tensor, role: str, fan_in: int, fan_out: int, slot: Slot, rng: torch.Generator) -> None:
        wide = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))  # no QR in bf16
        weight.copy_(torch.nn.init.orthogonal_(wide, gain=self.gain, generator=rng))


@register(
    "init",
    "t5",
    oracle="transformers T5PreTrainedModel._init_weights",
    source="Raffel et al. 2020 (1/sqrt(d) folded into q)",
)
class T5(Init):
    """Reading maps N(0, 1/fan_in), embeddings and head N(0, 1); attention has no 1/sqrt(D), so it goes into q's start."""

    factor: Spread = 1.0

    def draw(self, weight: Tensor, role: str, fan_in: int, fan_out: int, slot: Slot, rng: torch.Generator) -> None:
        if role in ("embedding", "head"):
            std = 1.0
        elif role == "position":
            std = slot.dim**-0.5
        elif role == "query":
            std = (fan_in * (slot.head_dim or 1)) ** -0.5
        else:
            std = fan_in**-0.5
        weight.normal_(0.0, self.factor * std, generator=rng)


@register("init", "ntk", oracle="formula: y = Wx/sqrt(fan_in), W ~ N(0,1)", source="Jacot et al. 2018")
class Ntk(Init):
    """NTK parametrisation: weights N(0, 1), the map itself divides by sqrt(fan_in)."""

    gain: Spread = 1.0

    def draw(self, weight: Tensor, role: str, fan_in: int, fan_out: int, slot: Slot, rng: torch.Generator) -> None:
        std = weight.shape[-1] ** -0.5 if role in ("embedding", "position") else 1.0
        weight.normal_(0.0, std, generator=rng)

    def multiplier(self, role: str, fan_in: int, fan_out: int) -> float:
        return self.gain / math.sqrt(fan_in)


@register("init", "mup", oracle="formula: Yang et al. table 8", source="Yang et al. 2022, table 8 (Adam)")
class Mup(Init):
    """muP for Adam: hidden maps N(0, 1/fan_in) with learning rate ∝ base/fan_in, head output ∝ base/fan_in.

    base: the width at which the learning rate was tuned. Attention's 1/D scale is the attention's own field.
    """

    base: Count = 64
    std: Spread = 1.0

    def draw(self, weight: Tensor, role: str, fan_in: int, fan_out: int, slot: Slot, rng: torch.Generator) -> None:
        if role in ("embedding", "position") or role == "head":
            weight.normal_(0.0, self.std * self.base**-0.5, generator=rng)
        else:
            weight.normal_(0.0, self.std * fan_in**-0.5, generator=rng)

    def multiplier(self, role: str, fan_in: int, fan_out: int) -> float:
        return self.base / fan_in if role == "head" else 1.0

    def lr_scale(self, role: str, fan_in: int, fan_out: int) -> float:
        return self.base / fan_in if role not in ("head", "embedding", "position") else 1.0


@register("init", "scaled", oracle="formula: base scheme times gain", source="Wang et al. 2022 (DeepNet), figure 2")
class Scaled(Init):
    """Another scheme with the weights of some roles multiplied by `gain` (DeepNorm's beta)."""

    base: InitPart
    gain: float
    roles: tuple[str, ...]

    def draw(self, weight: Tensor, role: str, fan_in: int, fan_out: int, slot: Slot, rng: torch.Generator) -> None:
        base: Init = self.base  # type: ignore[assignment]
        base.draw(weight, role, fan_in, fan_out, slot, rng)
        if role in self.roles:
            weight.mul_(self.gain)

    def multiplier(self, role: str, fan_in: int, fan_out: int) -> float:
        base: Init = self.base  # type: ignore[assignment]
        return base.multiplier(role, fan_in, fan_out)

    def lr_scale(self, role: str, fan_in: int, fan_out: int) -> float:
        base: Init = self.base  # type: ignore[assignment]
        return base.lr_scale(role, fan_in, fan_out)
