"""Recipes of studies: one base recipe, several ways of training, what each is asked. Strict."""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from dovetail.data import Pairs
from dovetail.errors import SpecError, did_you_mean
from dovetail.objectives.classification import Classification
from dovetail.objectives.next_token import NextToken
from dovetail.report import clock as clocks
from dovetail.report.clock import Clock
from dovetail.report.lengths import Lengths, Variant
from dovetail.report.recipe import NGrams
from dovetail.sampling import Sampling
from dovetail.spec.categories import CorpusPart
from dovetail.spec.spec import validate
from dovetail.training.recipe import Recipe, Section, overridden, read_yaml

METRICS = {"bleu": "BLEU", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "nats": "nats/token"}
LABELLED = {"accuracy": "accuracy, %", "nats": "nats/label"}  # of held-out examples with a class each
HELD_OUT = {"nats": METRICS["nats"], "accuracy": "accuracy, %"}  # of the held-out labels, where nothing else is asked


class Arm(Section):
    """One way of training. change: overrides of the base recipe by path, such as `adapter: {kind: lora}`.

    family: arms of one are joined by a line where quality stands against decoding state. variants: training-free changes
    of what was trained, each asked what the arm is (lengths alone ask variants).
    """

    name: str
    family: str = ""
    change: dict[str, Any] = {}
    variants: tuple[Variant, ...] = ()


class Generate(Section):
    """What every arm is asked to write: completions of the prompts of `data`, scored against all their references.

    limit: only the first so many prompts (0: all). batch: prompts at a time. sampling: fields of `Sampling`; greedy
    unless it says more.
    """

    data: CorpusPart
    limit: int = Field(default=0, ge=0)
    batch: int = Field(default=32, ge=1)
    sampling: dict[str, Any] = {}

    @model_validator(mode="after")
    def _pairs(self) -> Generate:
        if not isinstance(self.data, Pairs):
            raise ValueError(f"a corpus {self.data.kind!r} has no prompts; give pairs, e2e, webnlg or docstrings")
        Sampling.of(**self.sampling)
        return self


