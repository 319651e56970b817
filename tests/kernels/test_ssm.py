"""Scans and convolutions of state spaces against their plain twins, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.kernels import ssm_convolution, ssm_scan
from dovetail.kernels.ssm_convolution.krylov import dense_kernel, dense_scan


def random(*shape: int, complex: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex128 if complex else torch.float64)


def leaves(*tensors: Tensor) -> Any:
    return [t.requires_grad_() for t in tensors]


def same(ours: Any, theirs: Any, given: list[Tensor], tolerance: float = 1e-10) -> None:
    """Values, and gradients of one weighted sum of them."""
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    weights = [torch.randn_like(t) for t in theirs]
    sums = [
        sum((t * w).real.sum() if t.is_complex() else (t * w).sum() for t, w in zip(o, weights)) for o in (ours, theirs)
    ]
    a, b = (torch.autograd.grad(s, given, materialize_grads=True) for s in sums)  # type: ignore[arg-type]
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("length", [1, 7, 64, 150])
@pytest.mark.parametrize("packed", [False, True])
def test_selective_scan(length: int, packed: bool) -> None:
    B, D, N = 2, 3, 4
    x, b, c = random(B, length, D), random(B, length, N), random(B, length, N)
    dt, a, start = random(B, length, D).exp(), -random(D, N).exp(), random(B, D, N)
    if packed:
        dt[:, ::3] = 0  # padding
    first = torch.rand(B, length) < 0.2 if packed else None
    given = leaves(x, dt, a, b, c, start)
    same(ssm_scan.selective_scan(*given, first), ssm_scan.reference.selective_scan(*given, first), given)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [1, 7, 150])
@pytest.mark.parametrize("padded", [False, True])
def test_diagonal_scan(length: int, padded: bool) -> None:
    B, D, N = 2, 3, 4
    decay = torch.polar(torch.rand(D, N, dtype=torch.float64), random(D, N))
    given = [random(B, length, D), decay, random(D, N, complex=True), random(B, D, N, complex=True)]
    given = [t.requires_grad_() for t in given]
    real = torch.rand(B, length) < 0.7 if padded else None
    same(ssm_scan.diagonal_scan(*given, real), ssm_scan.reference.diagonal_scan(*given, real), given)  # type: ignore[arg-type]


def test_a_state_that_forgets_at_once_stays_exact_in_fp32() -> None:
    """Decays whose product over a chunk is far below the least number: dividing by it would give infinity."""
    x, b, c = torch.randn(1, 200, 2), torch.randn(1, 200, 3), torch.randn(1, 200, 3)
    dt, a, start = torch.full((1, 200, 2), 30.0), -torch.arange(1.0, 4).expand(2, 3), torch.randn(1, 2, 3)
    ours, theirs = (
        run(x, dt, a, b, c, start)[0] for run in (ssm_scan.selective_scan, ssm_scan.reference.selective_scan)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 128, 129, 300])
@pytest.mark.parametrize("run", [ssm_convolution.transforms, ssm_convolution.products.convolve])
def test_convolution(length: int, run: Any) -> None:
    """By transforms and by products."""
    given = [random(2, length, 3).requires_grad_(), random(3, length).requires_grad_()]
    same([run(*given)], [ssm_convolution.reference.convolve(*given)], given)


def test_plan_of_convolutions() -> None:
    paths = [ssm_convolution.plan(*given).path for given in ((128, "cpu"), (129, "cpu"), (784, "cuda"), (2000, "cuda"))]
    assert paths == ["products", "fft", "products", "fft"]


def test_products_in_fp32_take_nothing_from_the_future() -> None:
    """Three blocks and a part of one; nearer to fp64 than 1e-6 of the largest."""
    x, kernel = torch.randn(3, 391, 2), torch.randn(2, 391)
    y, later = (ssm_convolution.products.convolve(t, kernel) for t in (x, torch.cat([x[:, :200], -x[:, 200:]], 1)))
    assert torch.equal(y[:, :200], later[:, :200]) and not torch.equal(y, later)
    exact = ssm_convolution.reference.convolve(x.double(), kernel.double())
    assert (y.double() - exact).abs().max() <= 1e-6 * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssm_convolution.products.convolve(x, kernel), y)


def test_the_reference_convolution_is_the_sum() -> None:
    x, kernel = random(1, 5, 2), random(2, 5)
    for t in range(5):
        expected = sum(kernel[:, t - s] * x[0, s] for s in range(t + 1))
        torch.testing.assert_close(ssm_convolution.reference.convolve(x, kernel)[0, t], expected)


@pytest.mark.parametrize("length", [1, 2, 3, 16, 131])
def test_diagonal_kernel(length: int) -> None:
    exponent = torch.complex(-random(3, 4).exp(), 3 * random(3, 4)).requires_grad_()
    given = [random(3, 4, complex=True).requires_grad_(), exponent]
    ours, theirs = (m.diagonal_kernel(*given, length) for m in (ssm_convolution, ssm_convolution.reference))
    same([ours], [theirs], given)


@torch.no_grad()
def test_diagonal_kernel_of_lengths_that_vary_compiles_whole() -> None:
    weight, exponent = random(2, 3, complex=True), torch.complex(-torch.rand(2, 3).double(), random(2, 3))

    def run(x: Tensor) -> Tensor:
        return ssm_convolution.diagonal_kernel(weight, exponent, x.shape[0])

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 17):
        assert torch.equal(compiled(torch.ones(length)), run(torch.ones(length)))


def test_diagonal_kernel_keeps_its_phase_in_fp32() -> None:
    """A wave of 20,000 turns: tables in fp32 would be wrong in the third digit."""
    exponent = torch.complex(
        torch.full((1, 1), -1e-6, dtype=torch.float64), torch.full((1, 1), 1.97, dtype=torch.float64)
    )
    weight = torch.ones(1, 1, dtype=torch.complex128)
    ours = ssm_convolution.diagonal_kernel(weight.to(torch.complex64), exponent, 65536)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(
        ours.double(), ssm_convolution.reference.diagonal_kernel(weight, exponent, 65536), rtol=0, atol=2e-6
    )


def stable(D: int, N: int) -> Tensor:
    a = random(D, N, N)
    return 0.95 * a / torch.linalg.matrix_norm(a, 2)[:, None, None]


@pytest.mark.parametrize("length", [1, 2, 5, 16, 77])
def test_dense_kernel(length: int) -> None:
    given = leaves(stable(3, 4), random(3, 4), random(3, 4))
    same([dense_kernel(*given, length)], [ssm_convolution.reference.dense_kernel(*given, length)], given)


@pytest.mark.parametrize("length", [1, 5, 150])
@pytest.mark.parametrize("padded", [False, True])
def test_dense_scan(length: int, padded: bool) -> None:
    given: Any = [
        t.requires_grad_() for t in (random(2, length, 3), stable(3, 4), random(3, 4), random(3, 4), random(2, 3, 4))
    ]
    real = torch.rand(2, length) < 0.7 if padded else None
    same(dense_scan(*given, real), ssm_convolution.reference.dense_scan(*given, real), given)
