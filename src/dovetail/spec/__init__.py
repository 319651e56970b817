"""Specs and the registry: what is chosen, and what there is to choose from."""

from dovetail.spec.paths import diff, get, override, parse_assignment, tree, walk
from dovetail.spec.registry import Entry, entries, entry, entry_of, kinds, register
from dovetail.spec.schema import json_schema
from dovetail.spec.slot import Slot
from dovetail.spec.spec import Part, Ref, Spec

__all__ = [
    "Entry", "Part", "Ref", "Slot", "Spec", "diff", "entries", "entry", "entry_of", "get", "json_schema", "kinds",
    "override", "parse_assignment", "register", "tree", "walk",
]  # fmt: skip
