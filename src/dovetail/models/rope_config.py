"""RoPE as configs say it: `rope_theta` with `rope_scaling` (transformers 4) or `rope_parameters` (5), both ways."""

from __future__ import annotations

from typing import Any

from dovetail.errors import ConfigError
from dovetail.models.config import ConfigReader
from dovetail.models.family import cannot_say
from dovetail.parts.position.rotary import Rope
from dovetail.spec import Spec

# Keys of each kind as (config name, our field).
_FIELDS: dict[str, tuple[tuple[str, str], ...]] = {
    "linear": (),
    "dynamic": (),
    "yarn": (
        ("original_max_position_embeddings", "original"),
        ("beta_fast", "beta_fast"),
        ("beta_slow", "beta_slow"),
        ("attention_factor", "attention_factor"),
        ("mscale", "mscale"),
        ("mscale_all_dim", "mscale_all_dim"),
        ("truncate", "truncate"),
    ),
    "llama3": (
        ("original_max_position_embeddings", "original"),
        ("low_freq_factor", "low_freq_factor"),
        ("high_freq_factor", "high_freq_factor"),
    ),
    "longrope": (
        ("original_max_position_embeddings", "original"),
        ("short_factor", "short_factor"),
        ("long_factor", "long_factor"),
        ("attention_factor", "attention_factor"),
    ),
}
_ALIASES = {"su": "longrope", "default": "default", "mrope": "mrope"}
# What transformers asks for, whether or not it is what we assume.
_REQUIRED = {
    "yarn": ("original",),
    "llama3": ("original", "low_freq_factor", "high_freq_factor"),
    "longrope": ("original", "short_factor", "long_factor"),
}


def read_rope(config: ConfigReader, context: int | None, theta: float = 10_000.0, layout: str = "half") -> Rope:
    """The Rope of a config. Raises ConfigError for unknown kinds, unknown keys and contradictions."""
    base = config.float("rope_theta", None)
    scaling = config.take("rope_scaling", None, dict)
    parameters = config.take("rope_parameters", None, dict)
    if parameters is not None and scaling is not None and parameters != scaling:
        raise config.contradiction("rope_scaling and rope_parameters differ")
    key = "rope_scaling" if parameters is None else "rope_parameters"
    data = ConfigReader(parameters or scaling or {}, f"{config.where}: {key}")
    inner = data.float("rope_theta", None)
    if inner is not None and base is not None and inner != base:
        raise config.contradiction(f"rope_theta is {base} and {inner}")
    for said in (config, data):
        said.only(
            "partial_rotary_factor",
            [1.0],
            "transformers turns whole heads in these models whatever this says, so a model that turns a part is none of them",
        )
    kind, old = data.take("rope_type", None, str), data.take("type", None, str)
    if kind is not None and old is not None and kind != old:
        raise config.contradiction(f"the rope's type is {kind!r} and {old!r}")
    kind = _ALIASES.get(kind or old or "default", kind or old or "default")
    chosen = next(value for value in (base, inner, theta) if value is not None)
    if chosen <= 0:
        raise ConfigError(
            f"config key 'rope_theta' is {chosen}", where=config.where, remedy="it must be more than 0 (10000 is usual)"
        )
    rope = Rope(theta=chosen, layout=layout)  # type: ignore[arg-type]
    if kind == "default":
        data.inert("factor", "original_max_position_embeddings")
        _no_more(data, kind)
        return rope
    if kind not in _FIELDS:
        raise ConfigError(
            f"rope type {kind!r} is not supported", where=data.where, remedy=f"supported: {sorted(_FIELDS)}"
        )
    original = _whole(data) or _whole(config)
    factor = data.float("factor", None)
    if factor is None:
        if original is None or context is None:
            raise ConfigError("a scaled rope without factor", where=data.where)
        factor = context / original
    fields: dict[str, Any] = {"kind": kind, "factor": factor}
    for name, field in _FIELDS[kind]:
        value = original if field == "original" else _value(data, name)
        if value is not None:
            fields[field] = value
    data.inert("finetuned")  # and linear and dynamic go by max_position_embeddings
    data.only("llama_4_scaling_beta", [0.0], "that scaling of queries is not supported")
    _no_more(data, kind)
    return rope.replace(scaling=Spec.parse("rope_scaling", fields, data.where))


def _whole(config: ConfigReader) -> int | None:
    """The trained length, where it is said."""
    found = config.float("original_max_position_embeddings", None)
    if found is not None and (found < 1 or found != int(found)):
        raise ConfigError(
            f"config key 'original_max_position_embeddings' is {found}",
            where=config.where,
            remedy="it must be a whole number of at least 1",
        )
    return None if found is None else int(found)


def _value(data: ConfigReader, name: str) -> Any:
    """A number, a flag, or a number for each frequency."""
    if name == "truncate":
        return data.take(name, None, bool)
    if name not in ("short_factor", "long_factor"):
        return data.float(name, None)
    found = data.take(name, None, list)
    if found is None:
        return None
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in found):
        raise ConfigError(f"config key {name!r} holds something that is not a number", where=data.where)
    return tuple(float(v) for v in found)


def _no_more(data: ConfigReader, kind: str) -> None:
    unknown = sorted(data.data.keys() - data.used)
    if unknown:
        raise ConfigError(f"unknown keys {unknown} of a {kind} rope", where=data.where)


def write_rope(rope: Spec, config: dict[str, Any], layout_name: str, context: int | None) -> dict[str, Any]:
    """The keys that say this rope, in the style (4 or 5) that `config` is written in."""
    if type(rope) is not Rope or rope.layout != "half":
        raise cannot_say(layout_name, f"position {rope.kind!r}", "blocks.*.mixer.position")
    if rope.width != 1.0:  # transformers' rope for these models turns whole heads, whatever a config says
        raise cannot_say(layout_name, f"a rope that turns {rope.width} of a head", "blocks.*.mixer.position.width")
    scaling: Any = rope.scaling
    data: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        if scaling.kind not in _FIELDS:
            raise cannot_say(layout_name, f"rope scaling {scaling.kind!r}", "blocks.*.mixer.position.scaling")
        data = {"rope_type": scaling.kind, "factor": scaling.factor}
        for name, field in _FIELDS[scaling.kind]:
            value = getattr(scaling, field)
            if field == "original":
                value = value or context
            needed = field in _REQUIRED.get(scaling.kind, ())
            if value is not None and (needed or value != type(scaling).model_fields[field].default):
                data[name] = list(value) if isinstance(value, tuple) else value
        if scaling.kind in ("linear", "dynamic") and scaling.original not in (None, context):
            raise cannot_say(
                layout_name, f"a {scaling.kind} scaling with another original length", "blocks.*.mixer.position"
            )
    if "rope_parameters" in config or _version(config) >= 5:
        return {"rope_parameters": {"rope_theta": rope.theta} | data}
    return {"rope_theta": rope.theta, "rope_scaling": None if data == {"rope_type": "default"} else data}


def same_rope(a: dict[str, Any], b: Rope, context: int | None) -> bool:
    """Does the config `a` already say rope `b`?"""
    try:
        said = read_rope(ConfigReader(a), context)
    except ConfigError:
        return False
    return said == b


def _version(config: dict[str, Any]) -> int:
    text = str(config.get("transformers_version", "4"))
    return int(text.split(".")[0]) if text.split(".")[0].isdigit() else 4
