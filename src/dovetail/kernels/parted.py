"""Maps that one product makes side by side, apart: a split whose gradient is put together by one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.kernels.counted import device_type
from dovetail.kernels.operation import operation


def parted(x: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """x (..., Σ widths) -> views (..., width) each.

    Inductor makes the gradient of x entry by entry, asking of each which part it is in, and for rotated queries twice: on
    an H200 3.4 times as long as reading and writing it takes. On CUDA it is one operation to a compiler.
    """
    if torch.compiler.is_compiling() and torch.is_grad_enabled() and x.requires_grad and device_type(x) == "cuda":
        return _Parted.apply(x, *x.detach().split(list(widths), -1))  # type: ignore[no-any-return]
    return x.split(list(widths), -1)


class _Parted(torch.autograd.Function):
    """The parts, whose gradients go to x. They are made outside: what torch 2.11 finds made in a function, it keeps, and
    does not make again in a checkpointed block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.view_as(part) for part in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _together(gradients), *(None for _ in gradients)


@operation("together")
def _together(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), -1)


@_together.register_fake
def _(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), -1)
