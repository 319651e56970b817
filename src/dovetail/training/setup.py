"""From a recipe to what a run needs: tokenizer, token sets, model."""

from __future__ import annotations

import hashlib
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dovetail import hub
from dovetail.adapters import adapt, load_adapter
from dovetail.data import Corpus, TokenSet, cache_folder, prepare, train_tokenizer
from dovetail.data.generated import Generated, GeneratedRows, GeneratedSet, write_numbers
from dovetail.data.labelled import Labelled, LabelledSet
from dovetail.data.rows import Rows
from dovetail.data.spans import sentinels
from dovetail.errors import DataError, SpecError
from dovetail.hub.save import companions
from dovetail.models import build
from dovetail.objectives import Objective
from dovetail.objectives.base import check_direction
from dovetail.objectives.masked_lm import MaskedLm
from dovetail.objectives.span_corruption import SpanCorruption
from dovetail.parts.containers import StackModule
from dovetail.spec import Entry, Spec, entry, entry_of
from dovetail.surgery import quantise
from dovetail.training.alone import refuse_ranks
from dovetail.training.device import choose, precision, total_memory
from dovetail.training.fp8 import multiply_in_fp8
from dovetail.training.questions import rows_for
from dovetail.training.recipe import Recipe, TokenizerTraining
from dovetail.training.room import chosen_for

Labels = tuple[LabelledSet, LabelledSet | None]  # to train on and held out


@dataclass(frozen=True)
class Parts:
    """What a recipe is made of once it stands. held_out is None without a held-out corpus, tokenizer where nothing is
    text."""

    recipe: Recipe
    device: torch.device
    tokenizer: hub.Tokenizer
    model: Any
    train: TokenSet | GeneratedSet | LabelledSet
    held_out: TokenSet | GeneratedSet | LabelledSet | None

    def rows(self, tokens: TokenSet | GeneratedSet | LabelledSet) -> Rows:
        """Rows as the objective asks for them: always the same of the held-out text. Raises SpecError, DataError."""
        objective: Any = self.recipe.objective
        seed = 0 if tokens is self.held_out else self.recipe.train.seed
        if isinstance(tokens, LabelledSet):
            return tokens
        if isinstance(tokens, GeneratedSet):
            return _generated(objective, self, tokens, seed)
        return rows_for(objective, self, tokens, seed)


def set_up(recipe: Recipe) -> Parts:
    """Tokenizer, token sets and the model on its device, everything seeded. Raises UserErrors."""
    refuse_ranks()
    device = choose(recipe.train.device)
    seed_all(recipe.train.seed)
    labelled = labelled_sets(recipe)
    tokenizer: Any = load_tokenizer(recipe) if labelled is None else None
    model = make_model(recipe, tokenizer, device, labelled).to(device)
    check_direction(recipe.objective.kind, model)
    again: Any = recipe.train.checkpointing
    if again == "auto":
        rounded = precision(recipe.train.autocast, device)
        again = chosen_for(model, recipe.train, rounded, device, total_memory(device))
    for module in model.modules():
        if isinstance(module, StackModule):
            module.checkpointing = int(again)
    if labelled is not None:
        return _apart(Parts(recipe, device, tokenizer, model, *labelled))
    train = _token_set(recipe, recipe.data.train, tokenizer)
    held_out = None if recipe.data.held_out is None else _token_set(recipe, recipe.data.held_out, tokenizer)
    for tokens in (train, held_out):
        _check_ids(model.spec, tokenizer, tokens)
    return _apart(Parts(recipe, device, tokenizer, model, train, held_out))


def _check_ids(spec: Any, tokenizer: hub.Tokenizer, tokens: Any) -> None:
    """Raises SpecError for ids that the model has no row for; looked for only where the tokenizer has such."""
    vocab = getattr(spec, "vocab", tokenizer.vocab_size)
    if tokenizer.vocab_size > vocab and isinstance(tokens, TokenSet) and int(tokens.tokens.max()) >= vocab:
        raise SpecError(
            f"the text has the id {int(tokens.tokens.max())}, and the model {vocab} ids",
            where="model.vocab", remedy="give the tokenizer that the model was trained with",
        )  # fmt: skip


