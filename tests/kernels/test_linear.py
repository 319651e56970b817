"""linear is torch's, whichever way the weight lies and however many cores share a vector; its weight's gradient in pieces."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from dovetail.kernels.installed import TRITON
from dovetail.kernels.linear import linear, plan, stepping
from dovetail.kernels.linear.accumulate import add_product


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_add_product(dtype: torch.dtype) -> None:
    """Σ yᵀ x over pieces, into one sum. On CUDA, where 16-bit products are added up in fp32, without their rounding."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    y, x = (torch.randn(3, 40, k, device=device).to(dtype) for k in (24, 16))
    total: torch.Tensor | None = None
    for piece in zip(y, x, strict=True):
        before, total = total, add_product(total, *piece, device)
        assert before is None or total is before
    right = torch.einsum("cno,cni->oi", y.double(), x.double())
    assert total is not None and total.dtype == torch.promote_types(dtype, torch.float32)
    narrow = dtype.itemsize == 2 and not cuda
    rtol = torch.finfo(dtype).eps if narrow else 1e-5
    torch.testing.assert_close(total.double(), right, rtol=rtol, atol=8 * rtol)


@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows, width", [(1, 1), (33, 40), (40, 1024), (9, 1030), (16, 2048)])
def test_one_vector(rows: int, width: int, dtype: torch.dtype) -> None:
    """Ragged and even sizes, rows that lie apart, against fp64."""
    from dovetail.kernels.linear import vector

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight = torch.randn(width, device=device).to(dtype), torch.randn(rows, width + 8, device=device).to(dtype)
    right = weight[:, :width].double() @ x.double()
    atol = 4 * torch.finfo(dtype).eps * width**0.5
    with torch.no_grad():
        torch.testing.assert_close(vector.product(x, weight[:, :width]).double(), right, rtol=0, atol=atol)
        apart = torch.stack([x, torch.randn_like(x)], 1)[:, 0]  # every second number
        torch.testing.assert_close(vector.product(apart, weight[:, :width]).double(), right, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_a_step_that_a_compiler_sees_on_a_cpu(dtype: torch.dtype, biased: bool, rows: int) -> None:
    """One vector is sums along rows, in fp32 or better and rounded once; two are torch's product, as all is without a step."""
    torch.compiler.reset()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x, weight = torch.randn(rows, 1, 40).to(dtype), torch.randn(70, 40).to(dtype)
    bias = torch.randn(70).to(dtype) if biased else None
    right = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    compiled = torch.compile(linear, backend=backend, fullgraph=True)
    for step in (False, True):
        with stepping() if step else nullcontext():
            found = compiled(x, weight, bias)
        assert found.dtype == dtype and found.shape == right.shape
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), right, rtol=eps, atol=4 * eps * 40**0.5)
        assert ("sum" in seen) == (step and rows == 1)
        seen.clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="chosen on CUDA alone")
@torch.no_grad()
def test_a_tall_weight_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter by the kernel; what was made for the call, which may still be written, is torch's."""
    from dovetail.kernels.linear import vector

    x, made = (torch.randn(n, 64, device="cuda", dtype=torch.bfloat16) for n in (1, 40_000))
    right, own, taken = F.linear(x.double(), made.double()), vector.product, []
    monkeypatch.setattr(vector, "product", lambda *given: (taken.append(given), own(*given))[1])
    for weight in (made, torch.nn.Parameter(made)):
        assert not taken
        torch.testing.assert_close(
            linear(x[None], weight)[0].double(), right, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-4
        )
    assert len(taken) == 1


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize("columns", [True, False])
def test_a_wrong_width_is_refused(columns: bool) -> None:
    weight = torch.randn(128, 256).t().contiguous().t() if columns else torch.randn(128, 256)
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes"):
        linear(torch.randn(1, 2, 128), weight)


def test_the_plan_says_why() -> None:
    bf16 = torch.bfloat16
    assert (
        plan("cuda", bf16, 64).path == plan("cuda", bf16, 128_256, step=False).path == ("vector" if TRITON else "torch")
    )
    for why, found in {
        "not on CUDA": plan("cpu", bf16, 64, step=False), "a bias": plan("cuda", bf16, 64, bias=True), "no captured step": plan("cuda", bf16, 64, step=False),
        "float64": plan("cuda", torch.float64, 64),
    }.items():  # fmt: skip
        assert found.path == "torch" and (why in found.why or not TRITON)
    assert plan("cpu", bf16, 64, bias=True).path == "rows"
