"""One position for another. Positions hold few weights or none, and the mixers around them keep theirs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dovetail.parts.position.absolute import Learned
from dovetail.spec import Spec
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
    """Another kind of position, such as learned -> none beside none -> rope. A table is dropped, rotations have no
    weights, the mixer's maps are carried exactly: but the function is another, with no bound, until it is healed.
    """
    if old.kind == new.kind or any(True for _ in place.module.parameters()):
        return (
            None  # options of one kind change no weights; a position with weights of its own starts anew or not at all
        )
    count = sum(t.numel() for t in tensors.values())
    gone = f", whose {count:,} scalars are dropped" if count else ""
    return Mapped({}, "approximate", f"position {new.kind} in place of {old.kind}{gone}: no bound")