def _apart(parts: Parts) -> Parts:
    """The same. Raises DataError for a held-out corpus that is the training corpus, or has nothing to score."""
    if parts.held_out is None:
        return parts
    if parts.held_out.meta["text_sha256"] == parts.train.meta["text_sha256"]:
        raise DataError(
            "the held-out text is the text that is trained on: its score would say what was learnt by heart",
            where="data.held_out",
            remedy="give a text that training never sees, or leave it out",
        )
    if not len(parts.rows(parts.held_out)):
        raise DataError("the held-out text gives no row to score", where="data.held_out", remedy="give more text")
    return parts


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (parts of a user's own may draw from it)


def tokenizer_folder(recipe: Recipe) -> Path:
    """Where the recipe's tokenizer is; trained into the cache on first use. Raises SpecError."""
    wanted, corpus = recipe.tokenizer, _corpus(recipe.data.train)
    if isinstance(corpus, Generated) and wanted is None and isinstance(recipe.model, dict):
        folder = cache_folder(recipe.data.cache) / "tokenizers" / f"numbers-{corpus.ids}"
        if not (folder / "tokenizer.json").is_file():
            write_numbers(corpus.ids, folder)
        return folder
    if isinstance(wanted, TokenizerTraining):
        mask = isinstance(recipe.objective, MaskedLm)
        name = hashlib.sha256(f"{corpus.fingerprint()}{wanted.train}{'mask' * mask}".encode()).hexdigest()[:24]
        folder = cache_folder(recipe.data.cache) / "tokenizers" / name
        if not (folder / "tokenizer.json").is_file():
            train_tokenizer(corpus.documents(), wanted.train, folder, mask=mask)
        return folder
    if wanted is not None:
        return Path(wanted)
    if isinstance(recipe.model, str):
        return hub_folder(recipe.model)
    raise SpecError(
        "a new model and no tokenizer", where="tokenizer", remedy="give {train: 4096}, or a directory with a tokenizer"
    )


def load_tokenizer(recipe: Recipe) -> hub.Tokenizer:
    return hub.load_tokenizer(tokenizer_folder(recipe))


def copy_tokenizer(recipe: Recipe, out: Path) -> None:
    """The tokenizer's files into the run's folder, so that its checkpoints are whole; nothing where there is none."""
    if isinstance(recipe.data.train, Labelled):
        return
    source = tokenizer_folder(recipe)
    for name in companions(source) if source.resolve() != out.resolve() else ():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, out / name)


def hub_folder(path: str) -> Path:
    from dovetail.hub.remote import resolve

    return resolve(path)


def model_spec(recipe: Recipe, tokenizer: hub.Tokenizer, labelled: Labels | None = None) -> Spec:
    """The spec of a new model: vocab and context are the tokenizer's and the rows' unless given, features and classes the
    labelled data's. Raises SpecError."""
    assert isinstance(recipe.model, dict)
    data = dict(recipe.model)
    about = entry("model", str(data.get("kind")))
    known = about.cls.model_fields
    _check_reads(about, labelled)
    if labelled is not None:
        data.setdefault("context", recipe.train.length)
        data.setdefault("features", labelled[0].values.shape[-1])
        data.setdefault("classes", labelled[0].classes)
        return Spec.parse("model", data, where="model")
    if "vocab" in known:
        data.setdefault("vocab", tokenizer.vocab_size + _extra_ids(recipe, tokenizer))
    if "context" in known:
        data.setdefault("context", recipe.train.length)
    if "decoder_start" in known:
        data.setdefault(
            "decoder_start", next(iter([i for i in (tokenizer.bos_id, *tokenizer.eos_ids) if i is not None]), None)
        )
    spec = Spec.parse("model", data, where="model")
    check_vocab(spec, tokenizer)
    return spec


def _extra_ids(recipe: Recipe, tokenizer: hub.Tokenizer) -> int:
    """Ids that the objective needs beyond the tokenizer's."""
    objective = recipe.objective
    if not isinstance(objective, SpanCorruption) or sentinels(tokenizer, tokenizer.vocab_size, 1):
        return 0
    return objective.sentinels


def make_model(recipe: Recipe, tokenizer: hub.Tokenizer, device: torch.device, labelled: Labels | None = None) -> Any:
    """A new model from the recipe's spec and seed, or a checkpoint in fp32 (autocast rounds, masters do not).

    What is frozen under an adapter has no masters: it stays in its stored dtype, or in the codes of `storage`.
    """
    if isinstance(recipe.model, dict):
        model = build(model_spec(recipe, tokenizer, labelled), seed=recipe.train.seed)
    else:
        frozen = recipe.adapter is not None and precision(recipe.train.autocast, device) == "bf16"
        model = hub.load(recipe.model, dtype=None if frozen else torch.float32, device=device)
        _check_reads(entry_of(model.spec), labelled)
        if labelled is None:
            check_vocab(model.spec, tokenizer)
    if labelled is not None:
        _check_shape(model.spec, *labelled)
    if recipe.storage is not None:
        quantise(model, recipe.storage)  # type: ignore[arg-type]
    for name, folder in recipe.adapters.items():
        load_adapter(model, folder, name=name)
    if recipe.adapter is not None:
        adapt(model, recipe.adapter, seed=recipe.train.seed)  # type: ignore[arg-type]
    multiply_in_fp8(model, recipe.train.fp8, device)
    return model


