"""Dovetail: interchangeable parts from which every Transformer-family model is arranged."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dovetail import models, parts
from dovetail.models import build
from dovetail.spec import Part, Ref, Slot, Spec, diff, json_schema, kinds, override, register

if TYPE_CHECKING:
    from dovetail.hub import load, load_tokenizer, save
    from dovetail.report import compare, evaluate, swap
    from dovetail.sampling import generate
    from dovetail.training import fit

registry = kinds
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
}

__all__ = [
    "Part", "Ref", "Slot", "Spec", "build", "compare", "diff", "evaluate", "fit", "generate", "json_schema", "load",
    "load_tokenizer", "models", "override", "parts", "register", "registry", "save", "swap",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'dovetail' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
