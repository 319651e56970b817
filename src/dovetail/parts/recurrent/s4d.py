"""S4D: a state space whose matrix is diagonal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dovetail.kernels.ssm_convolution import diagonal_kernel
from dovetail.kernels.ssm_scan import diagonal_scan
from dovetail.parts.recurrent.hippo import diagonalised
from dovetail.parts.recurrent.state_space import COMPLEX, StateSpace, StateSpaceModule, check_even
from dovetail.parts.weights import Rng
from dovetail.spec import Slot, register


@register(
    "mixer",
    "s4d",
    oracle="state-spaces/s4 SSMKernelDiag (golden)",
    source="Gu et al. 2022b (On the Parameterization and Initialization of Diagonal State Space Models)",
    causal=True,
    bidirectional=False,
    cross=False,
)
class S4d(StateSpace):
    """y = 2 Re Σ_n C_n h_n + D x, h_n' = a_n h_n + B_n x: N/2 damped waves a channel, one of each conjugate pair.

    start: of a_n, n = 0..N/2-1. lin: -1/2 + iπn (eq. 9). inv: -1/2 + i(N/π)(N/(2n+1) - 1) (eq. 8). legs: the diagonal
    part of HiPPO-LegS, and its B (eq. 7). quad: -1/2 + i(2n+1)²/π. real: -(n+1) (section 4). discretise: "zoh" or
    "bilinear" (section 3.1). The real part is kept as the logarithm of its negative.
    """

    start: Literal["lin", "inv", "legs", "quad", "real"] = "lin"
    discretise: Literal["zoh", "bilinear"] = "zoh"

    def build(self, slot: Slot) -> nn.Module:
        check_even(self, slot)
        return S4dModule(self, slot)


class S4dModule(StateSpaceModule):
    """A: log_decay and frequency (H,N/2); B and C (H,N/2,2), real and imaginary parts."""

    undecayed: ClassVar[frozenset[str]] = frozenset({"log_dt", "log_decay", "frequency", "B"})

    def __init__(self, spec: S4d, slot: Slot):
        super().__init__(spec, slot)
        half = (slot.dim, spec.state // 2)
        self.start, self.discretise = spec.start, spec.discretise
        self.log_decay, self.frequency = (nn.Parameter(torch.empty(half)) for _ in range(2))
        self.B, self.C = (nn.Parameter(torch.empty(*half, 2)) for _ in range(2))

    def initialise(self, rng: Rng) -> None:
        super().initialise(rng)
        a, b = started(self.start, self.order)
        self.log_decay.copy_((-a.real).log().expand_as(self.log_decay))
        self.frequency.copy_(a.imag.expand_as(self.frequency))
        self.B.copy_(torch.view_as_real(b).expand_as(self.B))
        self.C.normal_(std=math.sqrt(0.5), generator=rng("C"))  # variance 1 over both parts

    def law(self) -> tuple[Tensor, Tensor, Tensor]:
        """(exponent, decay, weight), each (H,N/2) complex128: decay = exp(exponent) a step, weight = C times B's."""
        a = torch.complex(-self.log_decay.double().exp(), self.frequency.double())
        dt = self.log_dt.double().exp()[:, None]
        both = torch.view_as_complex(self.B.double()) * torch.view_as_complex(self.C.double())
        if self.discretise == "zoh":
            decay = torch.exp(dt * a)
            return dt * a, decay, both * (decay - 1) / a
        decay = (1 + dt / 2 * a) / (1 - dt / 2 * a)
        return decay.log(), decay, both * dt / (1 - dt / 2 * a)

    def kernel(self, length: int, dtype: torch.dtype) -> Tensor:
        exponent, _, weight = self.law()
        return diagonal_kernel(weight.to(COMPLEX[dtype]), exponent, length)

    def stepping(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(t.to(COMPLEX[dtype]) for t in self.law()[1:])

    def scan(self, x: Tensor, law: Sequence[Tensor], start: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        decay, weight = law
        y, end = diagonal_scan(x, decay, weight, torch.view_as_complex(start), real)
        return y, torch.view_as_real(end)

    def sizes(self) -> tuple[int, ...]:
        return (self.channels, self.order // 2, 2)


def started(start: str, order: int) -> tuple[Tensor, Tensor]:
    """a and B (N/2), complex128, of an initialisation."""
    n = torch.arange(order // 2, dtype=torch.float64)
    one, half = torch.ones_like(n).to(torch.complex128), torch.full_like(n, 0.5)
    if start == "legs":
        eigen, _, b, _ = diagonalised("legs", order)
        return eigen, b
    if start == "real":
        return torch.complex(-(n + 1), torch.zeros_like(n)), one
    frequency = {
        "lin": math.pi * n,
        "inv": order / math.pi * (order / (2 * n + 1) - 1),
        "quad": (2 * n + 1) ** 2 / math.pi,
    }[start]
    return torch.complex(-half, frequency), one
