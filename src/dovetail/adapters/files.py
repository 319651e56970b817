"""Adapters on disk: PEFT's layout (adapter_config.json, adapter_model.safetensors), or Dovetail's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dovetail.adapters import many
from dovetail.adapters.base import AdapterSpec, PeftConfig
from dovetail.errors import CheckpointError, ConfigError, UserError
from dovetail.hub import files
from dovetail.parts.adaptable import ADAPTERS
from dovetail.spec import Spec
from dovetail.spec.registry import entry, kinds

PEFT, NATIVE, WEIGHTS = "adapter_config.json", "adapter.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_adapter(
    model: Any, path: str | Path, *, name: str | None = None, format: Literal["peft", "dovetail"] = "peft"
) -> Path:
    """Writes one adapter alone, atomically; returns the directory. name: needed only where there are several.

    Raises ConfigError where PEFT's layout cannot say it (format="dovetail" always can), UserError for a wrong name.
    """
    name = _one(model, name)
    spec = many.adapters(model)[name]
    if format == "peft":
        if spec.peft_type is None:
            raise ConfigError(f"PEFT's layout has no words for {spec.kind}", remedy='save it with format="dovetail"')
        origin = getattr(model, "origin", None)
        base = None if origin is None or origin.folder is None else str(origin.folder)
        config = {"peft_type": spec.peft_type, "task_type": _task(model), "base_model_name_or_path": base}
        config |= spec.to_peft(model, name) | {"inference_mode": True}
        file, tensors = PEFT, {_PREFIX + key: t for key, t in spec.peft_tensors(model, name).items()}
    elif format == "dovetail":
        file, tensors = NATIVE, state(model, name)
        config = {"dovetail": 1, "adapter": spec.to_dict()}
    else:
        raise ConfigError(f"no format {format!r}", remedy='use "peft" or "dovetail"')
    target = Path(path)
    with files.atomic_folder(target) as scratch:
        plain = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
        files.write_weights(scratch, plain, dict.fromkeys(plain, WEIGHTS))
        files.write_json(scratch / file, config)
    return target


def load_adapter(model: Any, path: str | Path, *, name: str = "default") -> Any:
    """Puts a saved adapter on the model, active and frozen (`trainable` again by `requires_grad_`); returns the model.

    Raises ConfigError for a config that it does not understand, CheckpointError for missing or left-over tensors.
    """
    folder = Path(path)
    spec, stored = read(folder)
    many.adapt(model, spec, name=name)
    try:
        places = spec.peft_tensors(model, name) if (folder / PEFT).exists() else state(model, name)
        _copy(places, stored, str(folder), model)
    except Exception:
        many.remove(model, name)
        raise
    for key, parameter in model.named_parameters():
        if f".{ADAPTERS}.{name}." in f".{key}":
            parameter.requires_grad_(False)
    return model


def read(folder: Path) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """(spec, tensors under their stored names without PEFT's prefix) of a saved adapter."""
    stored, _ = files.read_weights(folder)
    if (folder / NATIVE).exists():
        data = files.read_json(folder / NATIVE)
        return Spec.parse("adapter", data.get("adapter"), where=str(folder / NATIVE)), stored  # type: ignore[return-value]
    if not (folder / PEFT).exists():
        raise CheckpointError(
            f"no {PEFT} or {NATIVE} here", where=str(folder), remedy="give the directory of an adapter"
        )
    stored = {key.removeprefix(_PREFIX): t for key, t in stored.items()}
    config = PeftConfig(files.read_json(folder / PEFT), str(folder / PEFT), stored)
    wanted = config.take("peft_type")
    known: dict[str, list[type[Any]]] = {}
    for kind in kinds("adapter"):
        cls: Any = entry("adapter", kind).cls
        if cls.peft_type is not None:
            known.setdefault(cls.peft_type, []).append(cls)
    if wanted not in known:
        raise ConfigError(
            f"peft_type {wanted!r} is not supported", where=config.where, remedy=f"known: {', '.join(sorted(known))}"
        )
    cls = next((c for c in known[wanted] if c.recognises(config.data)), known[wanted][0])
    spec = cls.from_peft(config)
    config.finish()
    return spec, stored


def state(model: Any, name: str) -> dict[str, Tensor]:
    """The parameters of one adapter by their own names, the adapter's name left out."""
    mark = f"{ADAPTERS}.{name}."
    return {key.replace(mark, f"{ADAPTERS}."): p for key, p in model.named_parameters() if mark in key}


@torch.no_grad()
def _copy(places: dict[str, Tensor], stored: dict[str, Tensor], where: str, model: Any) -> None:
    missing, left = sorted(places.keys() - stored.keys()), sorted(stored.keys() - places.keys())
    if missing or left:
        raise CheckpointError(
            f"the adapter does not fit the model: missing {missing[:3]}, left over {left[:3]}",
            where=where,
            remedy="it was trained on another model, or on other targets than its config says",
        )
    for key, place in places.items():
        if place.shape != stored[key].shape:
            raise CheckpointError(
                f"{key} is {tuple(stored[key].shape)}, and the model has {tuple(place.shape)} there", where=where
            )
        place.copy_(stored[key])


def _one(model: Any, name: str | None) -> str:
    held = many.adapters(model)
    if name is None and len(held) == 1:
        return next(iter(held))
    if name is None or name not in held:
        raise UserError(
            "which adapter?" if name is None else f"no adapter {name!r} on this model",
            remedy=f"there are: {', '.join(held)}" if held else "adapt the model first",
        )
    return name


def _task(model: Any) -> str:
    return "SEQ_2_SEQ_LM" if hasattr(model, "encode") else "CAUSAL_LM"