class Published(Section):
    """The order in print. metric: as this study calls it. source: paper, table, model. values: by arm, or
    "ARM: VARIANT", more is better. apart: pairs whose values differ by less are not compared with what is found here.
    order: in values' place where print has a plot or a sentence: groups of arms, the best first; no order within one."""

    metric: str
    source: str
    values: dict[str, float] = {}
    apart: float = Field(default=0.0, ge=0)
    order: tuple[tuple[str, ...], ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _one_of_both(self) -> Published:
        named = [name for group in self.order for name in group]
        if bool(self.values) == bool(self.order) or len(self.values or self.order) < 2 or (self.order and self.apart):
            raise ValueError("give values (and apart) of two arms or more, or an order of two groups or more")
        if len(set(named)) < len(named) or not all(self.order):
            raise ValueError("a group of the order is empty, or an arm stands in it twice")
        return self

    @property
    def compared(self) -> dict[str, float]:
        """The values, or ranks below zero that stand for them: more is better."""
        ranks = {name: -float(i) for i, group in enumerate(self.order, 1) for name in group}
        return self.values or ranks

    def only(self, names: Collection[str]) -> Published:
        """What it says of these. A group of the order that is then empty stays, and so do the places behind it."""
        values = {name: value for name, value in self.values.items() if name in names}
        order = tuple(tuple(name for name in group if name in names) for group in self.order)
        return self.model_copy(update={"values": values, "order": order})


class Study(Section):
    """name: of the report. base: a training recipe; its out and seed are the study's. seeds: every arm runs with each.

    base may be {model: DIRECTORY} alone: nothing is trained, an arm changes at most the model, and lengths ask it and
    its variants. generate, lengths: what is asked, beside the loss on the held-out text. ngram: the trivial rival where
    nothing else is: n-grams of the training text on the same held-out tokens. main: the metric on which
    orders are claimed; bleu where something is generated, token accuracy at the longest of lengths, accuracy of classes,
    else nats (of the held-out text).
    """

    name: str
    base: dict[str, Any]
    arms: tuple[Arm, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    generate: Generate | None = None
    lengths: Lengths | None = None
    ngram: NGrams | None = None
    clock: Clock | None = None
    main: str | None = None
    published: tuple[Published, ...] = ()
    out: str = "report"

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        names = [arm.name for arm in self.arms]
        twice = [name for name in names if names.count(name) > 1]
        if twice or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"two arms are called {twice[0]!r}" if twice else f"a seed stands twice in {self.seeds}")
        slugs = [slug(name) for name in names]
        if not all(slugs):
            raise ValueError(f"no folder can be called {names[slugs.index('')]!r}: give a letter or a digit")
        if len(set(slugs)) < len(slugs):
            raise ValueError("two names of arms differ only in signs that no folder is named by")
        if self.labelled and (self.generate is not None or self.lengths is not None):
            raise ValueError("what tells classes apart writes nothing: leave generate and lengths out")
        if self.generate is not None and self.lengths is not None:
            raise ValueError("a study asks for completions or at lengths, not both")
        if self.ngram is not None and (self.generate or self.lengths or self.labelled or self.claimed != "nats"):
            raise ValueError("n-grams have nats/token of a held-out text alone: leave ngram out, or what else is asked")
        for name in () if self.clock is None else (arm for race in self.clock.races.values() for arm in race):
            if name not in names:
                raise ValueError(f"the clock names {name!r}, which is no arm; {did_you_mean(name, names)}")
        if self.lengths is None and any(arm.variants for arm in self.arms):
            raise ValueError("variants have no effect: only lengths ask them")
        rows = self.rows + ([] if self.ngram is None else [self.ngram.name])
        twice = [name for name in rows if rows.count(name) > 1]
        if twice or len(self.truncated) > 1:
            said = f"two rows are called {twice[0]!r}" if twice else "two variants are truncated, and one is enough"
            raise ValueError(said)
        told = [(table.metric, name) for table in self.published for name in table.compared]
        if len(set(told)) < len(told):
            raise ValueError("two tables in print of one metric have an arm in common")
        for metric in (self.main, *(table.metric for table in self.published)):
            if metric is not None and metric not in self.titles:
                raise ValueError(f"no metric {metric!r} is measured here; {did_you_mean(metric, list(self.titles))}")
        for name in (name for table in self.published for name in table.compared):
            if name not in rows or name in self.truncated:
                raise ValueError(f"published names {name!r}, which is no arm; {did_you_mean(name, rows)}")
        return self

    @property
    def trains(self) -> bool:
        """Whether arms are trained, or a model is asked as it is."""
        return "train" in self.base

    @property
    def rows(self) -> list[str]:
        """Names of what is asked: every arm, and after it "ARM: VARIANT"."""
        return [name for arm in self.arms for name in (arm.name, *(row_name(arm, v.name) for v in arm.variants))]

    @property
    def truncated(self) -> list[str]:
        """The row of the trivial rival, where there is one."""
        return [row_name(arm, v.name) for arm in self.arms for v in arm.variants if v.truncate]

    @property
    def titles(self) -> dict[str, str]:
        """Metric -> how it is called in tables."""
        times = {} if self.clock is None else clocks.TITLES
        if self.lengths is not None:
            return self.lengths.titles | times
        if self.labelled:
            return LABELLED | times
        return (METRICS if self.generate is not None else HELD_OUT) | times

    @property
    def claimed(self) -> str:
        """The metric on which orders are claimed."""
        if self.lengths is not None:
            return self.main or self.lengths.main
        usual = "bleu" if self.generate is not None else "accuracy" if self.labelled else "nats"
        return self.main or usual

    @property
    def labelled(self) -> bool:
        """Whether what is trained tells classes apart."""
        objective = self.base.get("objective")
        kind = objective.get("kind") if isinstance(objective, dict) else objective
        return kind == Classification.kind

    def held_out(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Metrics among the held-out scores of a run."""
        right = {"accuracy": 100 * scores["accuracy"]} if "accuracy" in self.titles else {}
        return {"nats": scores["nats"]} | right

    def only(self, names: Sequence[str]) -> Study:
        """The study of these arms alone, of all where none is named: the others leave what is in print, and the races.
        Raises SpecError for a name that no arm has, and where a clock keeps no race."""
        if not names:
            return self
        kept = chosen(names, [arm.name for arm in self.arms])
        part = self.model_copy(update={"arms": tuple(arm for arm in self.arms if arm.name in kept)})
        rows = part.rows + ([] if self.ngram is None else [self.ngram.name])
        tables = tuple(left for table in self.published if (left := table.only(rows)).compared)
        timed = None if self.clock is None else self.clock.only(kept)
        return part.model_copy(update={"published": tables, "clock": timed})

    def check_asked(self) -> None:
        """Raises SpecError where an arm's training would end without what is asked of it."""
        if not self.trains:
            return
        for arm in self.arms:
            if self.claimed in HELD_OUT and self.recipe(arm, 0).data.held_out is None:
                raise SpecError(
                    f"{self.titles[self.claimed]} is of a held-out text, and this arm has none",
                    where=f"arm {arm.name!r}",
                    remedy="give base.data.held_out, or ask generate or lengths",
                )
        if self.generate is not None and not isinstance(self.recipe(self.arms[0], 0).data.train, Pairs):
            raise SpecError(
                "the base trains on no pairs, and is asked for completions",
                where="base.data.train",
                remedy="give pairs, e2e, webnlg or docstrings, or ask no generate",
            )

    def recipe(self, arm: Arm, seed: int) -> Recipe:
        """The training recipe of one run. Raises SpecError naming the arm."""
        said = [override_of(path, value) for path, value in arm.change.items()]
        try:
            return Recipe.load(self.base, [*said, f"train.seed={seed}"])
        except SpecError as error:
            raise SpecError(error.what, where=f"arm {arm.name!r}: {error.where}", remedy=error.remedy) from None

    @staticmethod
    def load(source: str | Path | dict[str, Any], overrides: Iterable[str] = ()) -> Study:
        """From a YAML file or plain data, with `key.key=value` overrides. Raises SpecError; every arm is checked."""
        where = str(source) if isinstance(source, (str, Path)) else "recipe"
        fields = overridden(source, overrides, Study.model_fields, "recipes/table_to_text.yaml")
        for name, section in (("generate", Generate), ("lengths", Lengths), ("ngram", NGrams), ("clock", Clock)):
            if isinstance(fields.get(name), dict):
                fields[name] = validate(section, fields[name], where=f"{where}: {name}")
        if isinstance(fields.get("published"), dict):
            fields["published"] = [fields["published"]]
        for name, section in (("arms", Arm), ("published", Published)):
            if isinstance(fields.get(name), list):
                said = enumerate(fields[name])
                fields[name] = tuple(validate(section, one, where=f"{where}: {name}.{i}") for i, one in said)
            elif fields.get(name, ()) is None:
                del fields[name]
        study = validate(Study, fields, where=where)
        base = study.base
        if set(base) == {"model"} and isinstance(base["model"], str):
            _only_asks(study, where)
            if study.clock is not None:
                raise SpecError("nothing is trained, and a clock is asked", where=f"{where}: clock")
            return study
        if not isinstance(base.get("train"), dict) or "out" in base or "seed" in base["train"]:
            raise SpecError(
                "base is a training recipe without out and train.seed, which are the study's",
                where=f"{where}: base",
                remedy="or give {model: DIRECTORY} alone, where nothing is trained",
            )
        for arm in study.arms:
            recipe = study.recipe(arm, 0)
            if study.clock is not None:
                study.clock.check(recipe, arm.name)
        if study.ngram is not None:
            _ngram_fits(study, where)
        return study


def is_study(recipe: Path) -> bool:
    """Whether a recipe is a study: it has a `base`. Raises SpecError for a file that cannot be read."""
    data = read_yaml(recipe)
    return isinstance(data, dict) and "base" in data


def chosen(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The known names of arms that are among `names`, in their own order. Raises SpecError for one that is unknown."""
    for name in names:
        if name not in known:
            raise SpecError(f"no arm is called {name!r}", where="--only", remedy=did_you_mean(name, known))
    return [name for name in known if name in names]


def with_kept(whole: Any, names: Sequence[str], kept: Callable[[Any], bool]) -> Any:
    """The part of a study that is reported: the arms of these names, all where none is given, and those that are `kept`,
    of which nothing is left to run. Raises SpecError for a name that no arm has."""
    asked = whole.only(names)
    reported = [arm.name for arm in whole.arms if arm in asked.arms or kept(arm)]
    return whole if len(reported) == len(whole.arms) else whole.only(reported)


def said_only(arms: Sequence[Any], whole: Sequence[Any]) -> list[str]:
    """The words of a command that ask for these arms alone: none where they are all."""
    return [f"--only {shlex.quote(arm.name)}" for arm in arms] if len(arms) < len(whole) else []


def override_of(path: str, value: Any) -> str:
    """`path=value`, the value as JSON that YAML reads as the same. A sign beyond 16 bits stands as it is, since YAML takes
    JSON's pair of escapes for two signs; others are escaped, since some of them break a line in YAML."""
    said = json.dumps(value, ensure_ascii=False)
    return f"{path}=" + "".join(f"\\u{ord(c):04x}" if "\x7f" <= c <= "\uffff" else c for c in said)


def slug(name: str) -> str:
    """The name of an arm's folder: letters, digits and dots of any script, the rest as hyphens; "" where there are none."""
    signs = unicodedata.normalize("NFC", name.lower())
    kept = "".join(c if c == "." or unicodedata.category(c)[0] in "LMN" else "-" for c in signs)
    return re.sub("-+", "-", kept).strip("-") if kept.strip("-.") else ""


def _only_asks(study: Study, where: str) -> None:
    """Raises SpecError where a study without training is to do what only training does."""
    if study.lengths is None:
        raise SpecError("nothing is trained, and nothing asked", where=where, remedy="give lengths, or base.train")
    for arm in study.arms:
        more = [path for path in arm.change if path != "model"]
        if more or not isinstance(model_of(study, arm), str):
            what = f"{more[0]!r} has no effect" if more else "its model is no directory"
            raise SpecError(
                f"{what} where nothing is trained", where=f"{where}: arm {arm.name!r}", remedy="use variants"
            )


def _ngram_fits(study: Study, where: str) -> None:
    """Raises SpecError where n-grams are not asked what every arm is asked."""
    for arm in study.arms:
        recipe, first = study.recipe(arm, 0), study.recipe(study.arms[0], 0)
        if recipe.data.held_out is None or recipe.objective.kind != NextToken.kind:
            said = (
                "nothing is held out" if recipe.data.held_out is None else f"{recipe.objective.kind} is asked otherwise"
            )
        elif _questions(recipe) != _questions(first):
            said = f"{study.arms[0].name!r} is asked another text, or in other tokens or rows"
        else:
            continue
        raise SpecError(
            f"n-grams beside arm {arm.name!r}: {said}",
            where=f"{where}: ngram",
            remedy="leave ngram out, or train all arms by next_token on one text with one tokenizer",
        )


def _questions(recipe: Recipe) -> tuple[Any, ...]:
    """All that the held-out tokens, and what they are asked from, depend on."""
    t = recipe.train
    return recipe.data, recipe.tokenizer or recipe.model, t.length, t.eval_batches and t.eval_batches * t.batch


def model_of(asked: Study, arm: Arm) -> Any:
    return arm.change.get("model", asked.base.get("model"))


def row_name(arm: Arm, variant: str) -> str:
    """The name of a row; "" is the arm as it is."""
    return f"{arm.name}: {variant}" if variant else arm.name
