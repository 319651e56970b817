"""Token embeddings with another scale."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dovetail.parts.embedding import TokenEmbedding
from dovetail.surgery.maps.base import Mapped, Place, weight_map


@weight_map("embedding", "token", "token", gives=("exact",), source="Vaswani et al. 2017, section 3.4")
def rescaled(old: TokenEmbedding, new: TokenEmbedding, tensors: Mapping[str, Tensor], place: Place) -> Mapped | None:
    """The same vectors under another scale: rows times old/new."""
    table = tensors["table.weight"]
    if old.scale == new.scale or not new.scale or table.shape != place.module.table.weight.shape:
        return None
    how = f"rows are multiplied by {old.scale / new.scale:.4g}, beside a scale of {new.scale:.4g}"
    return Mapped({"table.weight": table * (old.scale / new.scale)}, "exact", how)
