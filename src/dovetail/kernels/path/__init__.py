"""The path of dp/dτ = W₂ relu(W₁ p + u₁(τ)) + u₂(τ), by Kutta's 3/8 rule of order four with fixed steps.

One operation with a backward of its own: autograd would add up a whole matrix of gradients at every evaluation of the
right-hand side (35 times slower at width 512), where one product at the end does; and a compiler sees one operation,
not all its steps. The gradient is that of what is computed, not of the equation's adjoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dovetail.kernels.operation import operation


def follow(start: Tensor, w1: Tensor, u1: Tensor, w2: Tensor, u2: Tensor, step: float) -> Tensor:
    """p before, between and after N steps of length `step`, (N+1,C), from p = start (C,).

    w1 (H,C), w2 (C,H); u1 (3N+1,H), u2 (3N+1,C): their values at every third of a step.
    """
    return _follow(start, w1, u1, w2, u2, step)[0]


@operation("path")
def _follow(
    start: Tensor, w1: Tensor, u1: Tensor, w2: Tensor, u2: Tensor, step: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The path, and of each of the 4N evaluations what it read (4N,C) and what relu gave (4N,H)."""
    path, read, between = (t.new_empty(shape) for t, shape in zip((start, start, start), _shapes(w1, u1), strict=True))
    path[0] = p = start
    for n in range(path.shape[0] - 1):

        def h(stage: int, at: Tensor, n: int = n) -> Tensor:
            read[4 * n + stage] = at
            between[4 * n + stage] = inner = torch.addmv(u1[3 * n + stage], w1, at).relu()
            return torch.addmv(u2[3 * n + stage], w2, inner)

        a = h(0, p)
        b = h(1, p + step / 3 * a)
        c = h(2, p + step * (b - a / 3))
        d = h(3, p + step * (a - b + c))
        path[n + 1] = p = p + step / 8 * (a + 3 * (b + c) + d)
    return path, read, between


@operation("path_backward")
def _backward(
    grad: Tensor, w1: Tensor, w2: Tensor, read: Tensor, between: Tensor, step: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of start, w1, u1, w2 and u2."""
    inner, outer = torch.empty_like(between), torch.empty_like(read)  # of what relu read, and of the evaluations
    live = (between > 0).to(grad.dtype)
    g = grad[-1].clone()
    for n in range(grad.shape[0] - 2, -1, -1):

        def back(stage: int, given: Tensor, n: int = n) -> Tensor:
            outer[4 * n + stage] = given
            inner[4 * n + stage] = through = torch.mv(w2.t(), given) * live[4 * n + stage]
            return torch.mv(w1.t(), through)

        end = step / 8 * g
        d = back(3, end)
        c = back(2, 3 * end + step * d)
        b = back(1, 3 * end + step * (c - d))
        a = back(0, end + step * (d + (b - c) / 3))
        g = g + a + b + c + d + grad[n]
    return g, inner.t() @ read, _by_time(inner), outer.t() @ between, _by_time(outer)


def _by_time(grads: Tensor) -> Tensor:
    """Of evaluations (4N,D) to times (3N+1,D): the last of a step is made when the first of the next is."""
    stages = grads.view(grads.shape[0] // 4, 4, grads.shape[1])
    found = grads.new_zeros(3 * stages.shape[0] + 1, grads.shape[1])
    found[:-1] = stages[:, :3].flatten(0, 1)
    found[3::3] += stages[:, 3]
    return found


def _shapes(w1: Tensor, u1: Tensor) -> tuple[tuple[int, int], ...]:
    steps = (u1.shape[0] - 1) // 3
    return (steps + 1, w1.shape[1]), (4 * steps, w1.shape[1]), (4 * steps, w1.shape[0])


@_follow.register_fake
def _(start: Tensor, w1: Tensor, u1: Tensor, w2: Tensor, u2: Tensor, step: float) -> tuple[Tensor, Tensor, Tensor]:
    path, read, between = (start.new_empty(shape) for shape in _shapes(w1, u1))
    return path, read, between


@_backward.register_fake
def _(
    grad: Tensor, w1: Tensor, w2: Tensor, read: Tensor, between: Tensor, step: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = 3 * (grad.shape[0] - 1) + 1
    return (
        grad.new_empty(grad.shape[1]),
        grad.new_empty(w1.shape),
        grad.new_empty(rows, w1.shape[0]),
        grad.new_empty(w2.shape),
        grad.new_empty(rows, w2.shape[0]),
    )


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    _, w1, _, w2, _, ctx.step = inputs
    ctx.save_for_backward(w1, w2, *output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    w1, w2, read, between = ctx.saved_tensors
    return *_backward(grad, w1, w2, read, between, ctx.step), None


_follow.register_autograd(_differentiate, setup_context=_keep)
for _op in (_follow, _backward):
    for _device in ("cpu", "cuda"):  # else autocast would round each of its products, one after another
        _op.register_autocast(_device, torch.float32)
