"""The Triton kernels of gated linear attention against the plain twin in fp64: on a GPU, else interpreted.

The interpreter has no bf16 products; bench/gated_linear.py checks bf16.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.kernels.gated_linear import chunked, reference

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
NAMES = ("o", "S_T", "dq", "dk", "dv", "dlog_decay", "dS_0")


def given(B: int, H: int, T: int, D: int, Dv: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v, log α and S_0; tokens before heads in memory, as projections leave them."""
    q, k, v = (torch.randn(B, T, H, w, device=DEVICE).transpose(1, 2).to(dtype) for w in (D, D, Dv))
    decay = F.logsigmoid(torch.randn(B, H, T, D, device=DEVICE))
    return [t.requires_grad_() for t in (q, k, v, decay, torch.randn(B, H, D, Dv, device=DEVICE))]


def compare(inputs: list[Tensor], reset: Tensor | None, started: bool = True) -> dict[str, Tensor]:
    """Outputs, states and gradients of both, within the tolerance of the type; ours by name."""
    from dovetail.kernels.gated_linear import triton

    *rest, S = inputs
    scale = 0.7
    o, end = triton.gated_linear(*rest, S if started else None, reset, scale)
    twins = [t.detach().double().requires_grad_() for t in inputs]
    q, k, v, decay, S_twin = twins
    twin = reference.gated_linear(q * scale, k, v, decay, S_twin if started else S_twin * 0, reset)
    ups = [torch.randn_like(o), torch.randn_like(end)]
    wanted = len(inputs) - (not started)
    ours = torch.autograd.grad([o, end], inputs[:wanted], ups)
    theirs = torch.autograd.grad(twin, twins[:wanted], [u.double() for u in ups])
    assert o.dtype == rest[0].dtype and end.dtype == torch.float32
    for name, a, b, like in zip(NAMES, (o, end, *ours), (*twin, *theirs), (o, end, *inputs), strict=False):
        assert a.dtype == like.dtype and a.isfinite().all(), name
        bound = TOLERANCE[rest[0].dtype] * max(1.0, b.abs().max().item())
        if name == "dlog_decay" and rest[0].dtype == torch.bfloat16:
            bound *= 2  # a sum over all tokens behind it, whose roundings add up
        torch.testing.assert_close(a.double(), b, rtol=0, atol=bound, msg=lambda m, name=name: f"{name}: {m}")
    return dict(zip(NAMES, (o, end, *ours), strict=False))


@pytest.mark.parametrize(("D", "Dv", "T"), [(5, 7, 70), (16, 40, 33), (70, 3, 31), (130, 20, 18), (1, 1, 2)])
def test_equals_the_twin(D: int, Dv: int, T: int) -> None:
    """Odd widths, widths beyond a tile, rows that end inside a chunk; with and without a first state."""
    compare(given(2, 2, T, D, Dv), None, started=D != 16)


def test_documents_start_from_zero() -> None:
    """At chunk borders, beside them, several in a chunk, in one row of two; a first token's decay has no effect."""
    inputs = given(2, 1, 100, 5, 6)
    reset = torch.zeros(2, 100, dtype=torch.bool, device=DEVICE)
    reset[0, [3, 4, 30, 32, 63, 64, 97]] = reset[1, 0] = True
    ours = compare(inputs, reset)
    for row in range(2):
        felt = ours["dlog_decay"][row]
        assert not felt[:, reset[row]].any() and (row == 0 or felt[:, 1:].all())
    assert ours["dS_0"][0].all() and not ours["dS_0"][1].any()


@pytest.mark.parametrize("packed", [False, True], ids=["row", "packed"])
@pytest.mark.parametrize("strong", [-30.0, -float("inf")] if DEVICE == "cuda" else [-float("inf")])
def test_strong_decays(strong: float, packed: bool) -> None:
    """A fifth of the tokens forget everything: exp(-Σ log α) over 16 tokens already overflows; the others hardly do."""
    inputs = given(1, 2, 70, 9, 4)
    decay = inputs[3].detach()
    decay = torch.where(torch.rand_like(decay) < 0.2, strong, 0.1 * decay)
    decay[:, 0, :33] = -0.01  # one head's first chunk is not steep
    inputs[3] = decay.requires_grad_()
    reset = torch.zeros(1, 70, dtype=torch.bool, device=DEVICE)
    reset[0, [5, 20, 21]] = True
    compare(inputs, reset if packed else None)


