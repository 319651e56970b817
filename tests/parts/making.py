"""Builds one part by itself, with real weights."""

from __future__ import annotations

from typing import Any

import torch

from dovetail.parts.init import Normal
from dovetail.parts.weights import initialise
from dovetail.spec import Slot, Spec


def make(category: str, part: Any, *, dtype: torch.dtype = torch.float32, seed: int = 0, **slot: Any) -> Any:
    """The module of a part at a slot (dim 16 unless given), started from `seed`."""
    place = Slot(**({"dim": 16, "init": Normal(std=0.3), "path": "part"} | slot))
    with torch.device("meta"):
        module = place.build(Spec.parse(category, part), "it").to(dtype)
    module.to_empty(device="cpu")
    initialise(module, seed)
    return module
