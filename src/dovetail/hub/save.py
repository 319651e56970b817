"""From a model to a directory: the layout it came in, byte for byte, or Dovetail's own."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dovetail.errors import CheckpointError, ConfigError
from dovetail.hub import atomic, files, sentence
from dovetail.hub.load import NATIVE, Origin
from dovetail.hub.remote import resolve
from dovetail.hub.tokenizer import load_tokenizer
from dovetail.models.build import build
from dovetail.models.config import ConfigReader
from dovetail.models.family import FAMILIES, Family
from dovetail.models.keymap import Carried
from dovetail.models.resolve import resolved
from dovetail.parts.adaptable import of_adapter
from dovetail.parts.weights import Linear
from dovetail.spec import diff

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "target_vocab.json",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "vocab.spm",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)  # patterns, though most are plain names


def companions(folder: Path) -> list[Path]:
    """The tokenizer's files and their like in `folder`, relative to it."""
    return [path.relative_to(folder) for pattern in COMPANIONS for path in sorted(folder.glob(pattern))]


def save(
    model: Any, path: str | Path, *, format: Literal["hf", "dovetail"] = "hf", tokenizer_from: str | Path | None = None
) -> Path:
    """Writes config, weights and the tokenizer's files atomically; returns the directory.

    format "hf": the layout that the model was loaded from (or the published layout that fits its spec); refused
    with ConfigError where that layout cannot say the spec. "dovetail": the spec itself and our own names; always
    possible. tokenizer_from: directory or hub id whose tokenizer goes along (the one it was loaded from unless given).
    """
    target = Path(path)
    origin: Origin | None = getattr(model, "origin", None)
    ours = {name: parameter.data for name, parameter in model.named_parameters()}
    _refuse_unsayable(model, ours)
    if format == "dovetail":
        said = {name for name, _ in build(model.spec, weights=False).named_parameters()}
        if ours.keys() != said:
            other = sorted(ours.keys() ^ said)
            raise CheckpointError(
                f"the model has other weights than its spec says: {', '.join(other[:3])}",
                remedy="a bias that an adapter brought cannot be said: keep the adapter beside the model",
            )
        config: dict[str, Any] = {"dovetail": 1, "spec": model.spec.to_dict()}
        name, tensors, said = NATIVE, ours, None
    elif format == "hf":
        said = sentence.said_as(model.spec, None if origin is None else origin.sentence)
        spec = layout_spec(model.spec, origin)
        entry = family_of(spec, origin)
        known = origin is not None and origin.family == entry.name
        config = entry.write(spec, origin.config if known and origin else {})
        carried = origin.carried if known and origin else Carried()
        name = entry.file
        own = set() if said is None else {n for n in ours if n.startswith("pooling.")}
        tensors = entry.keymap(spec, carried.dtypes, config).save(
            {n: t for n, t in ours.items() if n not in own}, carried
        )
        config = _with_dtype(config, tensors, carried)
        again = entry.read(
            ConfigReader(config, "the config to be saved", shapes={k: tuple(t.shape) for k, t in tensors.items()})
        )
        again = again if said is None else sentence.bare(again)
        different = _different(_behaviour(spec), _behaviour(again))
        if different:
            raise ConfigError(
                f"the {entry.name} layout would read back as another model: {', '.join(different[:4])} differ",
                where=str(target),
                remedy='save it with format="dovetail", which can say everything',
            )
    else:
        raise ConfigError(f"no format {format!r}", remedy='use "hf" or "dovetail"')
    source = resolve(tokenizer_from, weights=False) if tokenizer_from else origin.folder if origin else None
    if format == "hf" and origin is None and source is not None and (source / "tokenizer.json").exists():
        config |= _special_ids(source)
    with atomic.atomic_folder(target) as scratch:
        if said is not None:
            said.write(scratch, ours)
        at = scratch / (said.base if said else "")
        at.mkdir(parents=True, exist_ok=True)
        files.write_weights(at, tensors, origin.placed if origin else None)
        files.write_json(at / name, config)
        for place in dict.fromkeys(("", said.base if said else "")):
            if source is not None:
                _bring_companions(source / place, scratch / place)
    return target


def _bring_companions(folder: Path, scratch: Path) -> None:
    for companion in companions(folder):
        (scratch / companion).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / companion, scratch / companion)


def _refuse_unsayable(model: Any, tensors: dict[str, Tensor]) -> None:
    """Raises CheckpointError for adapters and quantised weights, which are no weights of any layout."""
    if any(of_adapter(name) for name in tensors):
        raise CheckpointError(
            "adapters stand on this model, and a layout of models has no place for them",
            remedy="save them by themselves (save_adapter), or merge_and_forget them first",
        )
    stored = [path for path, m in model.named_modules() if isinstance(m, Linear) and m.stored is not None]
    if stored:
        raise CheckpointError(
            f"{len(stored)} weights are kept in codes ({stored[0]}), which this layout does not write",
            remedy="save the model that they were made from, and its adapter beside it",
        )


def _with_dtype(config: dict[str, Any], tensors: dict[str, Tensor], carried: Carried) -> dict[str, Any]:
    """The config saying the dtype of most weights, where it says one and the model was cast since it was loaded."""
    now = Counter({t.dtype: 0 for t in tensors.values()})
    for tensor in tensors.values():
        now[tensor.dtype] += tensor.numel()
    unchanged = all(carried.dtypes.get(n) == t.dtype for n, t in tensors.items())
    key = "dtype" if "dtype" in config else "torch_dtype"
    if unchanged or key not in config:
        return config
    return config | {key: str(now.most_common(1)[0][0]).removeprefix("torch.")}


def _special_ids(folder: Path) -> dict[str, Any]:
    """The ids of a tokenizer's special tokens, which a new config would otherwise leave to a layout's defaults."""
    tokenizer = load_tokenizer(folder)
    ends = tokenizer.eos_ids
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "pad_token_id": tokenizer.pad_id,
    }


def layout_spec(spec: Any, origin: Origin | None) -> Any:
    """What a published layout has to say: the spec less the pooling that other files say beside it."""
    said = sentence.said_as(spec, None if origin is None else origin.sentence)
    return spec if said is None else sentence.bare(spec)


def family_of(spec: Any, origin: Origin | None) -> Family:
    if origin is not None and origin.family is not None:
        return FAMILIES[origin.family]
    tried = []
    for entry in FAMILIES.values():
        try:
            entry.write(spec, {})
        except ConfigError as error:
            tried.append(f"{entry.name}: {error.what}")
        else:
            return entry
    raise CheckpointError(
        "no published layout can say this model (" + "; ".join(tried) + ")", remedy='save it with format="dovetail"'
    )


def _behaviour(spec: Any) -> Any:
    """The spec with every size written out, less how it starts."""
    return resolved(spec).replace(init=type(spec).model_fields["init"].default)


def _different(wanted: Any, got: Any) -> list[str]:
    """Paths where two specs differ. A context that was never stated may be read back as the layout's default."""
    unstated = {"context"} if wanted.context is None else set()
    return [path for path, _, _ in diff(wanted, got) if path not in unstated]
