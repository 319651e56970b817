"""JSON Schema of everything that is registered, for editors and for checking recipes."""

from __future__ import annotations

from typing import Any

from dovetail.spec import registry
from dovetail.spec.spec import Ref


def json_schema(category: str = "model") -> dict[str, Any]:
    """The schema of one category; every other category is a definition that it refers to."""
    definitions: dict[str, Any] = {}
    for name in registry.categories():
        options: list[Any] = [{"enum": registry.kinds(name)}, _one("ref", Ref)]
        options += [_one(kind, registry.entry(name, kind).cls) for kind in registry.kinds(name)]
        definitions[name] = {"anyOf": options}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$ref": f"#/$defs/{category}",
        "$defs": definitions,
    }


def _one(kind: str, cls: type[Any]) -> dict[str, Any]:
    schema = cls.model_json_schema()
    schema["properties"] = {"kind": {"const": kind}, **schema.get("properties", {})}
    schema["required"] = ["kind", *schema.get("required", [])]
    return schema
