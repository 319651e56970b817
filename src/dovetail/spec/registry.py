"""The registry: every part is known by (category, kind), with what it can do.

A part registers itself once, beside its definition. Refusals at build time and the shared test
matrix both read the capabilities given here; nobody keeps a list of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from dovetail.errors import SpecError, did_you_mean

if TYPE_CHECKING:
    from dovetail.spec.spec import Spec

T = TypeVar("T", bound="type[Spec]")


@dataclass(frozen=True)
class Entry:
    """What is known of a part: its spec class, its oracle, its source and its capabilities.

    oracle: the independent implementation that the tests compare with ("torch.nn.LayerNorm",
        "transformers.llama", "formula: ..."). A part without one fails the shared matrix.
    source: paper or equation.
    decode: "exact", or "approximate: why".
    """

    category: str
    kind: str
    cls: type[Spec]
    oracle: str
    source: str
    decode: str = "exact"
    capabilities: Mapping[str, Any] = field(default_factory=dict)


_ENTRIES: dict[str, dict[str, Entry]] = {}
_DEFAULTS: dict[str, str] = {}


def register(
    category: str,
    kind: str,
    *,
    oracle: str,
    source: str,
    decode: str = "exact",
    default: bool = False,
    **capabilities: Any,
) -> Callable[[T], T]:
    """Class decorator: makes a Spec known as `kind` in `category`. default: what a mapping without `kind` means.

    Raises SpecError when the pair is taken by another class, or `decode` is neither "exact" nor
    "approximate: why".
    """
    if decode != "exact" and not decode.startswith("approximate: "):
        raise SpecError(f"decode={decode!r} of {category} {kind!r}", remedy="say 'exact' or 'approximate: why'")

    def known(cls: T) -> T:
        taken = _ENTRIES.setdefault(category, {}).get(kind)
        if taken and (taken.cls.__module__, taken.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            raise SpecError(
                f"{category} {kind!r} is registered twice",
                where=f"{taken.cls.__module__} and {cls.__module__}",
                remedy="choose another kind",
            )
        cls.category, cls.kind = category, kind
        if default:
            _DEFAULTS[category] = kind
        _ENTRIES[category][kind] = Entry(category, kind, cls, oracle, source, decode, capabilities)
        return cls

    return known


def categories() -> list[str]:
    """All categories that hold at least one part."""
    return sorted(_ENTRIES)


def kinds(category: str) -> list[str]:
    """The kinds of a category. Raises SpecError for an unknown category."""
    if category not in _ENTRIES:
        raise SpecError(f"no category {category!r}", remedy=did_you_mean(category, _ENTRIES))
    return sorted(_ENTRIES[category])


def default_kind(category: str) -> str | None:
    """The kind that a mapping without `kind` means in this category, or None."""
    return _DEFAULTS.get(category)


def entry(category: str, kind: str) -> Entry:
    """The entry of one part. Raises SpecError naming the nearest kind when there is none."""
    kinds(category)
    if kind not in _ENTRIES[category]:
        elsewhere = [c for c, known in _ENTRIES.items() if kind in known]
        hint = f"{kind!r} is a {elsewhere[0]}" if elsewhere else did_you_mean(kind, _ENTRIES[category])
        raise SpecError(f"no {category} of kind {kind!r}", remedy=hint)
    return _ENTRIES[category][kind]


def entry_of(spec: Spec | type[Spec]) -> Entry:
    """The entry under which a spec (or its class) is registered."""
    return entry(spec.category, spec.kind)


def entries() -> list[Entry]:
    """Every entry, ordered by category and kind."""
    return [_ENTRIES[c][k] for c in sorted(_ENTRIES) for k in sorted(_ENTRIES[c])]