def with_helpers(parts: Parts) -> Objective:
    """The recipe's objective with the models that it reads besides (a teacher): frozen, in eval mode and fp32 as the
    learner is, on its device. They are no part of the run's model: not optimised, not saved. Raises UserErrors."""
    objective: Any = parts.recipe.objective
    helpers = {role: _frozen(role, path, parts) for role, path in objective.helpers().items()}
    return objective.prepared(helpers)


def _frozen(role: str, path: str, parts: Parts) -> Any:
    folder = hub_folder(path)
    if (folder / "tokenizer.json").is_file():
        theirs = hub.load_tokenizer(folder).fast.get_vocab(with_added_tokens=True)
        if theirs != parts.tokenizer.fast.get_vocab(with_added_tokens=True):
            raise SpecError(
                f"the {role} reads text by another tokenizer: its ids mean other things",
                where=f"objective.{role}: {folder}",
                remedy=f"choose a {role} that shares the model's vocabulary",
            )
    return hub.load(folder, dtype=torch.float32, device=parts.device).requires_grad_(False).eval()


def check_vocab(spec: Any, tokenizer: hub.Tokenizer) -> None:
    if getattr(spec, "vocab", tokenizer.stored_size) < tokenizer.stored_size:
        raise SpecError(
            f"the tokenizer has {tokenizer.stored_size} ids and the model {spec.vocab}",
            where="model.vocab",
            remedy="leave vocab out, or train a smaller tokenizer",
        )


def labelled_sets(recipe: Recipe) -> Labels | None:
    """Training and held-out examples, where the corpora are labelled; None where they are texts. Raises SpecError."""
    train, held_out = recipe.data.train, recipe.data.held_out
    labelled, asked = isinstance(train, Labelled), entry("objective", str(recipe.objective.kind)).capabilities
    if labelled != bool(asked.get("labelled")) or (held_out is not None and isinstance(held_out, Labelled) != labelled):
        said = "one of data.train and data.held_out is labelled" if labelled == bool(asked.get("labelled")) else (
            f"{recipe.objective.kind} on a corpus {train.kind!r}, which has " + ("labels" if labelled else "no labels")
        )  # fmt: skip
        raise SpecError(said, where="objective", remedy="train on labelled data with the objective classification")
    if not isinstance(train, Labelled):
        return None
    if recipe.tokenizer is not None or recipe.data.pack != "documents":
        idle = "tokenizer" if recipe.tokenizer is not None else "data.pack"
        raise SpecError("it has no effect: labelled data are not text", where=idle, remedy="leave it out")
    sets = train.examples(), held_out.examples() if isinstance(held_out, Labelled) else None
    length = sets[0].values.shape[1]
    if recipe.train.length != length:
        raise SpecError(
            f"rows of {recipe.train.length} are asked for, and those of the data are {length} long",
            where="train.length",
            remedy=f"set it to {length}",
        )
    return sets


def _check_reads(model: Entry, labelled: Labels | None) -> None:
    """Raises SpecError for a model of tokens on data that is numbers, and the other way round."""
    if (model.capabilities.get("reads") == "values") != (labelled is not None):
        raise SpecError(
            f"a model {model.kind!r} reads " + ("tokens, and this data is numbers" if labelled else "no text"),
            where="model",
            remedy="train a sequence_classifier" if labelled else "train it on labelled data: {kind: pixels}",
        )


def _check_shape(spec: Any, train: LabelledSet, held_out: LabelledSet | None) -> None:
    """Raises SpecError for a model that reads or tells apart something else than the data."""
    for data, where in ((train, "data.train"), (held_out, "data.held_out")):
        if data is not None and (data.values.shape[2:], data.classes) != ((spec.features,), spec.classes):
            raise SpecError(
                f"examples of shape {data.values.shape[1:]} in {data.classes} classes, and the model reads "
                f"{spec.features} numbers at a time and tells {spec.classes} classes apart",
                where=where,
                remedy="leave model.features and model.classes out; images become sequences by {kind: pixels}",
            )


def _token_set(recipe: Recipe, spec: Any, tokenizer: hub.Tokenizer) -> TokenSet | GeneratedSet:
    corpus = _corpus(spec)
    if isinstance(corpus, Generated):
        return GeneratedSet.of(corpus, tokenizer)
    return prepare(corpus, tokenizer, recipe.data.cache)


def _generated(objective: Any, parts: Parts, tokens: GeneratedSet, seed: int) -> Rows:
    """Rows whose labels are the corpus's own. Raises SpecError for an objective or a model that asks otherwise."""
    if objective.kind != "next_token" or hasattr(parts.model, "encode"):
        raise SpecError(
            f"the corpus {tokens.corpus.kind!r} says itself what is asked, of a model that reads one text",
            where="objective",
            remedy="train a decoder on it, with the objective next_token",
        )
    return GeneratedRows(tokens.corpus, parts.recipe.train.length, seed)


def _corpus(spec: Any) -> Corpus:
    assert isinstance(spec, Corpus)
    return spec
