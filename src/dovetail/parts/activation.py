"""Activations, each a registered part with its formula; GLUs gate with any of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.parts.weights import Rng
from dovetail.spec import Slot, Spec, register


class Pointwise(nn.Module):
    """A function of each entry alone. formula: the kind whose formula it is, where that has no fields."""

    def __init__(self, function: Callable[[Tensor], Tensor], formula: str | None = None):
        super().__init__()
        self.function, self.formula = function, formula

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Activation(Spec):
    """Base: an activation is its function."""

    def function(self, x: Tensor) -> Tensor:
        raise TypeError(f"{self.kind} does not say its function")

    def build(self, slot: Slot) -> nn.Module:
        return Pointwise(self.function, None if type(self).model_fields else self.kind)


@register("activation", "identity", oracle="formula: x", source="bilinear gates, Shazeer 2020")
class Identity(Activation):
    """x."""

    def function(self, x: Tensor) -> Tensor:
        return x


@register("activation", "step", oracle="formula: x >= 0", source="Rosenblatt 1958", differentiable=False)
class StepFunction(Activation):
    """1 where x >= 0, else 0: the perceptron's. Its gradient is zero everywhere."""

    def function(self, x: Tensor) -> Tensor:
        return (x >= 0).to(x.dtype)


@register("activation", "sigmoid", oracle="formula: 1/(1+exp(-x))", source="Rumelhart et al. 1986")
class Sigmoid(Activation):
    """1/(1 + e^-x)."""

    def function(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


@register("activation", "tanh", oracle="formula: (e^x-e^-x)/(e^x+e^-x)", source="LeCun et al. 1998")
class Tanh(Activation):
    """tanh x."""

    def function(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


@register("activation", "relu", oracle="formula: max(x,0)", source="Nair and Hinton 2010")
class Relu(Activation):
    """max(x, 0)."""

    def function(self, x: Tensor) -> Tensor:
        return F.relu(x)


@register("activation", "leaky_relu", oracle="torch.nn.LeakyReLU", source="Maas et al. 2013")
class LeakyRelu(Activation):
    """x where positive, slope·x elsewhere."""

    slope: float = 0.01

    def function(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope)


@register("activation", "prelu", oracle="torch.nn.PReLU", source="He et al. 2015, eq. 1")
class PRelu(Activation):
    """x where positive, a·x elsewhere, with a learned `a` (one for all channels)."""

    start: float = 0.25

    def build(self, slot: Slot) -> nn.Module:
        return PReluModule(self.start)


class PReluModule(nn.Module):
    def __init__(self, start: float):
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(1))

    def initialise(self, rng: Rng) -> None:
        nn.init.constant_(self.weight, self.start)

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.weight.to(x.dtype))


@register("activation", "elu", oracle="torch.nn.ELU", source="Clevert et al. 2015")
class Elu(Activation):
    """x where positive, alpha·(e^x - 1) elsewhere."""

    alpha: float = 1.0

    def function(self, x: Tensor) -> Tensor:
        return F.elu(x, self.alpha)


@register("activation", "selu", oracle="torch.nn.SELU", source="Klambauer et al. 2017")
class Selu(Activation):
    """Scaled ELU with the self-normalising constants."""

    def function(self, x: Tensor) -> Tensor:
        return F.selu(x)


@register("activation", "relu6", oracle="torch.nn.ReLU6", source="Howard et al. 2017")
class Relu6(Activation):
    """min(max(x, 0), 6)."""

    def function(self, x: Tensor) -> Tensor:
        return F.relu6(x)


@register("activation", "softplus", oracle="formula: log(1+e^x)", source="Dugas et al. 2001")
class Softplus(Activation):
    """log(1 + e^x)."""

    def function(self, x: Tensor) -> Tensor:
        return F.softplus(x)


@register("activation", "relu2", oracle="formula: max(x,0)²", source="So et al. 2021 (Primer)")
class SquaredRelu(Activation):
    """max(x, 0)²."""

    def function(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


@register("activation", "gelu", oracle="formula: x Phi(x)", source="Hendrycks and Gimpel 2016")
class Gelu(Activation):
    """x·Φ(x), by the error function."""

    def function(self, x: Tensor) -> Tensor:
        return F.gelu(x)


@register(
    "activation",
    "gelu_tanh",
    oracle="formula: 0.5x(1+tanh(sqrt(2/pi)(x+0.044715x³)))",
    source="Hendrycks and Gimpel 2016",
)
class GeluTanh(Activation):
    """GELU by its tanh approximation (GPT-2's gelu_new, Gemma's gelu_pytorch_tanh)."""

    def function(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


@register("activation", "quick_gelu", oracle="formula: x sigmoid(1.702x)", source="Hendrycks and Gimpel 2016; CLIP")
class QuickGelu(Activation):
    """x·sigmoid(1.702 x)."""

    def function(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


@register("activation", "silu", oracle="formula: x sigmoid(x)", source="Elfwing et al. 2017")
class Silu(Activation):
    """x·sigmoid(x): Swish with beta 1."""

    def function(self, x: Tensor) -> Tensor:
        return F.silu(x)


@register("activation", "swish", oracle="formula: x sigmoid(beta x)", source="Ramachandran et al. 2017")
class Swish(Activation):
    """x·sigmoid(beta·x). learned: beta is a parameter that starts at `beta`."""

    beta: float = 1.0
    learned: bool = False

    def function(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)

    def build(self, slot: Slot) -> nn.Module:
        return SwishModule(self.beta) if self.learned else Pointwise(self.function)


class SwishModule(nn.Module):
    def __init__(self, beta: float):
        super().__init__()
        self.start = beta
        self.beta = nn.Parameter(torch.empty(()))

    def initialise(self, rng: Rng) -> None:
        nn.init.constant_(self.beta, self.start)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta.to(x.dtype) * x)


@register("activation", "mish", oracle="formula: x tanh(log(1+e^x))", source="Misra 2019")
class Mish(Activation):
    """x·tanh(softplus x)."""

    def function(self, x: Tensor) -> Tensor:
        return F.mish(x)


@register(
    "activation", "laplace", oracle="formula: 0.5(1+erf((x-mu)/(sigma sqrt 2)))", source="Ma et al. 2022 (MEGA), eq. 14"
)
class Laplace(Activation):
    """½(1 + erf((x - μ)/(σ√2))), μ = √½, σ = √(1/4π): a bounded stand-in for squared ReLU."""

    def function(self, x: Tensor) -> Tensor:
        mu, sigma = math.sqrt(0.5), math.sqrt(0.25 / math.pi)
        return 0.5 * (1 + torch.erf((x - mu) / (sigma * math.sqrt(2))))
