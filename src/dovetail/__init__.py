"""Dovetail: interchangeable parts from which every Transformer-family model is arranged."""

from dovetail import models, parts
from dovetail.models import build
from dovetail.spec import Part, Ref, Slot, Spec, diff, json_schema, kinds, override, register

registry = kinds
__version__ = "0.1.0"

__all__ = [
    "Part", "Ref", "Slot", "Spec", "build", "diff", "json_schema", "models", "override", "parts", "register",
    "registry",
]  # fmt: skip
