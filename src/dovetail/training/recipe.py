"""Recipes: what a run is, in YAML. Strict: an unknown key is an error that names the nearest."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from dovetail.adapters import AdapterSpec  # and registers the kinds
from dovetail.errors import SpecError, did_you_mean
from dovetail.objectives.next_token import NextToken
from dovetail.spec.categories import AdapterPart, CorpusPart, ObjectivePart, StoragePart
from dovetail.spec.documents import Loader, Twice
from dovetail.spec.ranges import Chance, Positive
from dovetail.spec.spec import validate


class Section(BaseModel):
    """Base of the parts of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Data(Section):
    """train: the corpus. held_out: what evaluation reads; none unless given.

    pack: "documents" fills rows with documents that do not see each other; "none" gives each document rows of
    its own. Prompt-completion pairs stay whole in their row: an over-long one loses the left of its prompt.
    An encoder-decoder takes one pair a row, the prompt as its source, whatever pack says; over-long sides lose their end.
    cache: folder for token sets; DOVETAIL_CACHE or ~/.cache/dovetail unless given.
    """

    train: CorpusPart
    held_out: CorpusPart | None = None
    pack: Literal["documents", "none"] = "documents"
    cache: str | None = None


class TokenizerTraining(Section):
    """A byte-level BPE of `train` ids, trained on the training corpus; with a mask token where the objective hides tokens."""

    train: int = Field(ge=258)