@pytest.mark.filterwarnings("ignore:overflow encountered in matmul")  # numpy says so, a GPU would not
def test_decays_around_the_limit_of_one_product() -> None:
    """Chunks whose whole decay is just inside and just outside of what one product bears."""
    inputs = given(1, 1, 128, 4, 4)
    inputs[3] = (-(119.9 + 0.2 * torch.arange(4, device=DEVICE)) / 32).expand(1, 1, 128, 4).clone().requires_grad_()
    inputs[3].data[:, :, :32] *= 0.99
    compare(inputs, None)


def test_segments_of_a_long_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is walked in three segments, of two chunks each, with documents and without."""
    from dovetail.kernels.gated_linear import triton

    monkeypatch.setattr(triton, "LEAST", 2)
    inputs = given(2, 1, 32 * 5 + 5, 3, 2)
    reset = torch.zeros(2, inputs[0].shape[2], dtype=torch.bool, device=DEVICE)
    reset[1, [40, 90]] = True
    compare(inputs, reset)


@pytest.mark.parametrize(("D", "Dv"), [(8, 20), (21, 9)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types(dtype: torch.dtype, D: int, Dv: int) -> None:
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bf16 products")
    inputs = given(1, 2, 70, D, Dv, dtype)
    reset = torch.zeros(1, 70, dtype=torch.bool, device=DEVICE)
    reset[0, 40] = True
    compare(inputs, reset)
    inputs[3].data[:, :, 10:20] = -30.0
    compare(inputs, reset)


def test_any_memory_layout() -> None:
    """Parts of one projection, last axes that are not dense, expanded gradients."""
    from dovetail.kernels.gated_linear import triton

    whole = torch.randn(2, 20, 2 * (5 + 5 + 6), device=DEVICE, requires_grad=True)
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in whole.split([10, 10, 12], -1))
    decay = F.logsigmoid(torch.randn(2, 2, 5, 20, device=DEVICE)).mT
    o, end = triton.gated_linear(q, k, v, decay, None, None, 1.0)
    (ours,) = torch.autograd.grad(o.sum() + end.sum(), whole)
    wide = whole.detach().double().requires_grad_()
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in wide.split([10, 10, 12], -1))
    zero = torch.zeros(2, 2, 5, 6, dtype=torch.float64, device=DEVICE)
    twin = reference.gated_linear(q, k, v, decay.double(), zero, None)
    (theirs,) = torch.autograd.grad(twin[0].sum() + twin[1].sum(), wide)
    torch.testing.assert_close(o.double(), twin[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-3)


def test_compiles_whole() -> None:
    """Without a graph break; outputs and gradients to the bit, and fakes with the strides of the real thing."""
    from dovetail.kernels.gated_linear import triton

    inputs = given(1, 2, 20, 4, 6)
    reset = torch.zeros(1, 20, dtype=torch.bool, device=DEVICE)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return triton.gated_linear(*tensors, reset, 0.5)  # type: ignore[misc]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    ours, plain = compiled(*inputs), run(*inputs)
    assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])
    a, b = (torch.autograd.grad(y[0].square().sum() + y[1].sum(), inputs) for y in (ours, plain))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    q, k, v, decay, S = (t.detach() for t in inputs)
    arguments = (q, k, v, decay, S, reset.to(torch.uint8), 0.5)
    torch.library.opcheck(triton._run.op, arguments, test_utils=("test_schema", "test_faketensor"))
    ups = torch.ones(1, 2, 20, 6, device=DEVICE), torch.ones(1, 2, 4, 6, device=DEVICE)
    torch.library.opcheck(triton._run_backward.op, (*arguments, *ups), test_utils=("test_schema", "test_faketensor"))


def test_equals_the_chunked_path() -> None:
    """fp32 against fp32: the two fast paths are two roundings of one thing."""
    from dovetail.kernels.gated_linear import triton

    q, k, v, decay, S = (t.detach() for t in given(1, 2, 90, 6, 5))
    ours = triton.gated_linear(q, k, v, decay, S, None, 1.0)
    torch.testing.assert_close(ours, chunked.gated_linear(q, k, v, decay, S, None), rtol=0, atol=1e-4)
