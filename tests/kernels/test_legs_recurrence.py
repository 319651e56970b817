"""The HiPPO-LegS recurrence in chunks equals its plain twin: outputs, gradients, numbers of all sorts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dovetail.kernels import legs_recurrence as legs


def rows(B: int, T: int, H: int, N: int, dtype: torch.dtype) -> list[Tensor]:
    sizes = ((B, T, 1 + 2 * H), (1, H), (2 * H, N))
    scales = (1.0, H**-0.5, N**-0.5)
    return [(s * torch.randn(n, dtype=dtype)).requires_grad_() for n, s in zip(sizes, scales, strict=True)]


def twin(given: Tensor, told: Tensor, recall: Tensor) -> Tensor:
    B, T, _ = given.shape
    number = torch.arange(T, device=given.device).expand(B, T)
    start = [given.new_zeros(B, n) for n in (told.shape[1], recall.shape[1])]
    return legs.reference.recurrence(given, told, recall, number, None, *start)[0]


@pytest.mark.parametrize(("B", "T", "H", "N"), [(3, 40, 5, 7), (1, 1, 2, 1), (2, 2, 1, 3), (2, 130, 8, 32)])
def test_it_is_its_twin(B: int, T: int, H: int, N: int) -> None:
    given = rows(B, T, H, N, torch.float64)
    ours, theirs = legs.recurrence(*given), twin(*given)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(ours)
    for one, other in zip(*(torch.autograd.grad((y * weight).sum(), given) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_training_goes_on_after_inference_mode() -> None:
    """The matrices are kept from one forward to the next, whatever mode made them."""
    legs.matrices.cache_clear()
    given = rows(1, 5, 2, 3, torch.float64)
    with torch.inference_mode():
        scored = legs.recurrence(*given)
    trained = legs.recurrence(*given)
    torch.autograd.grad(trained.sum(), given)
    assert torch.equal(scored, trained)


def test_gradients_by_differences() -> None:
    assert torch.autograd.gradcheck(legs.recurrence, rows(2, 4, 3, 4, torch.float64))


def test_fp32_is_as_near_to_fp64_as_the_twin() -> None:
    """At sizes of permuted MNIST along the row: matrices in fp32 lose no more than twice what the twin loses."""
    exact = rows(2, 784, 16, 64, torch.float64)
    near = [t.detach().float().requires_grad_() for t in exact]
    weight = torch.randn(2, 784, 16, dtype=torch.float64)
    y = legs.recurrence(*exact)
    want = [y.detach(), *torch.autograd.grad((y * weight).sum(), exact)]
    lost = []
    for run in (legs.recurrence, twin):
        y = run(*near)
        found = [y.detach(), *torch.autograd.grad((y * weight.float()).sum(), near)]
        lost.append([float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, want, strict=True)])
    for ours, theirs in zip(*lost, strict=True):
        assert ours <= max(2 * theirs, 1e-5)


def test_the_walk_on_the_device_or_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two whole chunks and a part of one, a hidden vector that is no power of two."""
    pytest.importorskip("triton")
    from dovetail.kernels.legs_recurrence import triton

    monkeypatch.setattr(legs, "_walk", lambda x: triton)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exact = rows(2, 37, 5, 7, torch.float64)
    near = [t.detach().to(device, torch.float32).requires_grad_() for t in exact]
    ours, theirs = legs.recurrence(*near), twin(*exact)
    weight = torch.randn_like(theirs)
    want = [theirs, *torch.autograd.grad((theirs * weight).sum(), exact)]
    found = [ours, *torch.autograd.grad((ours * weight.to(ours)).sum(), near)]
    for one, other in zip(found, want, strict=True):
        assert (one.cpu().double() - other).abs().max() <= 1e-5 * other.abs().max()


def test_plans() -> None:
    assert legs.plan(784, 512, plain=True).path == "chunks"
    assert legs.plan(2000, 512, plain=True).path == legs.plan(8, 8, plain=False).path == "step by step"
