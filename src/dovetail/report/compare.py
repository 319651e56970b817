"""compare: the arms of a recipe side by side, on the same questions; a report for people and one for programs."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dovetail.errors import SpecError, UserError
from dovetail.hub import atomic, load, load_tokenizer
from dovetail.hub.remote import resolve
from dovetail.report import arms, html, render
from dovetail.report.cost import Cost, Job, costs, machine, versions
from dovetail.report.measure import computed_in, device_of, dtype_of, in_dtype
from dovetail.report.ngram_rival import ngrams_beside
from dovetail.report.plain import plain
from dovetail.report.recipe import Comparison, tokens_of
from dovetail.report.results import ArmResult, Result, Sample, first_of_length, named
from dovetail.report.text import encoded, recut, rows_within, tokens_hash
from dovetail.sampling import generate
from dovetail.sampling.limits import check_lengths
from dovetail.spec import diff, override
from dovetail.training.device import choose

_CLAIMS = (
    "An order is claimed only where the gap exceeds twice the spread over seeds (largest less smallest) and twice the "
    "standard error of the gap over rows of text."
)


def compare(
    recipe: str | Path | Mapping[str, Any] | Comparison,
    out: str | Path | None = None,
    overrides: Iterable[str] = (),
    *,
    quiet: bool = False,
) -> Result:
    """Runs the arms of a recipe, prints what was found, and writes index.html and report.json into `out`.

    recipe: a YAML file or plain data (see `Comparison`). overrides: `data.tokens=8192`, `arms.0.length=2x`.
    out: a folder, replaced as a whole once all is measured; the recipe's own unless given. quiet: nothing on the
    terminal. Every arm is scored on the same tokens, in rows (R, length + 1) of its own length that lie within one
    document; n-grams are asked the same, where the recipe has them. Units: losses and divergences in nats/token, rates in
    tokens/s (batch 1), memory and state in bytes.
    Raises SpecError for a recipe that does not fit, CheckpointError and ConfigError for a model that does not load,
    DataError for a text too short, RunError for losses that are not finite or a full disk.
    """
    asked = recipe if isinstance(recipe, Comparison) else Comparison.load(_source(recipe), overrides)
    source = str(recipe) if isinstance(recipe, (str, Path)) else "RECIPE"
    command = " ".join(["dovetail compare", source, *overrides])
    folder = resolve(asked.model.path)
    tokenizer = load_tokenizer(folder)
    model = load(folder, dtype=asked.model.dtype, device=choose(asked.model.device))
    if asked.model.dtype is None:
        model = in_dtype(model, computed_in(model))
    console = Console(stderr=True, quiet=quiet)
    bar = (TextColumn("{task.description}", markup=False), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=len(asked.arms) + 4)

        def begin(what: str, done: int) -> None:
            progress.update(task, description=what, completed=done)

        result = _compare(asked, model, tokenizer, command, str(out or asked.out), begin)
    with atomic.atomic_folder(Path(result.out)) as scratch:
        (scratch / "index.html").write_text(html.page(result), encoding="utf-8")
        data = json.dumps(result.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        (scratch / "report.json").write_text(data + "\n", encoding="utf-8")
    if not quiet:
        screen = Console(highlight=False)
        if not screen.is_terminal:
            screen = Console(highlight=False, width=render.WIDTH)
        screen.print(result)
        screen.print(f"\nreport: {Path(result.out) / 'index.html'}", soft_wrap=True, markup=False)
    return result


def _compare(asked: Comparison, model: Any, tokenizer: Any, command: str, out: str, begin: Any) -> Result:
    context = getattr(model.spec, "context", None)
    lengths = {arm.name: tokens_of(arm.length, context) for arm in asked.arms}
    _check(asked, model, tokenizer)
    corpus: Any = asked.data.corpus
    documents = [encoded(tokenizer, text)[0] for text in corpus.documents()]
    longest = rows_within(documents, max(lengths.values()), asked.data.tokens)
    rows = {length: recut(longest, length) for length in set(lengths.values())}
    stride = None if asked.stride is None else tokens_of(asked.stride, context)
    trials = []
    for i, arm in enumerate(asked.arms):
        say = lambda what, i=i: begin(what, 1 + i)  # noqa: E731
        trials.append(arms.run(model, arm, rows[lengths[arm.name]], asked.seeds, stride=stride, tell=say))
    begin("n-grams", len(asked.arms) + 1)
    fingerprint = corpus.fingerprint()
    ngram = None if asked.ngram is None else ngrams_beside(asked.ngram, tokenizer, rows, trials, fingerprint)
    begin("timing", len(asked.arms) + 2)
    jobs = {t.arm.name: Job(t.models[t.last], longest[:1, : t.see or t.length]) for t in trials}
    peers = first_of_length({t.arm.name: t.length for t in trials})
    spent = costs(jobs, against=peers, **dict(asked.speed))
    begin("samples", len(asked.arms) + 3)
    found = tuple(_arm(trial, stage, spent[trial.arm.name], model) for trial in trials for stage in trial.nats)
    size = spent[asked.arms[0].name].size.parameters
    return Result(
        name=asked.name,
        title=f"{asked.model.path}: {size:,} parameters"
        + ("" if context is None else f", trained at {context} tokens"),
        date=datetime.date.today().isoformat(),
        device=machine(device_of(model)),
        dtype=dtype_of(model),
        versions=versions(),
        command=command,
        context=context,
        spec=model.spec.to_dict(),
        text={
            "corpus": corpus.to_dict(),
            "text_sha256": fingerprint,
            "tokens_sha256": tokens_hash(longest),
            "tokens": longest.shape[0] * (longest.shape[1] - 1),
        },
        arms=found,
        verdicts=tuple(arms.verdicts(trials)),
        claims=_CLAIMS,
        samples=_samples(asked, trials, tokenizer),
        samples_are=f"greedy, {asked.sample_tokens} tokens, from a model of {size:,} parameters; no measure of quality",
        recipe=plain(asked),
        out=out,
        ngram=ngram,
    )


def _check(asked: Comparison, model: Any, tokenizer: Any) -> None:
    """Raises what the last arm, the n-grams and the samples would, once the others are healed and timed."""
    later = [arm.heal.data for arm in asked.arms if arm.heal] + ([asked.ngram.data] if asked.ngram else [])
    for corpus in later:
        next(iter(corpus.documents()), None)  # type: ignore[attr-defined]
    prompts = [len(tokenizer.encode(prompt)) for prompt in asked.samples]
    for arm in asked.arms:
        where = f"arm {arm.name!r}"
        try:
            spec = override(model.spec, arm.swap)
        except SpecError as error:
            raise SpecError(error.what, where=f"{where}: {error.where}", remedy=error.remedy) from None
        try:
            check_lengths(spec, max(prompts, default=0), asked.sample_tokens)
        except UserError as error:
            raise UserError(error.what, where=f"samples, {where}", remedy=error.remedy) from None


def _arm(trial: arms.Trial, stage: arms.Stage, cost: Cost, base: Any) -> ArmResult:
    model = trial.models[stage]
    return ArmResult(
        name=named(trial.arm.name, stage),
        stage=stage,
        length=trial.length,
        see=trial.see,
        nats=trial.mean(stage),
        spread=trial.spread(stage),
        seeds=trial.seeds[stage],
        quality=tuple(trial.quality[stage]),
        cost=cost,
        diff=tuple(diff(base.spec, model.spec)),
        moves=() if trial.transplant is None else tuple(trial.transplant.moves),
    )


def _samples(asked: Comparison, trials: list[arms.Trial], tokenizer: Any) -> tuple[Sample, ...]:
    """Greedy continuations by every model that differs from the ones before."""
    out, seen = [], []
    for trial in trials:
        model = trial.models[trial.last]
        if any(model is other for other in seen):
            continue
        seen.append(model)
        for prompt in asked.samples:
            text = generate(model, tokenizer, prompt, max_new_tokens=asked.sample_tokens, temperature=0.0)
            out.append(Sample(named(trial.arm.name, trial.last), prompt, text))
    return tuple(out)


def _source(recipe: str | Path | Mapping[str, Any]) -> str | Path | dict[str, Any]:
    if isinstance(recipe, Mapping):
        return dict(recipe)
    if not Path(recipe).is_file():
        raise SpecError(f"no recipe {str(recipe)!r}", remedy="give a YAML file, e.g. recipes/first.yaml")
    return recipe
