"""Dovetail: interchangeable parts from which every Transformer-family model is arranged."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dovetail import models, parts
from dovetail.models import build
from dovetail.spec import Part, Ref, Slot, Spec, diff, json_schema, kinds, override, register

if TYPE_CHECKING:
    from dovetail import adapters
    from dovetail.adapters import adapt, load_adapter, merge, save_adapter
    from dovetail.hub import load, load_tokenizer, save
    from dovetail.report import compare, evaluate, swap
    from dovetail.sampling import generate
    from dovetail.training import fit

__version__ = "0.1.0"

# Loaded on first use, so that `import dovetail` stays quick.
_LATER = {
    "load": "dovetail.hub",
    "load_tokenizer": "dovetail.hub",
    "save": "dovetail.hub",
    "generate": "dovetail.sampling",
    "fit": "dovetail.training",
    "swap": "dovetail.report",
    "compare": "dovetail.report",
    "evaluate": "dovetail.report",
    "adapt": "dovetail.adapters",
    "merge": "dovetail.adapters",
    "save_adapter": "dovetail.adapters",
    "load_adapter": "dovetail.adapters",
}

__all__ = [
    "Part", "Ref", "Slot", "Spec", "adapt", "adapters", "build", "compare", "diff", "evaluate", "fit", "generate",
    "json_schema", "load", "load_adapter", "load_tokenizer", "merge", "models", "override", "parts", "register",
    "registry", "save", "save_adapter", "swap",
]  # fmt: skip


def registry(category: str) -> list[str]:
    """The kinds of a category: mixer, position, adapter, objective, ... Raises SpecError for an unknown category."""
    for room in ("adapters", "data", "objectives"):  # they register theirs when they are first imported
        importlib.import_module(f"dovetail.{room}")
    return kinds(category)


def __getattr__(name: str) -> Any:
    if name == "adapters":
        return importlib.import_module("dovetail.adapters")
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'dovetail' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
