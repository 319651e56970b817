"""JSON Schema of everything that is registered, for editors and for checking recipes."""

from __future__ import annotations

from typing import Any

from dovetail.spec import registry
from dovetail.spec.spec import Ref


def json_schema(category: str = "model") -> dict[str, Any]:
    """The schema of one category; every other category is a definition that it refers to."""
    registry.kinds(category)
    definitions: dict[str, Any] = {}
    for name in registry.categories():
        definitions[name] = _options(name)
        definitions[f"{name}_of_layers"] = _options(name, layers=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$ref": f"#/$defs/{category}",
        "$defs": definitions,
    }


def _options(category: str, layers: bool = False) -> dict[str, Any]:
    """A kind's name, a ref, or the mapping of one kind. layers: mappings that also say which layers they are for."""
    kinds = registry.kinds(category)
    options = [_one("ref", Ref, "", layers)]
    options += [_one(kind, registry.entry(category, kind).cls, category, layers) for kind in kinds]
    return {"anyOf": options if layers else [{"enum": kinds}, *options]}


def _one(kind: str, cls: type[Any], category: str, layers: bool) -> dict[str, Any]:
    schema = _resolved(cls.model_json_schema())
    schema["properties"] = {"kind": {"const": kind}, **schema.get("properties", {})}
    required = schema.get("required", [])
    if not category or registry.default_kind(category) != kind:
        required = ["kind", *required]
    if layers:
        schema["properties"] = {"layers": {"type": "string"}, **schema["properties"]}
        required = ["layers", *required]
    return schema | {"required": required}


def _resolved(schema: Any) -> Any:
    """Marks of parts turned into references: pydantic refuses references to what it did not define itself."""
    if isinstance(schema, list):
        return [_resolved(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "x-part" in schema:
        rest = {k: v for k, v in schema.items() if k != "x-part"}
        return {"$ref": f"#/$defs/{schema['x-part']}"} | rest
    if schema.get("type") == "array" and "x-part" in schema.get("items", {}):
        # A sequence of parts may be one part for all, or a list that says which layers each is for.
        part = schema["items"]["x-part"]
        one, many = {"$ref": f"#/$defs/{part}"}, {"$ref": f"#/$defs/{part}_of_layers"}
        lists = [{"type": "array", "items": one}, {"type": "array", "items": many}]
        rest = {k: v for k, v in schema.items() if k not in ("type", "items")}
        return {"anyOf": [one, *lists]} | rest
    return {key: _resolved(value) for key, value in schema.items()}
