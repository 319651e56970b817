"""The delta rule's Triton kernels against the plain twin in fp64: on a device where there is one, else interpreted."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.kernels.delta_rule import delta_rule, plan, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
CASES = [
    # B, H, T, D, Dv, gated, packed, token by token
    (1, 2, 150, 5, 20, True, True, True),
    (2, 1, 70, 20, 9, False, False, False),
    (1, 1, 64, 16, 70, True, False, False),
    (2, 1, 65, 3, 4, False, True, True),
    (1, 1, 5, 70, 16, True, True, False),
]


def given(B: int, H: int, T: int, D: int, Dv: int, device: str, turned: bool = False) -> list[Tensor]:
    """q, k, v, β, log α and S_0; turned: the first three laid out token by token."""
    make = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    wide = [make(B, H, T, D), F.normalize(make(B, H, T, D), dim=-1), make(B, H, T, Dv)]
    wide = [t.transpose(1, 2).contiguous().transpose(1, 2) if turned else t for t in wide]
    return [*wide, 2 * torch.rand(B, H, T, device=device), -torch.rand(B, H, T, device=device), make(B, H, D, Dv)]


def same(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], tolerance: float) -> None:
    """Equal within `tolerance` of the largest entry (of 1e-3 where all are smaller: a start that was long forgotten)."""
    if theirs[0] is not None and theirs[0].is_cuda:
        tolerance *= 5  # exponentials are approximate there, and products in fp32 are made of three in tf32
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert (one is None) == (other is None), i
        if one is None or other is None:
            continue
        error, largest = (one.double() - other).abs().max().item(), other.abs().max().item()
        assert error <= tolerance * max(largest, 1e-3), (i, error, largest)


def compare(inputs: list[Tensor], gated: bool, reset: Tensor | None, tolerance: float, each: bool = False) -> None:
    """Outputs, and gradients by both of them together, and by `each` alone."""
    from dovetail.kernels.delta_rule import triton as kernels

    wide = [t.detach().double().requires_grad_() for t in inputs]
    narrow = [t.detach().clone().requires_grad_() for t in inputs]
    q, k, v, beta, decay, start = narrow
    ours = kernels.delta_rule(q, k, v, beta, decay if gated else None, start, reset, 0.3)
    q, k, v, beta, decay, start = wide
    theirs = reference.delta_rule(0.3 * q, k, v, beta, decay if gated else None, start, reset)
    assert (ours[0].dtype, ours[1].dtype) == (inputs[0].dtype, torch.float32)
    same(ours, theirs, tolerance)
    ups = [torch.randn_like(t) for t in ours]
    for use in ([0, 1], [0], [1]) if each else ([0, 1],):
        outs, up = [[o[i] for i in use] for o in (ours, theirs)], [ups[i] for i in use]
        grads = torch.autograd.grad(outs[0], narrow, up, retain_graph=True, allow_unused=True, materialize_grads=True)
        assert [g.dtype for g in grads] == [t.dtype for t in narrow]
        up = [u.double() for u in up]
        twin = torch.autograd.grad(outs[1], wide, up, retain_graph=True, allow_unused=True, materialize_grads=True)
        same(grads, twin, tolerance)


@needs_triton
@pytest.mark.parametrize(("B", "H", "T", "D", "Dv", "gated", "packed", "turned"), CASES)
def test_equals_the_twin(B: int, H: int, T: int, D: int, Dv: int, gated: bool, packed: bool, turned: bool) -> None:
    reset = torch.rand(B, T, device=DEVICE) < 0.05 if packed else None
    compare(given(B, H, T, D, Dv, DEVICE, turned), gated, reset, 1e-5, each=T == 70)


@needs_triton
def test_one_key_written_over_and_tokens_that_forget_everything() -> None:
    """The key each time beyond its value, where powers of A would overflow; then some tokens that hardly forget."""
    q, k, v, beta, decay, start = given(1, 1, 128, 8, 8, DEVICE)
    compare([q, k[:, :, :1].expand_as(k), v, torch.full_like(beta, 2.0), decay, start], False, None, 1e-4)
    decay = torch.where(torch.arange(128, device=DEVICE) % 20 == 7, -1e4, -1e-3).view(1, 1, -1)
    compare([q, k, v, beta, decay, start], True, None, 1e-5)


@needs_triton
@pytest.mark.parametrize(("D", "Dv"), [(16, 16), (33, 9), (20, 17)])
def test_narrow_types(D: int, Dv: int) -> None:
    """Widths that fill no tile too."""
    q, k, v, *rest = given(1, 1, 70, D, Dv, DEVICE)
    half, tolerance = (
        (torch.bfloat16, 3e-2) if DEVICE == "cuda" else (torch.float16, 5e-3)
    )  # the interpreter multiplies bf16 as integers
    compare([q.to(half), k.to(half), v.to(half), *rest], True, None, tolerance)


@needs_triton
def test_the_operator_as_torch_sees_it() -> None:
    """Its own check of it, and whole in a compiled graph."""
    from dovetail.kernels.delta_rule import triton as kernels

    *inputs, start = [t.requires_grad_() for t in given(1, 2, 70, 4, 6, DEVICE, turned=True)]
    documents = (torch.rand(1, 70, device=DEVICE) < 0.1).cumsum(1, dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.dovetail.delta_rule, (*inputs, start, documents, 0.5), test_utils=("test_schema", "test_faketensor")
    )
    eager = kernels.delta_rule(*inputs, start, None, 0.5)
    compiled = torch.compile(
        lambda *t: kernels.delta_rule(*t, None, 0.5), fullgraph=True, backend="aot_eager"
    )(*inputs, start)  # fmt: skip
    grads = [torch.autograd.grad([t.sin().sum() for t in out], [*inputs, start]) for out in (compiled, eager)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_long_rows_on_the_device() -> None:
    q, k, v, beta, decay, start = given(2, 3, 200, 64, 32, "cuda")
    ours = delta_rule(q, k, v, beta, log_decay=decay, start=start, scale=1.0)
    same(ours, reference.delta_rule(*(t.double() for t in (q, k, v, beta, decay, start)), None), 1e-5)


def test_plan_says_which_and_why() -> None:
    pytest.importorskip("triton")
    assert plan(1, device="cuda", width=64).path == "step"
    assert plan(64, device="cuda", dtype=torch.bfloat16, width=128).path == "triton"
    assert plan(64, device="cuda", dtype=torch.float32, width=128).path == "triton"
    assert plan(64, device="cuda", dtype=torch.bfloat16, width=256).path == "triton"
    for dtype, width in ((torch.float32, 256), (torch.bfloat16, 257)):
        assert "wider" in plan(64, device="cuda", dtype=dtype, width=width).why
    assert plan(64, device="cuda", dtype=torch.float64).path == plan(64).path == "chunked"
