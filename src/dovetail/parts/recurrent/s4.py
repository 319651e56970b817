"""S4 and LSSL: state spaces whose matrix is HiPPO's own, as diagonal plus low rank, and whole."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dovetail.kernels.ssm_convolution import dense_kernel
from dovetail.kernels.ssm_convolution.krylov import dense_scan
from dovetail.parts.recurrent.hippo import diagonalised, transition
from dovetail.parts.recurrent.state_space import StateSpace, StateSpaceModule, check_even
from dovetail.parts.weights import Rng
from dovetail.spec import Slot, register


@register(
    "mixer",
    "s4",
    oracle="state-spaces/s4 SSMKernelDPLR (golden)",
    source="Gu et al. 2022 (Efficiently Modeling Long Sequences with Structured State Spaces), section 3",
    causal=True,
    bidirectional=False,
    cross=False,
)
class S4(StateSpace):
    """y = C h + D x, h' = (Λ - p p*) h + B x a channel, by the bilinear rule: N/2 conjugate pairs.

    start: HiPPO-LegS ("legs"), or its waves over a window ("fourier", Gu et al. 2022c). Unlike in the released code, C
    itself is the parameter and not C (I - Ā^T), so that rows of every length, and steps, are one system. What that asks
    for anyway, log₂ T squarings of Ā, gives the convolution's kernel by two products: the paper's Cauchy sums, which
    need N·T numbers a channel instead of N·√T, are not run. Real parts of Λ are kept as logarithms of their negatives.
    """

    start: Literal["legs", "fourier"] = "legs"

    def build(self, slot: Slot) -> nn.Module:
        check_even(self, slot)
        return S4Module(self, slot)


class DenseModule(StateSpaceModule):
    """What runs by its whole matrix: `law` gives (Ā (H,N,N), B̄ (H,N), C (H,N)), real, fp64."""

    @abstractmethod
    def law(self) -> tuple[Tensor, Tensor, Tensor]: ...

    def kernel(self, length: int, dtype: torch.dtype) -> Tensor:
        return dense_kernel(*self.law(), length).to(dtype)  # powers in fp64: errors double with each squaring

    def stepping(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(t.to(dtype) for t in self.law())

    def scan(self, x: Tensor, law: Sequence[Tensor], start: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        a, b, c = law
        return dense_scan(x, a, b, c, start, real)


class S4Module(DenseModule):
    """Λ: log_decay and frequency (H,N/2); P, B and C (H,N/2,2), real and imaginary parts."""

    undecayed: ClassVar[frozenset[str]] = frozenset({"log_dt", "log_decay", "frequency", "P", "B"})

    def __init__(self, spec: S4, slot: Slot):
        super().__init__(spec, slot)
        half = (slot.dim, spec.state // 2)
        self.start: Literal["legs", "fourier"] = spec.start
        self.log_decay, self.frequency = (nn.Parameter(torch.empty(half)) for _ in range(2))
        self.P, self.B, self.C = (nn.Parameter(torch.empty(*half, 2)) for _ in range(3))

    def initialise(self, rng: Rng) -> None:
        super().initialise(rng)
        eigen, p, b, _ = diagonalised(self.start, self.order)
        self.log_decay.copy_((-eigen.real).clamp_min(1e-4).log().expand_as(self.log_decay))  # 0 for "fourier"
        self.frequency.copy_(eigen.imag.expand_as(self.frequency))
        self.P.copy_(torch.view_as_real(p).expand_as(self.P))
        self.B.copy_(torch.view_as_real(b).expand_as(self.B))
        self.C.normal_(std=math.sqrt(0.5), generator=rng("C"))

    def law(self) -> tuple[Tensor, Tensor, Tensor]:
        """In real and imaginary parts of h, a matrix of twice the size: with p* h = Re(p* h) over both halves, A = Λ - 2 p pᵀ.

        Ā = 2 (I - dt/2 A)⁻¹ - I, and the inverse is that of a diagonal and one outer product (Sherman and Morrison
        1950): nothing is solved for, which on a GPU the host would wait for.
        """
        dt, cat = self.log_dt.double().exp()[:, None], torch.cat
        eigen = torch.complex(-self.log_decay.double().exp(), self.frequency.double())
        p, b = (torch.view_as_complex(t.double()) for t in (self.P, self.B))
        inverse = 1 / (1 - dt / 2 * eigen)
        u, v, b, rb = (cat([t.real, t.imag], 1) for t in (inverse * p, inverse.conj() * p, b, inverse * b))
        share = dt / (1 + dt * (cat([p.real, p.imag], 1) * u).sum(1, keepdim=True))
        real, imaginary = torch.diag_embed(inverse.real), torch.diag_embed(inverse.imag)
        diagonal = cat([cat([real, -imaginary], 2), cat([imaginary, real], 2)], 1)
        eye = torch.eye(self.order, dtype=torch.float64, device=dt.device)
        step = 2 * (diagonal - (share * u)[..., None] * v[:, None]) - eye
        c = 2 * cat([self.C[..., 0], -self.C[..., 1]], 1).double()
        return step, dt * (rb - share * u * (v * b).sum(1, keepdim=True)), c


@register(
    "mixer",
    "lssl",
    oracle="formula: the recurrence of its matrices, fp64",
    source="Gu et al. 2021 (Combining Recurrent, Convolutional, and Continuous-time Models), section 3",
    causal=True,
    bidirectional=False,
    cross=False,
)
class Lssl(StateSpace):
    """y = C h + D x, h' = A h + B x with a whole matrix A (N,N) and B (N), one for all channels, and a dt for each.

    Memory and time grow with N² a channel: S4 is the same without that. start: HiPPO's A and B of a measure. The
    bilinear rule discretises; kernels are products of powers that double (Krylov).
    """

    start: Literal["legs", "legt", "fourier"] = "legs"

    def build(self, slot: Slot) -> nn.Module:
        if self.start == "fourier":
            check_even(self, slot)
        return LsslModule(self, slot)


class LsslModule(DenseModule):
    """A (N,N), B (N), C (H,N)."""

    undecayed: ClassVar[frozenset[str]] = frozenset({"log_dt", "A", "B"})

    def __init__(self, spec: Lssl, slot: Slot):
        super().__init__(spec, slot)
        self.start: Literal["legs", "legt", "fourier"] = spec.start
        self.A, self.B = nn.Parameter(torch.empty(spec.state, spec.state)), nn.Parameter(torch.empty(spec.state))
        self.C = nn.Parameter(torch.empty(slot.dim, spec.state))

    def initialise(self, rng: Rng) -> None:
        super().initialise(rng)
        a, b = transition(self.start, self.order)
        self.A.copy_(a)
        self.B.copy_(b)
        self.C.normal_(generator=rng("C"))

    def law(self) -> tuple[Tensor, Tensor, Tensor]:
        a, b = self.A.double().expand(self.channels, -1, -1), self.B.double().expand(self.channels, -1)
        return *bilinear(a, b, self.log_dt.double().exp()), self.C.double()


def bilinear(a: Tensor, b: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """(I - dt/2 A)⁻¹ (I + dt/2 A) and (I - dt/2 A)⁻¹ dt B, for a (H,N,N), b (H,N), dt (H)."""
    dt = dt[:, None, None]
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    solved = torch.linalg.solve(eye - dt / 2 * a, torch.cat([eye + dt / 2 * a, dt * b[..., None]], -1))
    return solved[..., :-1], solved[..., -1]