class Train(Section):
    """How it is trained.

    steps: optimiser steps. batch: rows in a micro-batch; accumulate: micro-batches in a step. length: tokens in a row.
    lr: peak rate; 1e-3, or the adapter's tuned one at the model's width, unless given; rates: other ones, by patterns of
    parameters' paths ("*.mixer.log_dt": 1e-3), the first that matches; warmup: steps of linear rise; schedule: its course after that, down to `final` times lr; decay: the
    last share of steps in which "wsd" falls. clip: largest gradient norm (0: none). ema: decay of an averaged copy of
    the weights, which is then what is evaluated and exported (0: none). autocast: "auto" takes bf16 where the device
    computes it faster. save_every, eval_every, log_every: in steps (0: only at the end). keep: checkpoints that stay.
    eval_batches: at most so many held-out batches (0: all). checkpointing: blocks made again in the backward, all of
    them, one in so many, or as few as fit into the device's memory ("auto"; see `preflight`). graph: steps replayed as
    CUDA graphs ("auto": where the device is one), which small models need to keep a GPU busy. fp8: patterns of linear
    maps' paths ("blocks.*") that multiply in 8 bits (`training.fp8`), which pays where it is compiled. plain: every fast path
    off, the kernels' plain twins in fp32 (`kernels.twins`): slow, and what a fast run is to agree with.
    """

    model_config = ConfigDict(allow_inf_nan=False)  # beside a Section's: none of these numbers may be infinite

    steps: int = Field(ge=1)
    batch: int = Field(default=8, ge=1)
    accumulate: int = Field(default=1, ge=1)
    length: int = Field(default=512, ge=2)
    lr: float | None = Field(default=None, gt=0)
    rates: dict[str, Annotated[float, Field(gt=0)]] = {}
    betas: tuple[Chance, Chance] = Field(default=(0.9, 0.95), strict=False)
    eps: Positive = 1e-8
    weight_decay: float = Field(default=0.1, ge=0)
    warmup: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    decay: float = Field(default=0.2, gt=0, le=1)
    final: float = Field(default=0.1, ge=0, le=1)
    clip: float = Field(default=1.0, ge=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    autocast: Literal["auto", "none", "bf16"] = "auto"
    compile: bool = False
    fp8: tuple[str, ...] = Field(default=(), strict=False)
    graph: bool | Literal["auto"] = False
    plain: bool = False
    checkpointing: bool | Annotated[int, Field(ge=2)] | Literal["auto"] = False
    save_every: int = Field(default=0, ge=0)
    eval_every: int = Field(default=0, ge=0)
    eval_batches: int = Field(default=0, ge=0)
    log_every: int = Field(default=10, ge=1)
    keep: int = Field(default=2, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    device: str = "auto"

    # What may differ between the runs of one training: it changes no weight of the steps both share.
    free: ClassVar[tuple[str, ...]] = ("save_every", "eval_every", "eval_batches", "log_every", "keep")


class Recipe(Section):
    """model: a spec (its vocab is the tokenizer's unless given) or a checkpoint directory. tokenizer: a directory
    with tokenizer.json, {train: ids}, or the checkpoint's own. out: the folder that the run writes.

    adapter: what is trained instead of the weights, which stay frozen in their stored dtype (fp32 without autocast);
    `out` then holds the adapter alone. adapters: saved ones that are put on before it, frozen: name -> directory (what
    a fusion is of, or what it learns on top of). storage: how the frozen weights of linear maps are kept (nf4: QLoRA).
    """

    model: dict[str, Any] | str
    data: Data
    tokenizer: TokenizerTraining | str | None = None
    objective: ObjectivePart = NextToken()
    adapter: AdapterPart | None = None
    adapters: dict[str, str] = {}
    storage: StoragePart | None = None
    train: Train
    out: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @staticmethod
    def parse(data: Any, where: str = "recipe") -> Recipe:
        """Raises SpecError naming the key, the place and the nearest known key."""
        if not isinstance(data, dict):
            raise SpecError("a recipe is a mapping", where=where, remedy="see recipes/tiny.yaml")
        data = dict(data)
        for name, section in (("data", Data), ("train", Train), ("tokenizer", TokenizerTraining)):
            if isinstance(data.get(name), dict):
                data[name] = validate(section, data[name], where=name)
        recipe = validate(Recipe, data)
        if recipe.storage is not None and recipe.adapter is None:
            raise SpecError(
                "weights that are kept in codes cannot be trained", where=f"{where}.storage",
                remedy="give an adapter to train instead: adapter: {kind: lora}",
            )  # fmt: skip
        if recipe.train.compile and not getattr(recipe.adapter, "steady", True):
            raise SpecError(
                f"the adapter {recipe.adapter.kind!r} runs other blocks in every step, which compiled code cannot",  # type: ignore[union-attr]
                where=f"{where}.train.compile", remedy="set it to false, or the adapter's drop",
            )  # fmt: skip
        _check_schedule(recipe.train, f"{where}.train")
        if recipe.train.graph:
            _check_graph(recipe, f"{where}.train.graph")
        fast = {
            "compile": recipe.train.compile, "autocast": recipe.train.autocast == "bf16", "graph": bool(recipe.train.graph),
            "fp8": bool(recipe.train.fp8),
        }  # fmt: skip
        if recipe.train.fp8 and recipe.adapter is not None:
            raise SpecError(
                "products in 8 bits are for weights that are trained, and an adapter leaves them frozen",
                where=f"{where}.train.fp8", remedy="leave it out",
            )  # fmt: skip
        if recipe.train.plain and any(fast.values()):
            raise SpecError(
                f"train.plain turns every fast path off, and train.{next(k for k in fast if fast[k])} turns one on",
                where=f"{where}.train", remedy="leave one of them out",
            )  # fmt: skip
        if recipe.adapters and (recipe.adapter is None or "default" in recipe.adapters):
            raise SpecError(
                "saved adapters, and none to train" if recipe.adapter is None else "'default' is the one that is trained",
                where=f"{where}.adapters", remedy="give adapter, and every saved one a name of its own",
            )  # fmt: skip
        return recipe

    @staticmethod
    def load(source: str | Path | dict[str, Any] | Recipe, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
        """From a YAML file or plain data, with `key.key=value` overrides. Raises SpecError."""
        if isinstance(source, Recipe):
            source = source.to_dict()
        where = str(source) if isinstance(source, (str, Path)) else "recipe"
        return Recipe.parse(overridden(source, overrides, Recipe.model_fields, "recipes/tiny.yaml"), where)


def _check_schedule(train: Train, where: str) -> None:
    """Raises SpecError for numbers of a schedule that the chosen one does not read."""
    idle = {"final": train.schedule == "constant", "decay": train.schedule != "wsd"}
    for name, unread in idle.items():
        default = Train.model_fields[name].default
        if unread and getattr(train, name) != default:
            raise SpecError(
                f"it has no effect: a schedule {train.schedule!r} reads no {name}", where=f"{where}.{name}",
                remedy=f"leave it out (at {default}), or choose another schedule",
            )  # fmt: skip


def _check_graph(recipe: Recipe, where: str) -> None:
    """Raises SpecError for what goes another way from step to step, or reads the device's state."""
    adapter: Any = recipe.adapter
    if adapter is not None and (not adapter.steady or type(adapter).after_backward is not AdapterSpec.after_backward):
        raise SpecError(
            f"the adapter {adapter.kind!r} does something else from step to step, and a graph the same",
            where=where, remedy="set it to false",
        )  # fmt: skip
    if recipe.train.checkpointing:
        raise SpecError(
            "blocks that are made again save the state of random numbers, which a graph cannot", where=where,
            remedy="set it or train.checkpointing to false",
        )  # fmt: skip


def read_yaml(path: Path) -> Any:
    """Raises SpecError for a file that is missing or is not YAML."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise SpecError(f"not UTF-8 text: {error}", where=str(path), remedy="convert it to UTF-8") from None
    except Twice as error:
        raise SpecError(
            f"the key {error.key!r} stands twice", where=f"{path}:{error.line}", remedy="leave one of them out"
        ) from None
    except yaml.YAMLError as error:
        raise SpecError(f"not YAML: {error}", where=str(path)) from None


def overridden(
    source: str | Path | dict[str, Any], overrides: Iterable[str], fields: Iterable[str], like: str
) -> dict[str, Any]:
    """The data of a recipe from a YAML file or plain data (left as it is), with `key.key=value` overrides.

    fields: keys that such a recipe has. like: a shipped recipe of this sort. Raises SpecError.
    """
    data = _copy(read_yaml(Path(source)) if isinstance(source, (str, Path)) else source)  # an alias becomes a copy
    if not isinstance(data, dict):
        where = str(source) if isinstance(source, (str, Path)) else "recipe"
        raise SpecError("a recipe is a mapping", where=where, remedy=f"see {like}")
    for text in overrides:
        _assign(data, text, list(fields))
    return data


def _assign(data: dict[str, Any], text: str, fields: list[str]) -> None:
    """Sets `a.b.0.c=value` in nested mappings and lists, making mappings that are not there; the schema then judges
    the names below the first, which is one of `fields`."""
    path, sign, value = text.partition("=")
    steps = path.strip().split(".")
    if not sign or not all(steps):
        raise SpecError(f"{text!r} is not an override", remedy="write key=value, with dots into it: a.b=1, a.0.b=1")
    if steps[0] not in fields:
        raise SpecError(f"a recipe has no {steps[0]!r}", where=text, remedy=did_you_mean(steps[0], fields))
    here: Any = data
    for step in steps[:-1]:
        if isinstance(here, dict) and not isinstance(here.get(step), (dict, list)) and here.get(step) is None:
            here[step] = {}
        here = here.get(step) if isinstance(here, dict) else _item(here, step, text)
        if not isinstance(here, (dict, list)):
            raise SpecError(f"{step!r} holds {here!r}, which has no {steps[-1]!r}", where=text)
    try:
        parsed = yaml.load(value, Loader)
    except yaml.YAMLError as error:
        raise SpecError(f"the value is not YAML: {error}", where=text) from None
    if isinstance(here, list):
        _item(here, steps[-1], text)
        here[int(steps[-1])] = parsed
    else:
        here[steps[-1]] = parsed


def _item(items: Any, step: str, text: str) -> Any:
    try:
        return items[int(step)]
    except (ValueError, IndexError, TypeError):
        raise SpecError(f"{step!r} matches none of {len(items)} entries", where=text) from None


def _copy(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _copy(v) for k, v in data.items()}
    return [_copy(v) for v in data] if isinstance(data, (list, tuple)) else data
