"""The registry of weight maps: what a map is given, what it gives, and what class of exactness it promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from dovetail.spec import Spec

Exactness = Literal["exact", "approximate", "reinitialised"]
Rows = dict[str, list[tuple[int, int]]]


@dataclass(frozen=True)
class Mapped:
    """What a map gives for one part.

    tensors: new values by the part's own parameter names. exactness: "exact" keeps the function (to the rounding of
    the dtype), "approximate" does not, "reinitialised" carries nothing that still means the same. how: in words.
    approximate: rows (dim 0) that are not exact, which a trivial rival draws anew. drawn: rows that always start anew.
    errors: relative Frobenius errors |new - old| / |old| by weight, where there is one that needs no data.
    """

    tensors: dict[str, Tensor]
    exactness: Exactness
    how: str
    approximate: Rows = field(default_factory=dict)
    drawn: Rows = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where a part goes. dim: the model's width. module: the new module there, built and not yet filled.

    context: the length that the model was trained at, or None. old: the module that stood there.
    """

    dim: int
    module: Any
    context: int | None = None
    old: Any = None


WeightMap = Callable[[Any, Any, Mapping[str, Tensor], Place], "Mapped | None"]
WholeMap = Callable[[Any, Any, Mapping[str, Tensor]], "dict[str, Mapped] | None"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class MapEntry:
    """A registered map: from part to part, the classes that it can give, its source, the function."""

    category: str
    old: str
    new: str
    gives: tuple[Exactness, ...]
    source: str
    function: Any


_MAPS: dict[tuple[str, str, str], MapEntry] = {}
_WHOLE: dict[tuple[str, str, str], MapEntry] = {}


def weight_map(category: str, old: str, new: str, *, gives: tuple[Exactness, ...], source: str) -> Callable[[F], F]:
    """Registers `f(old_spec, new_spec, tensors, place) -> Mapped | None` (None: nothing here needs mapping).

    tensors are the old part's own, by local name. "*" stands for any kind. gives: the classes that it can give.
    """

    def known(function: F) -> F:
        _MAPS[category, old, new] = MapEntry(category, old, new, gives, source, function)
        return function

    return known


def whole_map(category: str, old: str, new: str, *, gives: tuple[Exactness, ...], source: str) -> Callable[[F], F]:
    """Registers a map that needs a part's neighbours: `f(old_model_spec, new_model_spec, tensors) -> {path: Mapped}`.

    tensors are the whole old model's, by full name; the paths are those of the parts (modules) that it settles. It
    comes before the maps of single parts and returns None where it does not apply.
    """

    def known(function: F) -> F:
        _WHOLE[category, old, new] = MapEntry(category, old, new, gives, source, function)
        return function

    return known


def find_map(old: Spec, new: Spec) -> WeightMap | None:
    """The map from one part to another, or None."""
    found = _MAPS.get((new.category, old.kind, new.kind)) or _MAPS.get((new.category, "*", "*"))
    return None if found is None or old.category != new.category else found.function


def whole_maps() -> list[MapEntry]:
    """The maps that look at a whole model, in the order of their registration."""
    return list(_WHOLE.values())


def map_entries() -> list[MapEntry]:
    """Every registered map."""
    return [*_MAPS.values(), *_WHOLE.values()]


def relative_error(old: Tensor, new: Tensor) -> float:
    """|new - old| / |old| by Frobenius norms; it bounds |(new - old) x| by that much of |old| |x|."""
    norm = float(old.double().norm())
    gap = float((new.double() - old.double()).norm())
    return gap / norm if norm else gap


def scaled(tensors: dict[str, Tensor], name: str, by: float) -> None:
    """Multiplies the map `name`, weight and bias, in place: muP and NTK scale what a map gives by its role and inputs."""
    for key in (f"{name}.weight", f"{name}.bias"):
        if by != 1.0 and key in tensors:
            tensors[key] = tensors[key] * by


def fit_bias(tensors: dict[str, Tensor], errors: dict[str, float], name: str, wanted: bool) -> str | None:
    """Gives the map `name` the bias that is wanted: zeros where there was none. What was lost, in words, or None."""
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    if wanted and bias is None:
        tensors[f"{name}.bias"] = weight.new_zeros(weight.shape[0])
    elif bias is not None and not wanted:
        del tensors[f"{name}.bias"]
        whole = torch.cat([weight, bias[:, None]], 1)
        errors[f"{name}.bias"] = relative_error(whole, torch.cat([weight, torch.zeros_like(bias)[:, None]], 1))
        return f"the bias of {name} is dropped"
    return None
