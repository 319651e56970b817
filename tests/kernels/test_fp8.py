"""Products in 8 bits: each against its formula in fp64 on the same codes, and against the product that it stands for."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

import dovetail as dt
from dovetail.errors import SpecError, UserError
from dovetail.kernels import gate, twins
from dovetail.kernels.installed import TRITON
from dovetail.kernels.linear import fp8
from dovetail.parts.storage.int8 import Int8
from dovetail.training import Recipe, fit
from dovetail.training.device import multiplies_fp8
from dovetail.training.fp8 import multiply_in_fp8
from dovetail.training.preflight import preflight
from training.small import recipe

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
EXACT = 2e-3 if GPU else 1e-5  # a GPU's sums of such products have fewer digits than fp32
pytestmark = pytest.mark.skipif(not multiplies_fp8(torch.device(DEVICE)), reason="no fp8 on this GPU")
SPEC = {
    "kind": "decoder", "vocab": 48, "dim": 32, "depth": 2, "context": 32,
    "blocks": {"mixer": {"kind": "attention", "heads": 2}, "feedforward": {"kind": "glu", "hidden": 64}},
}  # fmt: skip


def wide(codes: fp8.Codes) -> Tensor:
    return codes.codes.double() * codes.scale.double()


def near(found: Tensor, right: Tensor, share: float) -> None:
    """Within that share of the largest entry, roundings of the type that it is written in on top."""
    error, largest = (float(t.detach().abs().max()) for t in (found.double() - right, right))
    assert error <= (share + torch.finfo(found.dtype).eps) * largest, (error, largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vectors", [(3,), (2, 16), (1, 5, 7)])
def test_the_three_products_are_those_of_the_codes(vectors: tuple[int, ...], dtype: torch.dtype) -> None:
    """Vectors that fill no multiple of 16 too. On a GPU forward sums keep fewer digits."""
    x = torch.randn(*vectors, 32, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = (torch.randn(48, 32, device=DEVICE, dtype=dtype) / 6).requires_grad_()
    y, d = fp8.linear(x, weight), torch.randn(*vectors, 48, device=DEVICE, dtype=dtype)
    assert y.dtype == dtype and y.shape == d.shape
    flat, up = x.detach().flatten(0, -2), d.flatten(0, -2)
    left, right, gradient = fp8.rounded(flat), fp8.rounded(weight.detach()), fp8.rounded(up, fp8.GRADIENT)
    near(y.flatten(0, -2), wide(left) @ wide(right).t(), EXACT)
    d_x, d_weight = torch.autograd.grad(y, (x, weight), d)
    assert (d_x.dtype, d_weight.dtype) == (dtype, dtype)
    near(d_x.flatten(0, -2), wide(gradient) @ wide(right), EXACT)
    near(d_weight, wide(gradient).t() @ wide(left), EXACT)


def test_they_are_near_the_products_that_they_stand_for() -> None:
    """e4m3 has 3 bits behind its first, e5m2 2: an entry is off by a 16th or an 8th at most, 2.6% and 5.2% in the mean
    square, and a product's errors are those of both its factors."""
    x = torch.randn(256, 512, device=DEVICE, requires_grad=True)
    weight = (torch.randn(128, 512, device=DEVICE) / 512**0.5).requires_grad_()
    d = torch.randn(256, 128, device=DEVICE)
    found = [fp8.linear(x, weight), F.linear(x, weight)]
    apart = lambda one, other: float((one - other).detach().norm() / other.detach().norm())  # noqa: E731
    assert 0.01 < apart(*found) < 0.04
    for one, other in zip(*(torch.autograd.grad(y, (x, weight), d) for y in found), strict=True):
        assert 0.02 < apart(one, other) < 0.06


@pytest.mark.parametrize("size", [0.0, 1e-43, 1e-30, 1e30])
def test_what_is_nothing_tiny_or_huge(size: float) -> None:
    x = (size * torch.randn(16, 32, device=DEVICE)).requires_grad_()
    weight = torch.randn(16, 32, device=DEVICE, requires_grad=True)
    y = fp8.linear(x, weight)
    grads = torch.autograd.grad(y, (x, weight), torch.randn_like(y))
    assert y.isfinite().all() and all(g.isfinite().all() for g in grads)
    if size > 1e-40:
        near(y, (x.double() @ weight.double().t()).detach(), 0.08)
    else:
        assert float(y.detach().abs().max()) < 1e-36


