"""Weight maps from part to part, each with what it preserves.

A map is registered for (category, old kind, new kind). It takes the old part's own tensors and gives the new
part's; "exact" keeps the function, "approximate" keeps what it can, and what it leaves out starts anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dovetail.parts.attention.softmax import Attention
from dovetail.spec import Spec

Exactness = Literal["exact", "approximate", "reinitialised"]


@dataclass(frozen=True)
class Mapped:
    """tensors: new values by the part's own parameter names. approximate: which rows (dim 0) of them are not exact."""

    tensors: dict[str, Tensor]
    exactness: Exactness
    how: str
    approximate: dict[str, list[tuple[int, int]]] = field(default_factory=dict)


WeightMap = Callable[[Any, Any, Mapping[str, Tensor], int], "Mapped | None"]
_MAPS: dict[tuple[str, str, str], WeightMap] = {}


def weight_map(category: str, old: str, new: str) -> Callable[[WeightMap], WeightMap]:
    """Registers `f(old_spec, new_spec, tensors, dim) -> Mapped | None` (None: this pair does not fit after all)."""

    def known(function: WeightMap) -> WeightMap:
        _MAPS[category, old, new] = function
        return function

    return known


def find_map(old: Spec, new: Spec) -> WeightMap | None:
    """The map from one part to another, or None."""
    return _MAPS.get((new.category, old.kind, new.kind))


@weight_map("mixer", "attention", "attention")
def regroup(old: Attention, new: Attention, tensors: Mapping[str, Tensor], dim: int) -> Mapped | None:
    """Other numbers of key/value heads (Ainslie et al. 2023, section 2.1).

    Fewer: each new head is the mean of those it replaces. More: heads are repeated, which is exact. Query heads of
    another number or width share no weights, even where the shapes happen to agree.
    """
    H, G, D, Dv = old.sizes(dim)
    H2, G2, D2, Dv2 = new.sizes(dim)
    if (H, D, Dv) != (H2, D2, Dv2):
        return Mapped({}, "reinitialised", "heads of another number or width")
    if "qkv.weight" not in tensors:
        return None
    if G2 > G and G2 % G == 0:
        how, exactness = f"{G} key/value heads repeated to {G2}", "exact"
    elif G2 < G and G % G2 == 0:
        how, exactness = f"{G} key/value heads mean-pooled to {G2}", "approximate"
    else:
        return None

    def heads(rows: Tensor, width: int) -> Tensor:
        grouped = rows.unflatten(0, (G, width))
        if G2 > G:
            grouped = grouped.repeat_interleave(G2 // G, dim=0)
        else:
            grouped = grouped.float().unflatten(0, (G2, G // G2)).mean(1).to(rows.dtype)
        return grouped.flatten(0, 1)

    out = dict(tensors)
    approximate: dict[str, list[tuple[int, int]]] = {}
    for name in ("qkv.weight", "qkv.bias"):
        if name in tensors:
            q, k, v = tensors[name].split([H * D, G * D, G * Dv])
            out[name] = torch.cat([q, heads(k, D), heads(v, Dv)])
            if exactness == "approximate":
                approximate[name] = [(H * D, out[name].shape[0])]
    return Mapped(out, exactness, how, approximate)  # type: ignore[arg-type]
