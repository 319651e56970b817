"""What a run was made from, so that a checkpoint is never carried on with another recipe, model, text or base."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from dovetail.data.tokenizer import fingerprint
from dovetail.errors import SpecError
from dovetail.hub import files
from dovetail.hub.load import NATIVE, read_config
from dovetail.hub.remote import resolve
from dovetail.spec import Spec, diff
from dovetail.training.recipe import Recipe, Train
from dovetail.training.setup import Parts

_READ = {*files.CONFIGS, *files.ADAPTER_CONFIGS, files.INDEX}
_PIECES, _PIECE = 256, 2**14  # of a file that is sampled, and their bytes
_CALLED = {
    "data.train": "the text of data.train",
    "data.held_out": "the text of data.held_out",
    "tokenizer": "the tokenizer",
}


def made_from(parts: Parts) -> dict[str, Any]:
    """What decides a run besides its recipe: the model's spec, and hashes of what it reads and never writes, by what
    they are called (of a model that is trained itself the checkpoint has the weights)."""
    recipe: Any = parts.recipe
    folders = {f"adapters.{name}": folder for name, folder in recipe.adapters.items()}
    folders |= {f"objective.{role}": folder for role, folder in recipe.objective.helpers().items()}
    if recipe.adapter is not None and isinstance(recipe.model, str):
        folders["model"] = recipe.model
    hashes: dict[str, str | None] = {name: weights_hash(folder) for name, folder in folders.items()}
    for name, tokens in (("data.train", parts.train), ("data.held_out", parts.held_out)):
        hashes[name] = None if tokens is None else tokens.meta["text_sha256"]
    hashes["tokenizer"] = None if parts.tokenizer is None else fingerprint(parts.tokenizer)
    return {"spec": parts.model.spec.to_dict(), "hashes": hashes}


def weights_hash(folder: str) -> str:
    """SHA-256 of the configuration of a model's or an adapter's folder, and of samples of its weights (see `_sample`)."""
    root, digest = resolve(folder), hashlib.sha256()
    for path in sorted(
        (*root.glob("*"), *root.glob("[0-9]_*/*"))
    ):  # sentence encoders keep their model a folder deeper
        if path.suffix == ".safetensors" or path.name in _READ:
            digest.update(f"{path.relative_to(root).as_posix()} {_sample(path)}\n".encode())
    return digest.hexdigest()


def _sample(path: Path) -> str:
    """SHA-256 of a file's length and of 256 pieces of 16 KB evenly through it, the whole of a smaller one: training changes
    weights everywhere, and reading all of a large model takes minutes at every start."""
    size, digest = path.stat().st_size, hashlib.sha256()
    whole = size <= _PIECES * _PIECE
    with path.open("rb") as file:
        for piece in range(1 if whole else _PIECES):
            file.seek(piece * (size - _PIECE) // (_PIECES - 1))
            digest.update(file.read(size if whole else _PIECE))
    return f"{size} {digest.hexdigest()}"


def fixed(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what may change between the runs of one training."""
    data = recipe.to_dict()
    data.pop("out")
    data["data"].pop("cache")
    data["train"] = {name: value for name, value in data["train"].items() if name not in Train.free}
    return data


def check_same(state: dict[str, Any], recipe: Recipe, made: dict[str, Any], folder: Path) -> None:
    """Raises SpecError for a checkpoint of another recipe, or one made from something else; it names the first
    difference. state: of the checkpoint in `folder`; made: `made_from` of the run that is to go on."""
    before = _spec(state, folder)
    _same_recipe(state["recipe"], fixed(recipe), str(folder), whole=before is None)
    if before is not None:
        for path, old, new in diff(before, Spec.parse("model", made["spec"])):
            raise _differs(f"model.{path}" if path else "model", old, new, str(folder))
    # A checkpoint from before hashes were kept has none.
    for name, old in state.get("made_from", {}).get("hashes", {}).items():
        if made["hashes"].get(name) != old:
            raise SpecError(
                f"{_CALLED.get(name, f'the weights of {name}')} changed since the checkpoint was written",
                where=str(folder),
                remedy="put back what it was, or start anew in another out",
            )


def _spec(state: dict[str, Any], folder: Path) -> Spec | None:
    """The spec of the model that was trained; None where a checkpoint of an adapter does not say it."""
    if "made_from" in state:
        return Spec.parse("model", state["made_from"]["spec"], where=str(folder / "state.json"))
    return read_config(folder)[0] if (folder / NATIVE).exists() else None


def _same_recipe(saved: dict[str, Any], given: dict[str, Any], where: str, whole: bool) -> None:
    """whole: a new model's spec is compared as the recipe has it."""

    def flat(data: Any, path: str = "") -> dict[str, Any]:
        if not isinstance(data, dict) or (path == "model" and not whole):
            return {path: "a new model" if isinstance(data, dict) else data}
        return {k: v for name, value in data.items() for k, v in flat(value, f"{path}.{name}".lstrip(".")).items()}

    a, b = flat(saved), flat(given)
    for path in dict.fromkeys([*a, *b]):
        # An option that did not exist when the run began was off in it.
        both = path in a and path in b
        if a[path] != b[path] if both else a.get(path) or b.get(path):
            raise _differs(path, a.get(path), b.get(path), where)


def _differs(path: str, old: Any, new: Any, where: str) -> SpecError:
    return SpecError(
        f"{path} was {old!r} in the run to resume and is {new!r} now",
        where=where,
        remedy="resume with the same recipe, or start anew in another out",
    )
