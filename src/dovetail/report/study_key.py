"""The key of a study's run: what was found under it is not looked for again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dovetail.errors import SpecError
from dovetail.hub.remote import resolve
from dovetail.report.cost import machine, versions
from dovetail.report.lengths import Lengths
from dovetail.report.study_recipe import Arm, Study, model_of
from dovetail.spec import Spec, entry
from dovetail.training.device import choose
from dovetail.training.recipe import Recipe

_FILLED_IN = (
    "vocab",
    "context",
    "features",
    "classes",
    "decoder_start",
)  # by data and tokenizer, where they are not said


def key(asked: Study, arm: Arm, seed: int) -> str:
    """SHA-256 of all that a run depends on: what it does, and the weights, tokenizer and texts that it reads."""
    ask: Any = asked.generate or asked.lengths
    recipe = asked.recipe(arm, seed) if asked.trains else None
    corpora, folders = [], [model_of(asked, arm)]
    if recipe is not None:
        data, objective = recipe.data, recipe.objective
        corpora = [data.train, data.held_out]
        own = [recipe.model] if isinstance(recipe.model, str) else []
        folders = [*own, *recipe.adapters.values(), *objective.helpers().values()]  # type: ignore[attr-defined]
    corpora += [] if ask is None else [ask.text if isinstance(ask, Lengths) else ask.data]
    texts = [corpus.fingerprint() for corpus in corpora if corpus is not None]
    read = [resolve(folder) for folder in folders]
    if recipe is not None and isinstance(recipe.tokenizer, str):
        read.append(Path(recipe.tokenizer))
    did = [model_of(asked, arm), seed] if recipe is None else said(recipe) | {"model": _model(recipe, arm)}
    if isinstance(did, dict):
        did.get("train", {}).pop("keep", None)  # how many checkpoints stay says nothing of the last one
    told = [did, said(ask), said(arm.variants), texts, [_files(f) for f in read], versions()]
    told += [] if asked.clock is None else ["clock", machine(choose(recipe.train.device if recipe else "auto"))]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def said(value: Any) -> Any:
    """Plain data of a spec or a section of a recipe, without the fields that are what they are by default.

    A field that is added later thus changes no key, if by default it does what was done before it; nor does writing a
    default out. What is off where the default is on is kept, and so is a part where another one is the default. A default
    that is changed later is not seen, as no change of code is: it takes another version. Plain mappings (a variant's
    swap) are kept as they are written: what they leave out is decided by the model that they change.
    """
    if isinstance(value, BaseModel):
        own = {name: getattr(value, name) for name in type(value).model_fields}
        fields = type(value).model_fields.items()
        told = {n: said(own[n]) for n, field in fields if own[n] != field.get_default(call_default_factory=True)}
        return {"kind": value.kind} | told if isinstance(value, Spec) else told
    if isinstance(value, Mapping):
        return {name: said(item) for name, item in value.items()}
    return [said(item) for item in value] if isinstance(value, list | tuple) else value


def _model(recipe: Recipe, arm: Arm) -> Any:
    """A checkpoint's directory, or the new model's spec. Raises SpecError naming the arm."""
    if isinstance(recipe.model, str):
        return recipe.model
    try:
        known = entry("model", str(recipe.model.get("kind"))).cls.model_fields
        stand_in = {n: 1 for n in _FILLED_IN if n in known and known[n].is_required() and n not in recipe.model}
        told = said(Spec.parse("model", recipe.model | stand_in, where="model"))
    except SpecError as error:
        raise SpecError(error.what, where=f"arm {arm.name!r}: {error.where}", remedy=error.remedy) from None
    written = {n: recipe.model[n] for n in _FILLED_IN if n in recipe.model}  # a None, too: it is not filled in
    return {n: v for n, v in told.items() if n not in stand_in} | written


def _files(folder: Path) -> list[str]:
    """SHA-256 of each file of weights, configuration and tokenizer in a model's, adapter's or tokenizer's folder."""
    out = []
    for path in sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".json")):
        with path.open("rb") as file:
            out.append(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}")
    return out
