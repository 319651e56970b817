"""Recipes of a comparison: one checkpoint, one text, several arms. Strict: an unknown key names the nearest."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dovetail.errors import SpecError, did_you_mean
from dovetail.objectives.next_token import NextToken
from dovetail.spec.categories import CorpusPart, ObjectivePart, StoragePart
from dovetail.spec.spec import validate
from dovetail.stats.ngram.counts import MOST_ORDER
from dovetail.training.recipe import Section, Train, overridden

Length = int | str  # tokens, or a multiple of the trained context such as "4x"


class Model(Section):
    """path: a checkpoint directory or hub id, with its tokenizer.

    dtype: what is computed in; the stored one unless given, and float32 on a CPU where that is narrower.
    """

    path: str
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    device: str = "auto"


class Data(Section):
    """corpus: what is read. tokens: about so many are scored, in rows spread evenly over the documents."""

    corpus: CorpusPart
    tokens: int = Field(default=32_768, ge=64)


class Heal(Section):
    """A short training after a swap. data: its corpus. train, objective, pack, cache: as in a training recipe (pack and
    cache of its `data`); the seed is the arm's. A distillation without a teacher learns from the model before the swap.
    """

    data: CorpusPart
    train: Train
    objective: ObjectivePart = NextToken()
    pack: Literal["documents", "none"] = "documents"
    cache: str | None = None

    @field_validator("train")
    @classmethod
    def _ours(cls, train: Train) -> Train:
        for name in ("seed", "device"):
            if name in train.model_fields_set:
                raise ValueError(f"{name} of a healing is the comparison's; leave it out")
        return train


class Arm(Section):
    """One way of having the model.

    length: row length that it is scored at. swap: overrides by path. redraw: what the swap's weight map only
    approximates starts anew. fresh: paths of parameters that start anew. truncate: it is shown windows of so many
    tokens instead of whole rows. storage: how the weights of linear maps are then kept, such as nf4. heal: trained after the swap, and measured before and after. rival_of: arms for
    which this is the trivial alternative.
    """

    name: str
    length: Length = "1x"
    swap: dict[str, Any] = {}
    redraw: bool = False
    fresh: tuple[str, ...] = ()
    truncate: Length | None = None
    storage: StoragePart | None = None
    heal: Heal | None = None
    rival_of: tuple[str, ...] = ()

    @field_validator("length", "truncate")
    @classmethod
    def _length(cls, value: Any) -> Any:
        if isinstance(value, str) and not re.fullmatch(r"\d+(\.\d+)?x", value):
            raise ValueError('a length is a number of tokens, or a multiple of the trained context such as "4x"')
        return value


class Speed(Section):
    """new: tokens decoded one by one. rounds: turns that every arm takes; after `seconds` no more than three."""

    new: int = Field(default=32, ge=1)
    rounds: int = Field(default=5, ge=1)
    seconds: float = Field(default=20.0, gt=0, strict=False)


class NGrams(Section):
    """The trivial rival of every language model: interpolated modified Kneser-Ney n-grams of the training text, in the
    same tokens, asked the same questions. order: n."""

    order: int = Field(default=5, ge=1, le=MOST_ORDER)

    @property
    def name(self) -> str:
        """What it is called in a report."""
        return f"{self.order}-gram"


class NGramsOf(NGrams):
    """data: the text that is counted, as near to what the checkpoint was trained on as there is."""

    data: CorpusPart


class Comparison(Section):
    """name: of the report. seeds: of whatever is random (what starts anew, the order of healing's rows).

    ngram: n-grams beside the arms, and how each stands to them. samples: prompts that every arm goes on with. stride:
    step of truncated windows; half of them unless given.
    """

    name: str
    model: Model
    data: Data
    arms: tuple[Arm, ...] = Field(min_length=1)
    ngram: NGramsOf | None = None
    seeds: tuple[int, ...] = Field(default=(0, 1), min_length=1)
    stride: Length | None = None
    speed: Speed = Speed()
    samples: tuple[str, ...] = ()
    sample_tokens: int = Field(default=40, ge=1)
    out: str = "report"

    @model_validator(mode="after")
    def _names(self) -> Comparison:
        names = [arm.name for arm in self.arms]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two arms are called {twice[0]!r}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"a seed stands twice in {list(self.seeds)}")
        by_name = {arm.name: arm for arm in self.arms}
        if self.stride is not None and not any(arm.truncate for arm in self.arms):
            raise ValueError("stride has no effect: no arm is truncated")
        if "sample_tokens" in self.model_fields_set and not self.samples:
            raise ValueError("sample_tokens has no effect: there are no samples")
        if self.ngram is not None and self.ngram.name in names:
            raise ValueError(f"{self.ngram.name!r} is what the n-grams are called, and an arm is called that")
        if self.ngram is not None and self.ngram.data == self.data.corpus:
            raise ValueError("the n-grams would be counted on the text that they are scored on")
        for arm in self.arms:
            if arm.heal is not None and arm.storage is not None:
                raise ValueError(f"{arm.name!r} keeps its weights in codes, which cannot be trained; leave heal out")
            if arm.heal is not None and arm.heal.data == self.data.corpus:
                raise ValueError(f"{arm.name!r} would be healed on the text that it is scored on")
            for other in arm.rival_of:
                if other not in by_name:
                    raise ValueError(
                        f"{arm.name!r} is the rival of {other!r}, which is no arm; {did_you_mean(other, names)}"
                    )
                if other == arm.name:
                    raise ValueError(f"{arm.name!r} is its own rival")
                if by_name[other].length != arm.length:
                    raise ValueError(f"{arm.name!r} and {other!r} are scored at different lengths")
        return self

    @staticmethod
    def load(source: str | Path | dict[str, Any], overrides: Iterable[str] = ()) -> Comparison:
        """From a YAML file or plain data, with `key.key=value` overrides. Raises SpecError for a bad key or value."""
        where = str(source) if isinstance(source, (str, Path)) else "recipe"
        fields = overridden(source, overrides, Comparison.model_fields, "recipes/first.yaml")
        for name, section in (("model", Model), ("data", Data), ("ngram", NGramsOf), ("speed", Speed)):
            if isinstance(fields.get(name), dict):
                fields[name] = validate(section, fields[name], where=f"{where}: {name}")
        if isinstance(fields.get("arms"), list):
            fields["arms"] = tuple(_arm(arm, f"{where}: arms.{i}") for i, arm in enumerate(fields["arms"]))
        return validate(Comparison, fields, where=where)


def read_heal(data: Any, where: str = "heal") -> Heal:
    """Healing from plain data. Raises SpecError."""
    if isinstance(data, Heal):
        return data
    if not isinstance(data, dict):
        raise SpecError(f"heal is {data!r}", where=where, remedy="give {data: {kind: pydoc}, train: {steps: 40}}")
    fields = dict(data)
    if isinstance(fields.get("train"), dict):
        fields["train"] = validate(Train, fields["train"], where=f"{where}.train")
    return validate(Heal, fields, where=where)


def tokens_of(length: Length, context: int | None) -> int:
    """Tokens of a length; multiples are of the trained context. Raises SpecError when that is unknown."""
    if isinstance(length, str) and context is None:
        raise SpecError(f"{length!r} of a model without a trained length", remedy="give the length in tokens")
    tokens = length if isinstance(length, int) else round(float(length[:-1]) * (context or 0))
    if tokens < 2:
        raise SpecError(f"a length of {length!r} is {tokens} tokens", remedy="give at least 2")
    return tokens


def _arm(data: Any, where: str) -> Arm:
    if not isinstance(data, dict):
        raise SpecError(f"an arm is {data!r}", where=where, remedy="give a mapping with 'name'")
    fields = dict(data)
    if fields.get("heal") is not None:
        fields["heal"] = read_heal(fields["heal"], f"{where}.heal")
    return validate(Arm, fields, where=where)
