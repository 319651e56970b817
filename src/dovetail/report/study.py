"""Studies: ways of training side by side, from one base recipe, over seeds, at one budget. Strict, and resumable."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dovetail.adapters import trainable
from dovetail.data.labelled import nearest_mean
from dovetail.errors import DivergedError, DovetailError, RunError, SpecError, StoppedError
from dovetail.hub import load, load_tokenizer
from dovetail.hub.atomic import recover
from dovetail.hub.remote import resolve
from dovetail.kernels import twins
from dovetail.report import clock, study_page
from dovetail.report.cost import machine, state_bytes, versions
from dovetail.report.lengths import Lengths, check, examine
from dovetail.report.ngram_rival import ngram_of_training
from dovetail.report.plain import plain
from dovetail.report.processes import processes, sigterm_handed_on
from dovetail.report.scores import generate_scores, kept_of_prompts, nearest, questions, score
from dovetail.report.study_key import key as _key
from dovetail.report.study_page import Curve, Found, Row
from dovetail.report.study_recipe import METRICS, Arm, Generate, Study, model_of, row_name, said_only, slug, with_kept
from dovetail.report.study_recipe import is_study as is_study
from dovetail.report.written import keep, kept, write
from dovetail.training import checkpoint
from dovetail.training.alone import alone_in
from dovetail.training.device import choose, peak_memory
from dovetail.training.flops import parameter_count
from dovetail.training.loop import Run
from dovetail.training.setup import set_up

FOUND = "found.json"  # in a run's folder


def study(
    recipe: str | Path | Mapping[str, Any] | Study,
    out: str | Path | None = None,
    overrides: Iterable[str] = (),
    *,
    only: Sequence[str] = (),
    jobs: int = 1,
    quiet: bool = False,
) -> Found:
    """Trains every arm with every seed, asks each the same questions, and writes index.html and report.json into `out`.

    What a run found stays under out/runs and is not run again while its recipe, the weights that it begins with, its
    texts and the questions are the same: an interrupted study goes on where it stood, its trainings where a SIGTERM
    found them (they are told, and save; one that has not ended half a minute later is killed). A training that
    diverges, or whose scores are no numbers, is reported as that, and no order is claimed of its arm. only: names of
    the arms that are run, all unless given; those are reported, and with them every arm whose runs are kept. jobs:
    runs at a time, each in a process of its own, spread over the GPUs that are visible (rates are then not
    comparable, and left out, as they are where kept runs are of several machines). Raises SpecError for a recipe that
    does not fit or has no such arm, StoppedError after a SIGTERM, and whatever a run raises.
    """
    whole = recipe if isinstance(recipe, Study) else Study.load(_given(recipe), overrides)
    whole.check_asked()
    target = Path(out or whole.out)

    def place(arm: Arm, seed: int) -> Path:
        return target / "runs" / slug(arm.name) / str(seed)

    def done(arm: Arm) -> bool:
        return all(kept(place(arm, seed) / FOUND, _key(whole, arm, seed)) is not None for seed in whole.seeds)

    asked = with_kept(whole, only, done)
    if asked.clock is not None and jobs != 1:
        raise SpecError(
            f"a clock beside {jobs} runs at a time, which take the device from each other",
            where="clock",
            remedy="leave --jobs at 1",
        )
    source = str(recipe) if isinstance(recipe, (str, Path)) else "RECIPE"
    runs = [(arm, seed) for arm in asked.arms for seed in asked.seeds]
    places = {(arm.name, seed): place(arm, seed) for arm, seed in runs}
    console = Console(stderr=True, quiet=quiet)
    bar = (TextColumn("{task.description}", markup=False), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    keys = {(arm.name, seed): _key(asked, arm, seed) for arm, seed in runs}
    warn = partial(console.print, style="yellow", markup=False, highlight=False, soft_wrap=True)
    before = {run: kept(folder / FOUND, keys[run], warn) for run, folder in places.items()}
    found = {run: _judged(told) for run, told in before.items() if told is not None}
    for run in found:
        _tidy(places[run])
    with Progress(*bar, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("runs", total=len(runs), completed=len(found))
        with processes(jobs) as pool, sigterm_handed_on() as stopped:
            waiting = [(arm, seed) for arm, seed in reversed(runs) if (arm.name, seed) not in found]
            free = _gpus(jobs)
            going: dict[Future[dict[str, Any]], tuple[tuple[str, int], str | None]] = {}
            wrong: BaseException | None = None
            while waiting or going:
                if stopped():
                    waiting.clear()
                while waiting and free:
                    arm, seed = waiting.pop()
                    run, gpu = (arm.name, seed), free.pop(0)
                    going[pool.submit(_run, asked, arm, seed, keys[run], places[run], gpu)] = run, gpu
                for future in wait(going, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    run, gpu = going.pop(future)
                    free.append(gpu)
                    try:
                        found[run] = _judged(future.result())
                    except (Exception, KeyboardInterrupt) as error:
                        waiting.clear()  # those that are going are waited for here, where a SIGTERM is handed on
                        said = f"{run[0]}, seed {run[1]}: {type(error).__name__}: {error}"
                        if stopped() and (isinstance(error, StoppedError) or not isinstance(error, DovetailError)):
                            if not isinstance(error, StoppedError | BrokenProcessPool | KeyboardInterrupt):
                                warn(said)  # as one that falls over its compiler, which was told, too
                            continue  # it saved, or had nothing to save yet
                        if isinstance(error, BrokenProcessPool):
                            error = RunError(
                                f"the process of {run[0]}, seed {run[1]}, was killed, as for want of memory",
                                where=str(places[run]),
                                remedy="make the batch smaller or take fewer --jobs; run again, what is done is kept",
                            )
                        if wrong is not None or going:
                            warn(f"{said}\nruns that are still waited for: {len(going)}")
                        wrong = wrong or error
                        continue
                    progress.update(task, advance=1, description="{}, seed {}".format(*run))
            if wrong is not None:
                raise wrong
            if stopped():
                raise StoppedError(
                    f"told to stop with {len(found)} of {len(runs)} runs done",
                    where=str(target / "runs"),
                    remedy="run the command again: what is done is kept, and a training goes on where it was saved",
                )
    more = {} if asked.lengths is None else _along(asked, asked.lengths, found)
    if asked.clock is not None:
        found = clock.timed(asked.clock, found, asked.seeds)
        more |= {"races": clock.curves(asked.clock, found, asked.seeds), "against": asked.clock.against}
        more |= {"smaller": more.get("smaller", study_page.SMALLER_IS_BETTER) | clock.SMALLER}
        more |= {"note": f"{more.get('note', '')} {clock.NOTE}".strip()}
    here = machine(choose(str(asked.base.get("train", {}).get("device", "auto"))))
    made: dict[str, list[str]] = {}  # machine -> arms
    for arm, seed in runs:
        made.setdefault(found[arm.name, seed].get("device", here), []).append(arm.name)
    if len(made) > 1:
        where = "; ".join(f"{device}: {', '.join(dict.fromkeys(names))}" for device, names in made.items())
        more["note"] = f"{more.get('note', '')} Runs of several machines, whose rates are left out. {where}.".strip()
    rates = jobs == 1 and len(made) == 1
    rows = [
        row for arm in asked.arms for row in _rows(asked, arm, [found[arm.name, seed] for seed in asked.seeds], rates)
    ]
    rival = next((row for row in rows if row.name in asked.truncated), None)
    if asked.generate is not None:
        rival = Row(
            "nearest training pair", {k: (v, 0.0) for k, v in _nearest(asked, asked.generate).items()}, 0, 0, {}
        )
    if asked.ngram is not None:
        ngram, nats, said = ngram_of_training(asked.ngram, asked.recipe(asked.arms[0], 0))
        rival = Row(ngram, {"nats": (nats, 0.0)}, 0, 0, {})
        more["note"] = f"{more.get('note', '')} {said}".strip()
    if asked.labelled and asked.claimed == "accuracy":
        rival = Row("nearest class mean", {"accuracy": (_nearest_mean(asked), 0.0)}, 0, 0, {})
    result = Found(
        name=asked.name,
        date=datetime.date.today().isoformat(),
        device="; ".join(made),
        versions=versions(),
        command=" ".join(["dovetail compare", source, *overrides, *said_only(asked.arms, whole.arms)]),
        seeds=asked.seeds,
        main=asked.claimed,
        titles=asked.titles,
        rows=tuple(row for row in rows if row.name not in asked.truncated),
        rival=rival,
        published=tuple(plain(table) | {"values": table.compared} for table in asked.published),
        samples=_samples(asked, found) if asked.generate is not None else (),
        recipe=plain(asked),
        out=str(target),
        **more,
    )
    write(result, study_page.page(result), target, quiet)
    return result


def _gpus(jobs: int) -> list[str | None]:
    """The GPU of each of `jobs` runs at a time, in turn, as CUDA_VISIBLE_DEVICES says it; None where there is no choice."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = said.split(",") if said else [str(n) for n in range(torch.cuda.device_count())]
    return [names[n % len(names)] if len(names) > 1 else None for n in range(jobs)]


