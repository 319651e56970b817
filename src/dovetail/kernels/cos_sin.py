"""Cosines and sines that many layers read, taken once by a compiler too."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.kernels.operation import operation

_FEW = 4096  # entries up to which taking them anew costs less than a kernel of their own


def cos_sin(angle: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of angles, in their shape and type.

    Inductor takes what is pointwise anew in every kernel that reads it: all layers, forward and backward. So to a compiler
    these are one operation, as long as there are more than a few and no gradient is asked for.
    """
    if not torch.compiler.is_compiling() or angle.numel() <= _FEW or angle.requires_grad:
        return angle.cos(), angle.sin()
    return _cos_sin(angle)  # type: ignore[no-any-return]


@operation("cos_sin")
def _cos_sin(angle: Tensor) -> tuple[Tensor, Tensor]:
    return angle.cos(), angle.sin()


@_cos_sin.register_fake
def _(angle: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(angle), torch.empty_like(angle)
