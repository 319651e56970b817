"""What makes an operation of a kernel: seen whole by compilers and fake tensors, differentiated as it says, and once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dovetail.kernels.operation import operation


@operation("test_scaled")
def scaled(x: Tensor, by: Tensor | None, power: int) -> tuple[Tensor, Tensor]:
    assert type(x) is Tensor, "compilers look in here"
    return x**power * (1 if by is None else by), x.sum()


@operation("test_scaled_backward")
def scaled_backward(up: Tensor, x: Tensor, by: Tensor, power: int) -> Tensor:
    return up * by * power * x ** (power - 1)


@scaled.register_fake
def _(x: Tensor, by: Tensor | None, power: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(())


@scaled_backward.register_fake
def _(up: Tensor, x: Tensor, by: Tensor, power: int) -> Tensor:
    return torch.empty_like(x)


def keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, by, ctx.power = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, by)


def differentiate(ctx: Any, up: Tensor, of_sum: Tensor | None) -> tuple[Tensor, None, None]:
    assert of_sum is None, "nothing is made for what has no gradient"
    return scaled_backward(up, *ctx.saved_tensors, ctx.power), None, None


scaled.register_autograd(differentiate, setup_context=keep)
X, BY = torch.linspace(-1, 2, 6).reshape(2, 3), torch.tensor(0.5)


def step(x: Tensor) -> Tensor:
    out, total = scaled(x.sin(), BY, 3)
    return out.cos() + total


def test_outputs_and_gradients_compiled_or_not() -> None:
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for run in (step, compiled):
        x, wide = X.clone().requires_grad_(), X.double().requires_grad_()
        out, plain = run(x), (wide.sin() ** 3 * 0.5).cos() + wide.detach().sin().sum()
        torch.testing.assert_close(out.double(), plain)
        (ours,), (theirs,) = torch.autograd.grad(out.sum(), x), torch.autograd.grad(plain.sum(), wide)
        torch.testing.assert_close(ours.double(), theirs)
        assert not run(X).requires_grad
        with torch.no_grad():
            assert not run(x).requires_grad
    for args in ((X, None, 2), (X.clone().requires_grad_(), BY, 3)):
        torch.library.opcheck(scaled.op, args)


def test_fake_tensors_reach_shapes_alone() -> None:
    given = X.clone().requires_grad_()
    with FakeTensorMode() as mode:
        x = mode.from_tensor(given)
        out, total = scaled(x, None, 2)
        assert out.shape == X.shape and total.shape == () and out.requires_grad
    assert scaled(X.to("meta"), None, 2)[0].is_meta


def test_what_has_no_rule_refuses_a_gradient() -> None:
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(scaled(x, BY, 3)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"test_scaled_backward.*not differentiable"):
        torch.autograd.grad(first.sum(), x)
    with pytest.raises(AssertionError, match="default"):

        @operation("test_default")
        def _(x: Tensor, power: int = 2) -> Tensor:
            return x**power
