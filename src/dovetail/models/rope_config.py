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
_INTS = ("original",)


def read_rope(config: ConfigReader, context: int | None, theta: float = 10_000.0, layout: str = "half") -> Rope:
    """The Rope of a config. Raises ConfigError for unknown kinds, unknown keys and contradictions."""
    base = config.float("rope_theta", None)
    scaling = config.take("rope_scaling", None, dict)
    parameters = config.take("rope_parameters", None, dict)
    if parameters is not None and scaling is not None and parameters != scaling:
        raise config.contradiction("rope_scaling and rope_parameters differ")
    data = dict(parameters or scaling or {})
    inner = data.pop("rope_theta", None)
    if inner is not None and base is not None and float(inner) != base:
        raise config.contradiction(f"rope_theta is {base} and {inner}")
    width = float(config.take("partial_rotary_factor", 1.0, (int, float)))
    width = float(data.pop("partial_rotary_factor", width))
    kind, old = data.pop("rope_type", None), data.pop("type", None)
    if kind is not None and old is not None and kind != old:
        raise config.contradiction(f"the rope's type is {kind!r} and {old!r}")
    kind = _ALIASES.get(kind or old or "default", kind or old or "default")
    chosen = base if base is not None else float(inner) if inner is not None else theta
    rope = Rope(theta=chosen, width=width, layout=layout)  # type: ignore[arg-type]
    if kind == "default":
        if set(data) - {"factor", "original_max_position_embeddings"}:
            raise ConfigError(f"a default rope with {sorted(data)}", where=f"{config.where}: rope_scaling")
        return rope
    if kind not in _FIELDS:
        raise ConfigError(
            f"rope type {kind!r} is not supported",
            where=f"{config.where}: rope_scaling",
            remedy=f"supported: {sorted(_FIELDS)}",
        )
    original = data.get("original_max_position_embeddings") or config.take("original_max_position_embeddings", None)
    fields: dict[str, Any] = {"kind": kind}
    factor = data.pop("factor", None)
    if factor is None:
        if not (original and context):
            raise ConfigError("a scaled rope without factor", where=f"{config.where}: rope_scaling")
        factor = context / original
    fields["factor"] = float(factor)
    for name, field in _FIELDS[kind]:
        value = data.pop(name, None)
        value = original if value is None and name == "original_max_position_embeddings" else value
        if value is not None:
            fields[field] = _number(value, field)
    data.pop("original_max_position_embeddings", None)  # linear and dynamic go by max_position_embeddings
    data.pop("finetuned", None)
    if data.pop("llama_4_scaling_beta", 0.0):
        raise ConfigError("llama_4_scaling_beta is not supported", where=f"{config.where}: rope_parameters")
    if data:
        raise ConfigError(f"unknown keys {sorted(data)} of a {kind} rope", where=f"{config.where}: rope_scaling")
    return rope.replace(scaling=Spec.parse("rope_scaling", fields))


def write_rope(rope: Spec, config: dict[str, Any], layout_name: str, context: int | None) -> dict[str, Any]:
    """The keys that say this rope, in the style (4 or 5) that `config` is written in."""
    if type(rope) is not Rope or rope.layout != "half":
        raise cannot_say(layout_name, f"position {rope.kind!r}", "blocks.*.mixer.position")
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
            if value is not None and value != type(scaling).model_fields[field].default:
                data[name] = list(value) if isinstance(value, tuple) else value
        if scaling.kind in ("linear", "dynamic") and scaling.original not in (None, context):
            raise cannot_say(
                layout_name, f"a {scaling.kind} scaling with another original length", "blocks.*.mixer.position"
            )
    if rope.width != 1.0:
        data["partial_rotary_factor"] = rope.width
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


def _number(value: Any, field: str) -> Any:
    if isinstance(value, list):
        return tuple(float(v) for v in value)
    if isinstance(value, bool):
        return value
    return int(value) if field in _INTS else float(value)


def _version(config: dict[str, Any]) -> int:
    text = str(config.get("transformers_version", "4"))
    return int(text.split(".")[0]) if text.split(".")[0].isdigit() else 4
