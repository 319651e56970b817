"""Which of a model's maps train by products in 8 bits."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

import torch
from torch import nn

from dovetail.errors import SpecError, UserError
from dovetail.kernels.linear.fp8 import MULTIPLE
from dovetail.parts.weights import Linear
from dovetail.training.device import multiplies_fp8


def multiply_in_fp8(model: nn.Module, patterns: Iterable[str], device: torch.device | None = None) -> list[str]:
    """The linear maps whose paths match, "blocks.*" say, multiply in fp8 where gradients are taken (`kernels.linear.fp8`),
    and as ever elsewhere: what is evaluated and saved is the model as it was. Returns their paths. device: where.

    Raises UserError for a device without fp8, SpecError for a pattern that meets no map, and for maps of which fp8 can make
    nothing: widths that are no multiples of 16, weights kept in codes, the head, what its part multiplies by itself.
    """
    patterns = list(patterns)
    if patterns and device is not None and not multiplies_fp8(device):
        raise UserError(
            "this GPU multiplies no fp8", where="train.fp8", remedy="leave it out: Ada, Hopper and later do"
        )
    maps = {path: m for path, m in model.named_modules() if isinstance(m, Linear)}
    chosen: list[str] = []
    for pattern in patterns:
        met = fnmatch.filter(maps, pattern)
        if not met:
            raise SpecError(
                f"{pattern!r} meets no linear map",
                where="train.fp8",
                remedy="write a path: blocks.*, blocks.*.feedforward.*",
            )
        chosen += [path for path in met if path not in chosen]
    for path in chosen:
        if why := _unfit(maps[path]):
            raise SpecError(f"{path} {why}", where="train.fp8", remedy="name the other maps: blocks.*.feedforward.*")
    for path in chosen:
        maps[path].in_fp8 = True
    return chosen


def _unfit(one: Linear) -> str:
    if one.stored is not None:
        return "is kept in codes already"
    if any(role == "head" for role, _ in one.parts):
        return "is the head"
    if one.read_whole:
        return "is no product by itself: its part multiplies by the matrix"
    if one.in_features % MULTIPLE or one.out_features % MULTIPLE:
        return f"is {one.out_features} x {one.in_features}: fp8 wants multiples of {MULTIPLE}"
    return ""
