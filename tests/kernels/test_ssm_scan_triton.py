"""The scan's Triton kernels against the plain twin in fp64: on the device where there is one, else interpreted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.kernels.ssm_scan import plan, reference, selective_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    # B, T, D, N, packed, segments
    (2, 11, 35, 3, True, 1),
    (1, 40, 3, 16, False, 2),
    (1, 70, 2, 5, True, 3),
]


def given(B: int, T: int, D: int, N: int, device: str) -> list[Tensor]:
    """x, dt (a tenth of it padding), a, b, c and start."""
    make = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    dt = F.softplus(make(B, T, D)).masked_fill(torch.rand(B, T, 1, device=device) < 0.1, 0.0)
    return [make(B, T, D), dt, -3 * torch.rand(D, N, device=device), make(B, T, N), make(B, T, N), make(B, D, N)]


def same(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], tolerance: float) -> None:
    """Equal within `tolerance` of the largest entry."""
    if theirs[0] is not None and theirs[0].is_cuda:
        tolerance *= 5  # exponentials are approximate there
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert (one is None) == (other is None), i
        if one is not None and other is not None:
            error = (one.double() - other).abs().max() / other.abs().max()
            assert error < tolerance, (i, error)


def compare(
    run: Callable[..., tuple[Tensor, Tensor]],
    narrow: list[Tensor],
    first: Tensor | None,
    tolerance: float,
    each: bool = False,
) -> None:
    """Outputs, and gradients by both of them together, and by `each` alone."""
    wide = [t.double().requires_grad_() for t in narrow]
    narrow = [t.clone().requires_grad_() for t in narrow]
    ours, theirs = run(*narrow, first), reference.selective_scan(*wide, first)
    same(ours, theirs, tolerance)
    ups = [torch.randn_like(t) for t in ours]
    for use in ([0, 1], [0], [1]) if each else ([0, 1],):
        outs, up = [[o[i] for i in use] for o in (ours, theirs)], [ups[i] for i in use]
        grads = torch.autograd.grad(outs[0], narrow, up, retain_graph=True)
        assert [g.dtype for g in grads] == [t.dtype for t in narrow]
        twin = torch.autograd.grad(
            outs[1], wide, [u.double() for u in up], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for one, other in zip(grads, twin, strict=True):
            if other.any():
                same([one], [other], tolerance)
            else:
                assert not one.any()


@pytest.fixture()
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """With short chunks, so that short rows have many, and segments."""
    pytest.importorskip("triton")
    from dovetail.kernels.ssm_scan import triton

    monkeypatch.setattr(triton, "CHUNK", 8)
    return triton


@pytest.mark.parametrize(("B", "T", "D", "N", "packed", "segments"), CASES)
def test_equals_the_twin(kernels: Any, B: int, T: int, D: int, N: int, packed: bool, segments: int) -> None:
    inputs = given(B, T, D, N, DEVICE)
    first = torch.rand(B, T, device=DEVICE) < 0.05 if packed else None
    assert kernels._segments(B, T, 1)[0] == segments
    compare(kernels.selective_scan, inputs, first, 5e-6, each=segments == 1)
    with torch.no_grad():
        theirs = reference.selective_scan(*(t.double() for t in inputs), first)
        same(kernels.selective_scan(*inputs, first), theirs, 5e-6)


def test_narrow_inputs(kernels: Any) -> None:
    x, *rest = given(1, 10, 5, 4, DEVICE)
    compare(kernels.selective_scan, [x.bfloat16(), *rest], None, 1e-2)


def test_states_that_forget_at_once(kernels: Any) -> None:
    """The product of a chunk's decays is far below the least number."""
    dt, a = torch.full((1, 40, 2), 30.0, device=DEVICE), -torch.arange(1.0, 4, device=DEVICE).expand(2, 3)
    x, _, _, b, c, start = given(1, 40, 2, 3, DEVICE)
    compare(kernels.selective_scan, [x, dt, a, b, c, start], None, 5e-6)


def test_the_operator_as_torch_sees_it(kernels: Any) -> None:
    """Its own check of it, and whole in a compiled graph."""
    inputs = [t.requires_grad_() for t in given(1, 20, 3, 4, DEVICE)]
    first = torch.rand(1, 20, device=DEVICE) < 0.1
    torch.library.opcheck(
        torch.ops.dovetail.selective_scan, (*inputs, first, True), test_utils=("test_schema", "test_faketensor")
    )
    compiled = torch.compile(lambda *t: kernels.selective_scan(*t, first), fullgraph=True, backend="aot_eager")
    eager = kernels.selective_scan(*inputs, first)
    grads = [torch.autograd.grad([t.sin().sum() for t in out], inputs) for out in (compiled(*inputs), eager)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_long_row_on_the_device() -> None:
    compare(selective_scan, given(1, 1000, 40, 16, "cuda"), torch.rand(1, 1000, device="cuda") < 0.01, 2e-5)


def test_plan_says_which_and_why() -> None:
    pytest.importorskip("triton")
    assert plan(1, 16, device="cuda").path == "step"
    assert plan(64, 16, device="cuda").path == "triton"
    for one in (plan(64, 16), plan(64, 16, device="cuda", dtype=torch.float64), plan(64, 128, device="cuda")):
        assert one.path == "chunked"
    assert "fp64" in plan(64, 16, device="cuda", dtype=torch.float64).why


def test_rows_are_cut_where_they_are_few() -> None:
    pytest.importorskip("triton")
    from dovetail.kernels.ssm_scan.triton import CHUNK, FILL, _segments

    for rows, T in ((1, 131072), (2, 32768), (8, 8192), (32, 2048), (3, 1000), (1, 1)):
        count, length = _segments(rows, T, 64)
        assert length % CHUNK == 0 and (count - 1) * length < T <= count * length
        assert rows * 64 * count >= FILL or length <= 4 * CHUNK
    assert _segments(32, 2048, 64)[0] == 1