def _run(asked: Study, arm: Arm, seed: int, key: str, folder: Path, gpu: str | None) -> dict[str, Any]:
    """What one run finds: kept in `folder` under its key. In a process of its own, which then sees `gpu` alone.

    A training that was killed goes on from its last checkpoint, unless its seconds are compared. Another study at the same
    run is refused; what it made meanwhile is taken.
    """
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    with alone_in(folder):
        before = kept(folder / FOUND, key)
        return _made(asked, arm, seed, key, folder) if before is None else before


def _made(asked: Study, arm: Arm, seed: int, key: str, folder: Path) -> dict[str, Any]:
    """`_run`, where nobody else is at it."""
    recipe = asked.recipe(arm, seed) if asked.trains else None
    begun = folder / "key"
    recover(folder / "run")
    last = checkpoint.found(folder / "run") if begun.is_file() and begun.read_text() == key and not asked.clock else []
    if not last:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        begun.write_text(key)
    weights: Any = contextlib.nullcontext()
    if recipe is None:
        path = resolve(model_of(asked, arm))
        here = machine(device := choose("auto"))
        model, tokenizer = load(path, dtype=torch.float32, device=device), load_tokenizer(path)
        size = sum(p.numel() for p in model.parameters())
        found: dict[str, Any] = {"key": key, "trainable": 0, "parameters": size, "device": here, "metrics": {}}
    else:
        paths = twins.plain() if recipe.train.plain else contextlib.nullcontext()  # what is asked then takes fast ones
        with paths:
            run = Run(set_up(recipe), folder / "run")
            size = {"key": key, "trainable": sum(p.numel() for p in trainable(run.model).values())}
            size |= {"parameters": parameter_count(run.model), "device": machine(run.device)}
            size |= {"state_bytes": state_bytes(run.model, recipe.train.length)}
            if asked.lengths is not None:
                with checkpoint.same_random():
                    check(run.model, run.parts.tokenizer, asked.lengths, arm.variants, seed)
            if asked.generate is not None:
                kept_of_prompts(run.model, **asked.generate.sampling)
            if last:
                run.restore(last[-1])
            start = time.perf_counter()
            try:
                trained = run.train(progress=False)
            except DivergedError as error:
                lost = {"peak_bytes": peak_memory(run.device), "metrics": {}, "diverged": error.what}
                return _keep(folder, size | lost)
        model, tokenizer, weights = run.model, run.parts.tokenizer, run.exported()
        found = {
            **size, "steps": trained.steps, "tokens": trained.tokens, "peak_bytes": peak_memory(run.device),
            "metrics": {} if trained.held_out is None else asked.held_out(trained.held_out),
        }  # fmt: skip
        if not last:  # what a run that went on took is not known
            found |= {"tokens_per_s": trained.tokens_per_s, "seconds": time.perf_counter() - start}
        if asked.clock is not None:
            found["clock"] = clock.history(folder / "run" / "log.jsonl", trained.steps, trained.tokens)
    with weights:
        if (ask := asked.generate) is not None:
            pairs = ask.data.pairs()  # type: ignore[attr-defined]
            scores, said_texts = generate_scores(
                model, tokenizer, pairs, batch=ask.batch, limit=ask.limit, **ask.sampling
            )
            found["metrics"] |= {name: getattr(scores, name) for name in METRICS if hasattr(scores, name)}
            found |= {"signature": scores.signature, "texts": said_texts}
        if asked.lengths is not None:
            found["variants"] = examine(model, tokenizer, asked.lengths, arm.variants, seed)
    return _keep(folder, found)


