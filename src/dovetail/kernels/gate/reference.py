"""The plain twin: the gate of a gated feed-forward, as the formula says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# By the names under which parts/activation.py registers them. None has a parameter: a name is all of a formula.
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


def gated(both: Tensor, activation: str) -> Tensor:
    """act(gate) · up (..., h) of both = gate|up (..., 2h)."""
    gate, up = both.chunk(2, dim=-1)
    return FORMULAS[activation](gate) * up
