"""linear is torch's, whichever way the weight lies and however many cores share a vector."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dovetail.kernels.linear import linear


@pytest.fixture
def cores() -> object:
    was = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(was)


@pytest.mark.parametrize("shape", [(1, 1, 128), (128,), (2, 3, 128), (1, 2, 128)])
@pytest.mark.parametrize("width", [128, 130, 192])
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.usefixtures("cores")
def test_every_layout_gives_the_product(shape: tuple[int, ...], width: int, columns: bool, biased: bool) -> None:
    x, weight = torch.randn(*shape[:-1], width), torch.randn(70, width)
    bias = torch.randn(70) if biased else None
    laid = weight.t().contiguous().t() if columns else weight
    with torch.no_grad():
        ours = linear(x, laid, bias)
    theirs = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert ours.shape == theirs.shape
    assert (ours.double() - theirs).abs().max() < 2e-5 * theirs.abs().max()


@pytest.mark.usefixtures("cores")
def test_gradients_go_through_torch() -> None:
    x = torch.randn(1, 128, requires_grad=True)
    laid = torch.randn(128, 70).t().requires_grad_()
    linear(x, laid).sum().backward()
    assert torch.allclose(x.grad, laid.sum(0, keepdim=True)) and laid.grad is not None