def _keep(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """`found` in the run's folder, in place of the weights, which have told what was asked."""
    keep(folder / FOUND, found)
    _tidy(folder)
    return found


def _tidy(folder: Path) -> None:
    """Removes what a run that is kept leaves behind, or one that was killed while it did this."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "key").unlink(missing_ok=True)


def _judged(found: dict[str, Any]) -> dict[str, Any]:
    """What a run found; where a score of its own is no number, as of a training that diverged."""
    told = {"metrics": found["metrics"], "clock": found.get("clock")}
    if "diverged" in found or _finite(told):
        return found
    left = {name: value for name, value in found.items() if name not in ("metrics", "clock", "variants", "texts")}
    wrong = [f"{name} is {value}" for name, value in found["metrics"].items() if not _finite(value)]
    return left | {"metrics": {}, "diverged": f"{(wrong or ['a held-out loss is no number'])[0]} after the training"}


def _finite(told: Any) -> bool:
    """Whether all numbers in it are."""
    if isinstance(told, Mapping):
        return all(map(_finite, told.values()))
    if isinstance(told, list | tuple):
        return all(map(_finite, told))
    return not isinstance(told, float) or math.isfinite(told)


def _rows(asked: Study, arm: Arm, found: list[dict[str, Any]], rates: bool) -> list[Row]:
    """The arm, and each of its variants. Metrics are of the runs that ended in numbers. rates: whether they compare."""
    spent: dict[str, float] = {}
    diverged = tuple(seed for seed, run in zip(asked.seeds, found, strict=True) if "diverged" in run)
    if asked.trains:
        spent["peak_bytes"] = max(run["peak_bytes"] for run in found)
        spent |= {"state_bytes": found[0]["state_bytes"]} if found[0].get("state_bytes") else {}
        if rates and not diverged and all("tokens_per_s" in run for run in found):
            spent["tokens_per_s"] = sum(run["tokens_per_s"] for run in found) / len(found)
            spent |= {"seconds": max(run["seconds"] for run in found)} if all("seconds" in run for run in found) else {}
    first, rows = found[0], []
    for name in ("", *(variant.name for variant in arm.variants)):
        told = {
            seed: run.get("variants", {"": {"metrics": {}}})[name]["metrics"] | ({} if name else run["metrics"])
            for seed, run in zip(asked.seeds, found, strict=True)
            if "diverged" not in run
        }
        several = [one for one in told.values() if _finite(one)]
        lost = tuple(seed for seed in asked.seeds if not _finite(told.get(seed, math.nan)))
        values = {metric: [one[metric] for one in several] for metric in (several[0] if several else ())}
        metrics = {metric: (sum(v) / len(v), max(v) - min(v)) for metric, v in values.items()}
        own = (0, first["parameters"], {}) if name else (first["trainable"], first["parameters"], spent)
        rows.append(Row(row_name(arm, name), metrics, *own, lost, "" if name else arm.family))
    return rows


def _along(asked: Study, ask: Lengths, found: Mapping[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """What a page says of lengths: losses along the longest rows, a plot of all arms and one for each with variants."""
    curves: dict[str, dict[str, Curve]] = {}
    for arm in asked.arms:
        runs = [run["variants"] for seed in asked.seeds if "diverged" not in (run := found[arm.name, seed])]
        if not runs:
            continue
        mine = {}
        for name in runs[0]:
            several = [run[name]["curve"] for run in runs if _finite(run[name]["curve"])]
            if several:
                across = [(a + b - 1) / 2 for a, b, _ in several[0]]
                losses = [sum(v[2] for v in some) / len(several) for some in zip(*several, strict=True)]
                mine[row_name(arm, name)] = across, losses
        if len(asked.arms) > 1 and arm.name in mine:
            curves.setdefault("every arm as it is", {})[arm.name] = mine[arm.name]
        if len(mine) > 1 or (mine and len(asked.arms) == 1):
            curves[arm.name] = mine
    return {"smaller": ask.smaller, "brief": ask.brief, "note": ask.note, "trained": ask.at[0], "curves": curves}


def _nearest(asked: Study, ask: Generate) -> dict[str, float]:
    """Scores of the trivial rival: the completion of the training prompt that shares most words with the question."""
    train: Any = asked.recipe(asked.arms[0], 0).data.train
    wanted = questions(ask.data.pairs())[: ask.limit or None]  # type: ignore[attr-defined]
    scores = score(nearest(train.pairs(), [q.prompt for q in wanted]), [q.references for q in wanted])
    return {name: getattr(scores, name) for name in METRICS if hasattr(scores, name)}


def _nearest_mean(asked: Study) -> float:
    """Accuracy, in percent, of the trivial rival: the class whose mean training example is nearest."""
    data: Any = asked.recipe(asked.arms[0], 0).data
    return 100 * nearest_mean(data.train.examples(), data.held_out.examples())


def _samples(asked: Study, found: Mapping[tuple[str, int], dict[str, Any]]) -> tuple[tuple[str, str, str], ...]:
    """(prompt, arm, text) of the first three questions, of the first seed."""
    assert asked.generate is not None
    prompts = [q.prompt for q in questions(asked.generate.data.pairs())[:3]]  # type: ignore[attr-defined]
    out = []
    for arm in asked.arms:
        texts = found[arm.name, asked.seeds[0]].get("texts", ["(it diverged)"] * len(prompts))
        out += [(prompt, arm.name, text) for prompt, text in zip(prompts, texts, strict=False)]
    return tuple(out)


def _given(recipe: str | Path | Mapping[str, Any]) -> str | Path | dict[str, Any]:
    return dict(recipe) if isinstance(recipe, Mapping) else recipe
