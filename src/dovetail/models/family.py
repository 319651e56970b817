"""A family: how one published layout reads as a spec and is written again. One file a system registers one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from dovetail.errors import ConfigError, did_you_mean
from dovetail.models.config import ConfigReader
from dovetail.models.keymap import KeyMap
from dovetail.models.resolve import resolved
from dovetail.spec import Spec, diff

P = TypeVar("P", bound=Spec)


@dataclass(frozen=True)
class Family:
    """name: the layout's name. model_types: the config's `model_type`s that it reads.

    read: config -> spec (taking every key). write: (spec, the config as it was read) -> the config again;
    raises ConfigError for a spec that this layout cannot say. keymap: (spec, stored names, config) -> KeyMap.
    recognise: tells the layout of a config without model_type by its keys. file: the config's file name.
    """

    name: str
    model_types: tuple[str, ...]
    read: Callable[[ConfigReader], Spec]
    write: Callable[[Spec, dict[str, Any]], dict[str, Any]]
    keymap: Callable[[Spec, Iterable[str], dict[str, Any]], KeyMap]
    recognise: Callable[[dict[str, Any]], bool] = lambda config: False
    file: str = "config.json"


FAMILIES: dict[str, Family] = {}


def family(entry: Family) -> Family:
    """Registers a family under its name."""
    FAMILIES[entry.name] = entry
    return entry


def find(config: dict[str, Any], where: str) -> Family:
    """The family of a config, by model_type, else by its keys. Raises ConfigError naming what is known."""
    model_type = config.get("model_type")
    if model_type is not None:
        for entry in FAMILIES.values():
            if model_type in entry.model_types:
                return entry
        known = [t for entry in FAMILIES.values() for t in entry.model_types]
        raise ConfigError(
            f"model_type {model_type!r} is not supported", where=where, remedy=did_you_mean(str(model_type), known)
        )
    for entry in FAMILIES.values():
        if entry.recognise(config):
            return entry
    says = config.get("architectures")
    raise ConfigError(
        "the config has no model_type, and its keys are not those of a known layout"
        + (f" (architectures: {says})" if says else ""),
        where=where,
        remedy=f'add "model_type": one of {", ".join(sorted(t for e in FAMILIES.values() for t in e.model_types))}',
    )


def cannot_say(layout: str, what: str, where: str) -> ConfigError:
    """The error for a spec that a layout has no words for."""
    return ConfigError(
        f"the {layout} layout cannot say {what}",
        where=where,
        remedy='save it with format="dovetail", which can say everything',
    )


def expect(part: Any, cls: type[P], layout: str, where: str) -> P:
    """`part` if it is a `cls`, the one sort that a layout knows here. Raises ConfigError otherwise."""
    if not isinstance(part, cls):
        raise cannot_say(layout, f"{getattr(part, 'category', 'part')} {getattr(part, 'kind', part)!r}", where)
    return part


def faithful(
    layout: str,
    read: Callable[[ConfigReader], Spec],
    config: dict[str, Any],
    spec: Spec,
    shapes: dict[str, tuple[int, ...]] | None = None,
) -> dict[str, Any]:
    """`config`, if it reads back as `spec` (its init aside). Raises ConfigError naming the first thing lost."""
    again = read(ConfigReader(config, "the config to be saved", shapes=shapes))
    lost = [row for row in diff(resolved(again), resolved(spec)) if row[0].split(".")[0] != "init"]
    if lost:
        path, _, wanted = lost[0]
        raise cannot_say(layout, f"{path} = {wanted}", path)
    return config


def updated(config: dict[str, Any], semantic: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The config as it was read with the keys whose meaning changed; keys that say the default may stay absent."""
    unsaid = {
        key for key, value in semantic.items() if config.get(key) is None and key in defaults and value == defaults[key]
    }
    return config | {key: value for key, value in semantic.items() if key not in unsaid}