@pytest.mark.parametrize("what", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(what: float) -> None:
    """In every row: one scale is of all."""
    x = 1e4 * torch.randn(16, 32, device=DEVICE)
    x[3, 4] = what
    assert not fp8.linear(x, torch.randn(16, 32, device=DEVICE)).isfinite().any(1).any()


def test_factors_lie_row_by_row() -> None:
    """Which a GPU asks for, of whatever comes: columns side by side, expanded, a weight that is turned."""
    for x in (torch.randn(1, 32, 16).transpose(1, 2), torch.randn(16, 1).expand(16, 32), torch.randn(32, 16).t()):
        x = x.to(DEVICE).requires_grad_()
        weight = torch.randn(32, 48, device=DEVICE).t().requires_grad_()
        assert fp8.rounded(fp8.filled(x)).codes.stride() == (32, 1) == fp8.rounded(weight).codes.stride()
        y = fp8.linear(x, weight)
        d = torch.randn(48, 16, device=DEVICE).t().view_as(y) if y.dim() == 2 else torch.randn_like(y)
        near(y, (x.double() @ weight.double().t()).detach(), 0.1)
        assert [g.shape for g in torch.autograd.grad(y, (x, weight), d)] == [x.shape, weight.shape]


def test_no_vectors_and_one() -> None:
    weight = torch.randn(16, 32, device=DEVICE)
    for x in (torch.randn(0, 32, device=DEVICE), torch.randn(32, device=DEVICE)):
        torch.testing.assert_close(fp8.linear(x, weight), F.linear(x, weight))


def test_a_compiler_sees_it_whole() -> None:
    x, weight = (torch.randn(16, 32, device=DEVICE, requires_grad=True) for _ in range(2))
    run = torch.compile(fp8.linear, fullgraph=True, backend="aot_eager")
    eager, traced = (f(x, weight) for f in (fp8.linear, run))
    torch.testing.assert_close(traced, eager)
    for one, other in zip(*(torch.autograd.grad(y.sin().sum(), (x, weight)) for y in (traced, eager)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
def test_behind_a_gate_that_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the gate and then the map, each by itself, and x is not kept for the backward."""
    both = torch.randn(2, 9, 64, device=DEVICE, requires_grad=True)
    weight = (torch.randn(48, 32, device=DEVICE) / 6).requires_grad_()
    d = torch.randn(2, 9, 48, device=DEVICE)
    found = []
    for path in ("plain", "triton"):
        monkeypatch.setattr(gate, "_path", lambda both, activation, path=path: path)
        y = gate.projected(both, "silu", weight, in_fp8=True)
        found.append((y, *torch.autograd.grad(y, (both, weight), d)))
    for one, other in zip(*found, strict=True):
        near(one, other.double(), 1e-5)


@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
def test_behind_a_gate_weights_stay_wide_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of an fp32 weight is fp32, and no copy of it is kept."""
    monkeypatch.setattr(gate, "_path", lambda both, activation: "triton")
    both = torch.randn(16, 64, device=DEVICE).to(torch.bfloat16 if GPU else torch.float16).requires_grad_()
    weight = (torch.randn(48, 32, device=DEVICE) / 6).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = gate.projected(both, "silu", weight, in_fp8=True)
    assert y.dtype == torch.bfloat16
    (d_weight,) = torch.autograd.grad(y, weight, torch.randn_like(y))
    assert d_weight.dtype == torch.float32 and not torch.equal(d_weight.bfloat16().float(), d_weight)


def test_maps_are_named_and_those_that_do_not_fit_refused() -> None:
    model = dt.build(SPEC)
    assert multiply_in_fp8(model, ["blocks.0.*", "blocks.*.feedforward.*"]) == [
        "blocks.0.mixer.qkv", "blocks.0.mixer.out", "blocks.0.feedforward.gate_up", "blocks.0.feedforward.down",
        "blocks.1.feedforward.gate_up", "blocks.1.feedforward.down",
    ]  # fmt: skip
    found = dict(model.named_modules())["blocks.0.mixer.out"].plans("cpu", 8)  # type: ignore[operator]
    assert found["training"].path == "fp8"
    with pytest.raises(SpecError, match="meets no linear map"):
        multiply_in_fp8(model, ["block.*"])
    with pytest.raises(SpecError, match="is the head"):
        multiply_in_fp8(dt.build({**SPEC, "head": {"kind": "linear"}}), ["*"])
    xl = {"kind": "attention", "heads": 2, "position": "transformer_xl"}
    with pytest.raises(SpecError, match="its part multiplies by the matrix"):
        multiply_in_fp8(dt.build({**SPEC, "blocks": SPEC["blocks"] | {"mixer": xl}}), ["blocks.*"])  # type: ignore[operator]
    with pytest.raises(SpecError, match="multiples of 16"):
        multiply_in_fp8(dt.build({**SPEC, "dim": 24}), ["blocks.*"])


@pytest.mark.parametrize("again", [0, 1])
def test_a_model_trains_and_evaluates(again: int) -> None:
    """Gradients near those of full products, blocks made again or not; without gradients the model as it was."""
    model: Any = dt.build(SPEC, seed=0, device=DEVICE).train()
    model.checkpointing = again
    tokens = torch.randint(0, 48, (2, 24), device=DEVICE)

    def gradients() -> list[Tensor]:
        loss = F.cross_entropy(model(tokens).logits.flatten(0, 1).float(), tokens.roll(-1, 1).flatten())
        return list(torch.autograd.grad(loss, list(model.parameters())))

    full = gradients()
    with torch.no_grad():
        before = model(tokens).logits
    multiply_in_fp8(model, ["blocks.*"])
    found = gradients()
    for one, other in zip(found, full, strict=True):
        assert F.cosine_similarity(one.flatten(), other.flatten(), 0) > 0.98
    assert any(not torch.equal(one, other) for one, other in zip(found, full, strict=True))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)
    with twins.plain():
        assert model(tokens).logits.requires_grad and not model.blocks[0].mixer.qkv._multiplies_in_fp8()
    down = model.blocks[0].feedforward.down
    down.keep(Int8())
    assert down(torch.randn(2, 64, device=DEVICE, requires_grad=True)).requires_grad and not down.in_fp8


def test_a_part_of_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps that are fused and used one by one are multiplied in 8 bits too."""
    model: Any = dt.build(SPEC, seed=0).train()
    multiply_in_fp8(model, ["blocks.*"])
    qkv, x = model.blocks[0].mixer.qkv, torch.randn(1, 16, 32)
    torch.testing.assert_close(qkv.rows(x, 32, 64), fp8.linear(x, qkv.weight[32:64]))
    assert not torch.equal(qkv.rows(x, 32, 64), F.linear(x, qkv.weight[32:64]))


def test_a_recipe_asks_for_it(tmp_path: Any) -> None:
    with pytest.raises(SpecError, match="plain turns every fast path off"):
        Recipe.load(recipe(tmp_path, plain=True, fp8=["blocks.*"]))
    with pytest.raises(SpecError, match="meets no linear map"):
        fit(recipe(tmp_path, fp8=["body.*"]))
    with pytest.raises(SpecError, match="leaves them frozen"):
        Recipe.load({**recipe(tmp_path, fp8=["blocks.*"]), "adapter": {"kind": "lora"}})


def test_a_gpu_without_it_says_so(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dovetail.training.fp8.multiplies_fp8", lambda device: False)
    with pytest.raises(UserError, match="multiplies no fp8"):
        fit(recipe(tmp_path, fp8=["blocks.*"]))


def test_preflight_says_so(tmp_path: Any) -> None:
    screen = Console(file=StringIO(), width=200)
    screen.print(preflight(recipe(tmp_path, fp8=["blocks.*.mixer.*"])))
    assert "products in 8 bits: blocks.*.mixer.*" in screen.file.getvalue()  # type: ignore[attr-defined]
