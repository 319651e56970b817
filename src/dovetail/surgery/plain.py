"""What surgery refuses before it begins: models that are more than their parameters, another parametrisation."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from dovetail.errors import SpecError
from dovetail.parts.adaptable import adaptables
from dovetail.parts.weights import Linear


def check_plain(model: Any) -> None:
    """Raises SpecError for a model with adapters, which belong to places of the old arrangement (merged ones too, over
    weights that are kept aside), and for one with weights in codes, which are no parameters."""
    names = dict.fromkeys(name for _, place in adaptables(model) for name in place.attached())
    if names:
        merged = getattr(model, "merged_over", None) is not None
        raise SpecError(
            f"adapters stand on this model ({', '.join(names)}), and surgery carries the model's own weights alone",
            remedy=f"{'unmerge them, then ' if merged else ''}merge_and_forget or remove them first",
        )
    coded = [path for path, m in model.named_modules() if isinstance(m, Linear) and m.stored is not None]
    if coded:
        raise SpecError(
            f"{len(coded)} weights are kept in codes, which surgery does not carry",
            where=coded[0],
            remedy="change the model that they were made from, and quantise the new one afterwards",
        )


def check_same_scales(model: Any, grown: Any, anew: Set[str]) -> None:
    """Raises SpecError for an init scheme under which weights that are not `anew` would give something else (NTK, muP)."""
    there = {path: m for path, m in model.named_modules() if isinstance(m, Linear)}
    for path, new in grown.named_modules():
        old = there.get(path) if isinstance(new, Linear) else None
        if old is not None and f"{path}.weight" not in anew and old.scale(new.in_features) != new.multiplier:
            raise SpecError(
                f"another init scheme multiplies what {path} gives by {new.multiplier:.4g}, where it was "
                f"{old.scale(new.in_features):.4g}: the weights would not mean the same",
                where="init",
                remedy="leave init as it is, which matters to random starts alone",
            )
