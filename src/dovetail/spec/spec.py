"""Spec: what is chosen. A frozen, strict tree of parts that builds itself into modules.

A field that holds a part is typed by category, `Annotated[Spec, Part("mixer")]` (aliases in
`categories.py`): it takes a Spec, a mapping with `kind`, or just the kind's name, and it is
validated and serialised through the registry, so that a nested spec keeps all its fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import core_schema
from torch import nn

from dovetail.errors import SpecError, did_you_mean
from dovetail.spec import registry
from dovetail.spec.slot import Slot


class Spec(BaseModel):
    """Base of every part's spec. Subclasses add fields and `build`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)
    category: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    adopts: ClassVar[str | None] = None  # the field that an override at this part's place may fill (rope: scaling)
    keeps: ClassVar[tuple[str, ...]] = ()  # fields that kindred kinds share: an override by another keeps them
    around: ClassVar[str | None] = None  # the field into which an override by this kind puts what stood there

    def hands_on(self, dim: int | None) -> dict[str, Any]:
        """What an override by a kindred kind takes over: `keeps`, in a place of width `dim` (None: unknown)."""
        return {name: getattr(self, name) for name in self.keeps}

    def build(self, slot: Slot) -> nn.Module:
        """The module of this spec for the place that `slot` describes."""
        raise SpecError(f"{type(self).__name__} cannot be built", where=slot.path)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, `kind` first, defaults included: `Spec.parse(category, x.to_dict()) == x`."""
        return {"kind": self.kind, **{name: _plain(getattr(self, name)) for name in type(self).model_fields}}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again. Raises SpecError."""
        return validate(type(self), {name: getattr(self, name) for name in type(self).model_fields} | changes)

    @staticmethod
    def parse(category: str, value: Any, where: str = "") -> Spec:
        """A spec of `category` from a Spec, a mapping with `kind`, or a kind's name.

        Raises SpecError naming the place, the key and the nearest known name.
        """
        if isinstance(value, Spec):
            if value.kind == "ref" or value.category == category:
                return value
            raise SpecError(f"a {value.category} ({value.kind}) stands where a {category} belongs", where=where)
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, dict):
            raise SpecError(
                f"a {category} cannot be {value!r}", where=where, remedy="give a mapping with 'kind', or a kind's name"
            )
        fields = dict(value)
        kind = fields.pop("kind", registry.default_kind(category))
        if not isinstance(kind, str):
            raise SpecError(
                f"a {category} without 'kind'" if kind is None else f"a {category} of kind {kind!r}",
                where=where,
                remedy=f"known: {', '.join(registry.kinds(category))}",
            )
        cls = Ref if kind == "ref" else registry.entry(category, kind).cls
        return validate(cls, fields, where=where)

    def __str__(self) -> str:
        from dovetail.spec.paths import tree

        return tree(self)


@dataclass(frozen=True)
class Part:
    """Annotation of a field that holds a part: `Annotated[Spec, Part("mixer")]`, or `Part["mixer"]`."""

    category: str

    def __class_getitem__(cls, category: str) -> Any:
        return Annotated[Spec, cls(category)]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        def parse(value: Any) -> Spec:
            try:
                return Spec.parse(self.category, value)
            except SpecError as error:
                raise _Nested(error) from None

        return core_schema.no_info_plain_validator_function(
            parse, serialization=core_schema.plain_serializer_function_ser_schema(lambda spec: spec.to_dict())
        )

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        return {"x-part": self.category}  # schema.py makes it a reference


class Ref(Spec):
    """Sharing, said: the module built at `path` stands here too. The owner is built once."""

    kind: ClassVar[str] = "ref"
    path: str

    def build(self, slot: Slot) -> nn.Module:
        return slot.shared(self.path)


class _Nested(ValueError):
    """Carries a SpecError through pydantic, which only lets ValueErrors become its own errors."""

    def __init__(self, error: SpecError):
        super().__init__(str(error))
        self.error = error


def validate(cls: type[Any], fields: dict[str, Any], where: str = "") -> Any:
    """`cls(**fields)` with pydantic's complaints turned into one SpecError for people."""
    try:
        return cls.model_validate({name: _frozen(value) for name, value in fields.items()})
    except ValidationError as failure:
        errors = failure.errors()  # a mistyped key comes first: it also leaves the right one missing
        first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
        place = ".".join(str(p) for p in (*([where] if where else []), *first["loc"]))
        name = getattr(cls, "kind", "") or cls.__name__
        inner = first.get("ctx", {}).get("error")
        if isinstance(inner, _Nested):
            deep = inner.error
            place = f"{place}.{deep.where}" if deep.where else place
            raise SpecError(deep.what, where=place, remedy=deep.remedy) from None
        if first["type"] == "extra_forbidden":
            key = str(first["loc"][-1])
            raise SpecError(
                f"{name} has no field {key!r}", where=place, remedy=did_you_mean(key, cls.model_fields)
            ) from None
        if first["type"] == "missing":
            missing = first["loc"][-1]
            raise SpecError(f"{name} needs {missing!r}", where=place, remedy=f"give {missing}") from None
        got = "" if inner else f" (got {first['input']!r})"
        kinds = [first]
        if _at(fields, first["loc"][:-1]) == first["input"]:  # of several kinds: pydantic's name of one ends the place
            kinds = [e for e in errors if e["loc"][:-1] == first["loc"][:-1]]
            place = place.rpartition(".")[0]
        said = list(dict.fromkeys(e["msg"].removeprefix("Value error, ") for e in kinds))
        message = " or ".join([said[0], *(more.removeprefix("Input should be ") for more in said[1:])])
        raise SpecError(f"{name}: {message}{got}", where=place) from None


def _at(value: Any, place: tuple[int | str, ...]) -> Any:
    """What stands there in dicts and lists, or an ellipsis."""
    for key in place:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return ...
    return value


def _frozen(value: Any) -> Any:
    """Lists, which is all that YAML and JSON have, as the tuples that specs hold."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def part_category(annotation: Any, metadata: Any = ()) -> str | None:
    """The category of a field's annotation (`X`, `X | None`, `tuple[X, ...]`), or None for plain values."""
    for item in metadata:
        if isinstance(item, Part):
            return item.category
    for arg in get_args(annotation):
        if isinstance(arg, Part):
            return arg.category
        found = part_category(arg)
        if found:
            return found
    return None


def field_category(cls: type[Spec], name: str) -> str | None:
    """The category of the part that field `name` of `cls` holds, or None."""
    info = cls.model_fields[name]
    return part_category(info.annotation, info.metadata)


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_dict()
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value
