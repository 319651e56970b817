"""Adapters on disk: PEFT's layout (adapter_config.json, adapter_model.safetensors), or Dovetail's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dovetail.adapters import many
from dovetail.adapters.base import AdapterSpec, PeftConfig
from dovetail.errors import CheckpointError, ConfigError, UserError
from dovetail.hub import atomic, files
from dovetail.hub.names import pieces
from dovetail.models.build import is_causal
from dovetail.parts.adaptable import ADAPTERS
from dovetail.spec import Spec
from dovetail.spec.registry import entry, kinds

PEFT, NATIVE = files.ADAPTER_CONFIGS
WEIGHTS = "adapter_model.safetensors"


def save_adapter(
    model: Any, path: str | Path, *, name: str | None = None, format: Literal["peft", "dovetail"] = "peft"
) -> Path:
    """Writes one adapter alone, atomically; returns the directory. name: needed only where there are several.

    Raises ConfigError where PEFT's layout cannot say it (format="dovetail" always can), UserError for a wrong name,
    or a folder that holds a model.
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
        file, tensors = PEFT, {spec.peft_prefix + key: t for key, t in spec.peft_state(model, name).items()}
    elif format == "dovetail":
        file, tensors = NATIVE, state(model, name)
        config = {"dovetail": 1, "adapter": spec.to_dict()}
    else:
        raise ConfigError(f"no format {format!r}", remedy='use "peft" or "dovetail"')
    target = Path(path)
    check_room(target)
    with atomic.atomic_folder(target) as scratch:
        plain = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
        files.write_weights(scratch, plain, dict.fromkeys(plain, WEIGHTS))
        files.write_json(scratch / file, config)
    return target


def check_room(target: Path) -> None:
    """Raises UserError for a folder that holds a model, whose weights saving an adapter there would replace."""
    model = [name for name in files.CONFIGS if (target / name).exists()]
    if model:
        raise UserError(
            f"a model stands in this folder ({model[0]}), and an adapter would take its place",
            where=str(target),
            remedy="choose a folder of its own for the adapter",
        )


def load_adapter(model: Any, path: str | Path, *, name: str = "default") -> Any:
    """Puts a saved adapter on the model, active and frozen (`trainable` again by `requires_grad_`); returns the model.

    Raises ConfigError for a config that it does not understand, CheckpointError for missing or left-over tensors.
    """
    folder = Path(path)
    spec, stored = read(folder)
    before, learning = many.active(model), many.trainable(model)
    many.adapt(model, spec, name=name)
    try:
        if (folder / PEFT).exists():
            places, stored = spec.peft_tensors(model, name), _without_base(stored, model, str(folder))
        else:
            places = state(model, name)
        _copy(places, stored, str(folder), model)
    except Exception:
        many.remove(model, name)
        many.use(model, *before)
        for parameter in learning.values():
            parameter.requires_grad_(True)
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
    stored = {key.removeprefix(AdapterSpec.peft_prefix): t for key, t in stored.items()}
    config = PeftConfig(files.read_json(folder / PEFT), str(folder / PEFT), stored)
    wanted = config.take("peft_type", "")
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
    try:
        spec = cls.from_peft(config)
    except (TypeError, ValueError) as error:  # of the spec's own fields among them: a rank of 2.5, a dropout of 3
        raise config.senseless(" ".join(str(error).split())) from None
    config.finish()
    return spec, stored


def state(model: Any, name: str) -> dict[str, Tensor]:
    """Parameters and buffers of one adapter by their own names, the adapter's name left out."""
    mark = f"{ADAPTERS}.{name}."
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {key.replace(mark, f"{ADAPTERS}."): t for key, t in held.items() if mark in key}


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


def _without_base(stored: dict[str, Tensor], model: Any, where: str) -> dict[str, Tensor]:
    """Without the tables and heads that PEFT saves along, which must be those of the model."""
    mark = ".base_layer.weight"
    bases = {key: t for key, t in stored.items() if key.endswith(mark)}
    at = {piece.stored: piece for piece in pieces(model)[0]} if bases else {}
    for key, saved in bases.items():
        piece = at.get(key.replace(mark, ".weight"))
        if piece is not None:
            own = model.get_parameter(piece.ours)[piece.start : piece.stop]
            if own.shape == saved.shape and torch.equal(own.cpu(), saved.to(own.dtype)):
                continue
        raise CheckpointError(
            f"{key} is not the model's own weight", where=where, remedy="load the model that the adapter was trained on"
        )
    return {key: t for key, t in stored.items() if key not in bases}


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
    if not is_causal(model):
        return "FEATURE_EXTRACTION"  # what PEFT calls a model that does not write, with or without a head
    return "SEQ_2_SEQ_LM" if hasattr(model, "encode") else "CAUSAL_LM"
