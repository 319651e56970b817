"""Heads tied to the embedding, and heads of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dovetail.models.decoder import Decoder
from dovetail.parts.embedding import LinearHead, TokenEmbedding
from dovetail.surgery.maps.base import Mapped, relative_error, whole_map

_SOURCE = "Press and Wolf 2017, section 3"


def is_tied(spec: Any) -> bool:
    """Is the head of this decoder its embedding?"""
    return isinstance(spec, Decoder) and getattr(spec.head, "path", None) == "embedding"


@whole_map("head", "ref", "linear", gives=("exact",), source=_SOURCE)
def untied(old: Any, new: Any, tensors: Mapping[str, Tensor]) -> dict[str, Mapped] | None:
    """A head of its own that begins as the embedding's rows: exact, and twice the weights."""
    if not is_tied(old) or not isinstance(new, Decoder) or not isinstance(new.head, LinearHead):
        return None
    if not isinstance(old.embedding, TokenEmbedding) or (old.vocab, old.dim) != (new.vocab, new.dim):
        return None
    init: Any = new.init
    rows = tensors["embedding.table.weight"]
    factor = init.multiplier("head", new.dim, new.vocab)  # of a linear head alone: muP, NTK
    given = {"linear.weight": rows if factor == 1.0 else rows / factor}
    if new.head.bias:
        given["linear.bias"] = rows.new_zeros(rows.shape[0])
    return {"head_part": Mapped(given, "exact", "the embedding's rows as a head of its own")}


@whole_map("head", "linear", "ref", gives=("approximate",), source=_SOURCE)
def tied(old: Any, new: Any, tensors: Mapping[str, Tensor], rows: str = "mean") -> dict[str, Mapped] | None:
    """One table for both. rows: "mean" of the two, or those of the "embedding" or of the "head"."""
    if not isinstance(old, Decoder) or not is_tied(new) or not isinstance(old.head, LinearHead):
        return None
    if not isinstance(old.embedding, TokenEmbedding) or (old.vocab, old.dim) != (new.vocab, new.dim):
        return None
    init: Any = old.init
    table = tensors["embedding.table.weight"]
    head = tensors["head_part.linear.weight"] * init.multiplier("head", old.dim, old.vocab)
    one = {"mean": (table.double() + head.double()).div(2).to(table.dtype), "embedding": table, "head": head}[rows]
    errors = {"table.weight": relative_error(table, one), "head": relative_error(head, one)}
    lost = "" if "head_part.linear.bias" not in tensors else ", the head's bias is lost"
    source = "the mean of embedding and head" if rows == "mean" else f"the rows of the {rows}"
    approximate = {"table.weight": [(0, one.shape[0])]}
    how = f"one table for both, {source}{lost}"
    both = Mapped({"table.weight": one}, "approximate", how, approximate, errors=errors)
    return {"embedding": both, "head_part": Mapped({}, "approximate", how)}
