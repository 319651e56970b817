"""The names that configs give to activations, and the parts that they mean."""

from __future__ import annotations

from typing import Any

from dovetail.models.family import cannot_say
from dovetail.parts.activation import Gelu, GeluTanh, Mish, QuickGelu, Relu, Relu6, Sigmoid, Silu, SquaredRelu, Tanh
from dovetail.spec import Spec

ACTIVATIONS: dict[str, Spec] = {
    "silu": Silu(),
    "swish": Silu(),
    "gelu": Gelu(),
    "gelu_new": GeluTanh(),
    "gelu_pytorch_tanh": GeluTanh(),
    "gelu_fast": GeluTanh(),
    "quick_gelu": QuickGelu(),
    "relu": Relu(),
    "relu2": SquaredRelu(),
    "relu6": Relu6(),
    "tanh": Tanh(),
    "sigmoid": Sigmoid(),
    "mish": Mish(),
}


def activation_name(activation: Any, layout: str, written: str | None = None) -> str:
    """The config's name of an activation: the one that was written if it still fits, else the first that does."""
    if written is not None and ACTIVATIONS.get(written) == activation:
        return written
    for name, part in ACTIVATIONS.items():
        if part == activation:
            return name
    raise cannot_say(layout, f"activation {activation.kind!r}", "blocks.*.feedforward.activation")
