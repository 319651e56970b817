"""The path of FLOATER's dynamics: the operation against the same rule in plain torch, and against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dovetail.kernels.path import _backward, _follow, follow


def plain(start: Tensor, w1: Tensor, u1: Tensor, w2: Tensor, u2: Tensor, step: float) -> Tensor:
    """The Butcher tableau of the 3/8 rule, row by row."""
    rows = [[], [1 / 3], [-1 / 3, 1], [1, -1, 1]]
    path = [start]
    for n in range((len(u1) - 1) // 3):
        slopes: list[Tensor] = []
        for stage, row in enumerate(rows):
            at = path[-1] + step * sum(c * s for c, s in zip(row, slopes, strict=True))
            slopes.append(w2 @ (w1 @ at + u1[3 * n + stage]).relu() + u2[3 * n + stage])
        path.append(path[-1] + step * sum(c * s for c, s in zip((1 / 8, 3 / 8, 3 / 8, 1 / 8), slopes, strict=True)))
    return torch.stack(path)


def given(steps: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    C, H, times = 5, 7, 3 * steps + 1
    shapes = ((C,), (H, C), (times, H), (C, H), (times, C))
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("steps", [0, 1, 9])
def test_the_path_is_the_rule_and_so_are_its_gradients(steps: int) -> None:
    tensors = given(steps)
    ours, theirs = follow(*tensors, 0.3), plain(*tensors, 0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), tensors),
        torch.autograd.grad((theirs * weights).sum(), tensors, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-10, atol=1e-10)


def test_gradcheck_and_narrow_types() -> None:
    assert torch.autograd.gradcheck(lambda *t: follow(*t, 0.1), given(3), fast_mode=True)
    tensors = given(12)
    wide, narrow = follow(*tensors, 0.1), follow(*(t.float() for t in tensors), 0.1)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-4 * float(wide.detach().abs().max()))


def test_autocast_does_not_narrow_it() -> None:
    """4N products on end are no place for bf16: autocast leaves both directions alone, on CPU and CUDA."""
    for wide in (torch.float32, torch.float64):
        tensors = given(4, wide)
        found = []
        for narrow in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                path = follow(*tensors, 0.1)
                found.append([path, *torch.autograd.grad(path.square().sum(), tensors, allow_unused=True)])
        for a, b in zip(*found, strict=True):
            assert (a is b is None) or (a.dtype == b.dtype == wide and torch.equal(a, b))
    for name in ("dovetail::path", "dovetail::path_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCUDA")


def test_both_directions_are_operations() -> None:
    start, w1, u1, w2, u2 = given(2)
    torch.library.opcheck(_follow.op, (start, w1, u1, w2, u2, 0.1))
    path, read, between = (t.detach() for t in _follow(start, w1, u1, w2, u2, 0.1))
    torch.library.opcheck(_backward.op, (torch.ones_like(path), w1.detach(), w2.detach(), read, between, 0.1))


def test_a_long_path_compiles_as_one_operation() -> None:
    """Its steps are not in the graph: compiling 200 takes no longer than compiling one."""
    tensors, graphs = given(200), []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda *t: follow(*t, 0.01), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*tensors), follow(*tensors, 0.01))
    assert graphs[0] < 20
