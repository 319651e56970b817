"""From a directory (or hub id) to a model: the architecture from its config, every tensor accounted for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dovetail.errors import CheckpointError, ConfigError
from dovetail.hub import files, generation, mixed, sentence
from dovetail.hub.remote import resolve
from dovetail.hub.sentence import Sentence
from dovetail.models import build
from dovetail.models.config import ConfigReader
from dovetail.models.family import FAMILIES, Family, find
from dovetail.models.keymap import Carried
from dovetail.spec import Spec

NATIVE = "dovetail.json"
VERSION = 1
_DEPTHS = (
    "num_hidden_layers num_layers num_decoder_layers n_layer n_layers encoder_layers decoder_layers depth".split()  # noqa: SIM905
)
_DEEPEST = 10_000  # layers, where no tensors are there to tell


@dataclass
class Origin:
    """Where a model came from: what a faithful save needs. folder: None once its tokenizer no longer fits.

    sentence: what a sentence-transformers directory said beside the encoder. decoding: what it says of generating that
    is not applied here (forced tokens, penalties).
    """

    folder: Path | None
    family: str | None
    config: dict[str, Any]
    carried: Carried
    placed: dict[str, str] = field(default_factory=dict)
    sentence: Sentence | None = None
    decoding: dict[str, Any] = field(default_factory=dict)


def read_config(folder: Path, allow_keys: Iterable[str] = ()) -> tuple[Spec, Family | None, dict[str, Any]]:
    """(spec, family, config) of a directory; family None for the native layout. Raises ConfigError, CheckpointError."""
    if (folder / NATIVE).exists():
        data = files.read_json(folder / NATIVE)
        return _native(ConfigReader(data, str(folder / NATIVE), allow_keys)), None, data
    said = sentence.read(folder)
    if said is not None:
        spec, entry, config = (
            read_config(folder / said.base, allow_keys) if said.base else _published(folder, allow_keys)
        )
        return said.onto(spec, str(folder)), entry, config
    return _published(folder, allow_keys)


def _native(reader: ConfigReader) -> Spec:
    reader.only("dovetail", [VERSION], "a later version of Dovetail wrote this, which may mean something else by it")
    said = reader.take("spec", None)
    for part in (said, *(said.get(side) for side in ("encoder", "decoder"))) if isinstance(said, dict) else ():
        _check_depth(part if isinstance(part, dict) else {}, 0, reader.where)  # layers may be one that is shared
    with _as_config(reader.where):
        spec = Spec.parse("model", said, where=reader.where)
    reader.finish()
    return spec


def _published(folder: Path, allow_keys: Iterable[str]) -> tuple[Spec, Family, dict[str, Any]]:
    """`read_config` of a published layout."""
    for file in dict.fromkeys(entry.file for entry in FAMILIES.values()):
        path = folder / file
        if path.exists():
            config = files.read_json(path)
            entry = find(config, str(path))
            reader = ConfigReader(config, str(path), allow_keys, _shapes(folder))
            reader.used.add("model_type")
            _check_depth(config, len(reader.shapes), str(path))
            with _as_config(str(path)):
                spec = entry.read(reader)
                reader.finish()
            return spec, entry, config
    raise CheckpointError("no config.json here", where=str(folder), remedy="give the directory of a model, or a hub id")


def _check_depth(config: dict[str, Any], stored: int, where: str) -> None:
    """Raises ConfigError for more layers than tensors: each has one, so that they need not be built to be refused."""
    most = stored or _DEEPEST
    for key in _DEPTHS:
        value = config.get(key)
        if isinstance(value, int) and value > most:
            raise ConfigError(
                f"{key} asks for {value if value < 10**12 else 'a great many'} layers, and "
                + (f"{stored} tensors are stored" if stored else f"at most {_DEEPEST} are supported"),
                where=where,
                remedy="the config describes another model than the weights",
            )


@contextlib.contextmanager
def _as_config(where: str) -> Iterator[None]:
    """What a value of an odd sort or size brings about, as a ConfigError."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"])
        raise ConfigError(
            f"the config gives {error.title.lower()} a {place} of {str(first['input'])[:40]}: {first['msg'].lower()}",
            where=where,
            remedy="mend the key that says it",
        ) from None
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the config cannot be read ({type(error).__name__}: {str(error)[:200]})",
            where=where,
            remedy="one of its keys holds another sort of value, or a larger one, than any model has",
        ) from error


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    allow_keys: Iterable[str] = (),
    revision: str | None = None,
) -> Any:
    """The model of a directory or hub id, in eval mode.

    dtype: the stored ones unless given. allow_keys: config keys that may be ignored.
    Raises ConfigError for keys that are unknown or contradict, CheckpointError for weights that do not match.
    """
    folder = resolve(path, revision)
    spec, entry, config = read_config(folder, allow_keys)
    said = sentence.read(folder) if entry is not None else None
    kind = None if dtype is None else files.dtype_named(dtype)
    stored, placed = files.read_weights(folder / said.base if said else folder)
    with _as_config(str(folder)):
        model = build(spec, weights=False)
    if entry is None:
        ours, carried = stored, Carried()
    else:
        layout = spec if said is None else sentence.bare(spec)
        ours, carried = entry.keymap(layout, stored, config).load(stored, str(folder))
        ours |= {} if said is None else said.load(folder)
    assign(model, ours, str(folder))
    if kind is not None:
        model.to(kind)
    carried.widened = mixed.let_run(model)
    model.to(device)
    name, decoding = entry.name if entry else None, generation.unapplied(folder, config)
    model.origin = Origin(folder, name, config, carried, placed, said, decoding)
    return model


def assign(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Puts tensors into a meta-device model as they are. Raises CheckpointError for names or shapes that differ."""
    wanted = dict(model.named_parameters())
    missing = sorted(wanted.keys() - tensors.keys())
    left = sorted(tensors.keys() - wanted.keys())
    if missing or left:
        raise CheckpointError(
            f"the weights do not match the model: missing {missing[:4]}, left over {left[:4]}", where=where
        )
    for name, parameter in wanted.items():
        if tensors[name].shape != parameter.shape:
            raise CheckpointError(
                f"{name} is stored as {tuple(tensors[name].shape)}, and the config asks for {tuple(parameter.shape)}",
                where=where,
                remedy="the config describes another model than the weights",
            )
        if not tensors[name].is_floating_point() or tensors[name].element_size() < 2:
            raise CheckpointError(
                f"{name} is stored as {str(tensors[name].dtype).removeprefix('torch.')}, which is not computed in",
                where=where,
                remedy="use an unquantised checkpoint of this model",
            )
    for name, parameter in wanted.items():
        owner, _, leaf = name.rpartition(".")
        fresh = nn.Parameter(tensors[name], requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(owner), leaf, fresh)
    for module in model.modules():  # tables live outside the state dict: make them real too
        module._apply(lambda t: t if t.device.type != "meta" else torch.empty_like(t, device="cpu"), recurse=False)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return files.shapes(folder) if any(folder.glob("*.safetensors")) else {}
