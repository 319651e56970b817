"""One position for another. Positions hold few weights or none, and the mixers around them keep theirs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dovetail.parts.position.absolute import Learned
from dovetail.parts.position.logn import LogN
from dovetail.parts.position.rerope import NearAndFar
from dovetail.parts.position.rotary import Rope
from dovetail.parts.position.scaling import DynamicScaling
from dovetail.spec import Spec
from dovetail.spec.paths import brief
from dovetail.surgery.maps.base import Mapped, Place, weight_map


@weight_map("position", "learned", "learned", gives=("exact", "approximate"), source="Radford et al. 2018")
def other_length(old: Learned, new: Learned, tensors: Mapping[str, Tensor], place: Place) -> Mapped | None:
    """A table of another length. Shorter: its first rows, exact as far as they reach. Longer: new rows start anew."""
    table = tensors["table.weight"]
    rows, wanted = table.shape[0], place.module.table.num_embeddings
    if old.offset != new.offset:
        return Mapped({}, "reinitialised", f"rows begin at {new.offset} instead of {old.offset}")
    if wanted == rows:
        return None
    if wanted < rows:
        how = f"the first {wanted - new.offset} of {rows - new.offset} positions"
        return Mapped({"table.weight": table[:wanted]}, "exact", how)
    grown = torch.cat([table, table.new_zeros(wanted - rows, table.shape[1])])
    how = f"{rows - new.offset} positions are kept, {wanted - rows} start anew: exact for sequences within the old ones"
    return Mapped({"table.weight": grown}, "approximate", how, drawn={"table.weight": [(rows, wanted)]})


@weight_map("position", "*", "*", gives=("approximate",), source="Su et al. 2021 (RoPE), section 3")
def another(old: Spec, new: Spec, tensors: Mapping[str, Tensor], place: Place) -> Mapped | None:
    """Another position, such as learned -> none beside none -> rope, or a rope with other options. A table is dropped,
    rotations have no weights, the mixer's maps are carried exactly: but the function is another, until it is healed.
    Where both give the same up to some length (a ReRoPE its window, LogN the trained length), that is said.
    """
    weights = {name: p.shape for name, p in place.module.named_parameters()}
    if weights:  # it starts anew or not at all; one of the same kind keeps them, and options change what they do
        names = [n for n in type(new).model_fields if n != "dropout" and old.kind == new.kind]
        changed = any(getattr(old, n) != getattr(new, n) for n in names)
        if not changed or any(weights.get(name) != t.shape for name, t in tensors.items()):
            return None
        return Mapped(dict(tensors), "approximate", f"position {brief(new)} in place of {brief(old)}: no bound")
    alike = same_up_to(old, new, place.context)
    if alike == math.inf:
        return None
    count = sum(t.numel() for t in tensors.values())
    gone = f", whose {count:,} scalars are dropped" if count else ""
    bound = f"exact for sequences of up to {int(alike)} tokens" if alike > 1 else "no bound"
    return Mapped({}, "approximate", f"position {brief(new)} in place of {brief(old)}{gone}: {bound}")


def same_up_to(a: Spec, b: Spec, context: int | None) -> float:
    """Tokens of the longest sequence on which two positions give the same: 0 where none is known, inf where all do.

    context: the length that the model was trained at, which some of them take for their own.
    """
    if a == b:
        return math.inf
    if isinstance(a, LogN) or isinstance(b, LogN):
        (factor, a), (other, b) = (_unscaled(p, context) for p in (a, b))
        apart = math.inf if factor == other else min(_unity(f) for f in (factor, other))
        return min(apart, same_up_to(a, b, context))
    ropes = [p for p in (a, b) if type(p) is Rope or isinstance(p, NearAndFar)]  # other kinds do more than turn
    if len(ropes) < 2 or len({(p.theta, p.layout, p.width) for p in ropes}) > 1:
        return 0
    plain = min(p.alike() if isinstance(p, NearAndFar) else math.inf for p in ropes)
    if ropes[0].scaling == ropes[1].scaling:
        return plain
    return min(plain, *(_untouched(p.scaling, context) for p in ropes))


def _unscaled(position: Any, context: int | None) -> tuple[tuple[int | None, bool] | None, Any]:
    """((trained length, clip) of a LogN or None, the position inside)."""
    if not isinstance(position, LogN):
        return None, position
    return (position.trained or context, position.clip), position.position


def _unity(factor: tuple[int | None, bool] | None) -> float:
    """The tokens up to which LogN's factor is 1."""
    trained, clip = factor or (None, True)
    return math.inf if factor is None else trained or 0 if clip else 0


def _untouched(scaling: Any, context: int | None) -> float:
    """The tokens up to which a scaling leaves RoPE as it is."""
    if scaling is None:
        return math.inf
    return scaling.trained(context) if isinstance(scaling, DynamicScaling) else 0
