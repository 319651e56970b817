"""Studies: ways of training side by side, from one base recipe, over seeds, at one budget. Strict, and resumable."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dovetail.adapters import trainable
from dovetail.data import Pairs
from dovetail.data.labelled import nearest_mean
from dovetail.errors import DivergedError, DovetailError, SpecError
from dovetail.hub import load, load_tokenizer
from dovetail.hub.remote import resolve
from dovetail.report import clock, study_page
from dovetail.report.cost import machine, state_bytes, versions
from dovetail.report.lengths import Lengths, examine
from dovetail.report.ngram_rival import ngram_of_training
from dovetail.report.plain import plain
from dovetail.report.processes import processes
from dovetail.report.scores import generate_scores, nearest, questions, score
from dovetail.report.study_page import Curve, Found, Row
from dovetail.report.study_recipe import METRICS, Arm, Generate, Study, model_of, row_name, said_only, slug, with_kept
from dovetail.report.study_recipe import is_study as is_study
from dovetail.report.written import write
from dovetail.training import checkpoint
from dovetail.training.device import choose, peak_memory
from dovetail.training.flops import parameter_count
from dovetail.training.loop import Run
from dovetail.training.setup import set_up


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
    found them. A training that diverges is kept as that, and no order is claimed of its arm. only: names of the arms that
    are run, all unless given; those are reported, and with them every arm whose runs are kept. jobs: runs at a time, each
    in a process of its own, spread over the GPUs that are visible (rates are then not comparable, and left out).
    Raises SpecError for a recipe that does not fit or has no such arm, and whatever a run raises.
    """
    whole = recipe if isinstance(recipe, Study) else Study.load(_given(recipe), overrides)
    target = Path(out or whole.out)

    def place(arm: Arm, seed: int) -> Path:
        return target / "runs" / slug(arm.name) / str(seed)

    def kept(arm: Arm) -> bool:
        return all(_kept(place(arm, seed), _key(whole, arm, seed)) is not None for seed in whole.seeds)

    asked = with_kept(whole, only, kept)
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
    bar = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    keys = {(arm.name, seed): _key(asked, arm, seed) for arm, seed in runs}
    found = {run: before for run in places if (before := _kept(places[run], keys[run])) is not None}
    with Progress(*bar, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("runs", total=len(runs), completed=len(found))
        with processes(jobs) as pool:
            waiting = [(arm, seed) for arm, seed in reversed(runs) if (arm.name, seed) not in found]
            free = _gpus(jobs)
            going: dict[Future[dict[str, Any]], tuple[tuple[str, int], str | None]] = {}
            while waiting or going:
                while waiting and free:
                    arm, seed = waiting.pop()
                    run, gpu = (arm.name, seed), free.pop(0)
                    going[pool.submit(_run, asked, arm, seed, keys[run], places[run], gpu)] = run, gpu
                for done in wait(going, return_when=FIRST_COMPLETED).done:
                    run, gpu = going.pop(done)
                    free.append(gpu)
                    try:
                        found[run] = done.result()
                    except DovetailError:
                        pool.shutdown(cancel_futures=True)
                        raise
                    progress.update(task, advance=1, description="{}, seed {}".format(*run))
    more = {} if asked.lengths is None else _along(asked, asked.lengths, found)
    if asked.clock is not None:
        found = clock.timed(asked.clock, found, asked.seeds)
        more |= {"races": clock.curves(asked.clock, found, asked.seeds), "against": asked.clock.against}
        more |= {"smaller": more.get("smaller", study_page.SMALLER_IS_BETTER) | clock.SMALLER}
        more |= {"note": f"{more.get('note', '')} {clock.NOTE}".strip()}
    rows = [
        row for arm in asked.arms for row in _rows(asked, arm, [found[arm.name, seed] for seed in asked.seeds], jobs)
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
        device=machine(choose(str(asked.base.get("train", {}).get("device", "auto")))),
        versions=versions(),
        command=" ".join(["dovetail compare", source, *overrides, *said_only(asked.arms, whole.arms)]),
        seeds=asked.seeds,
        main=asked.claimed,
        titles=asked.titles,
        rows=tuple(row for row in rows if row.name not in asked.truncated),
        rival=rival,
        published=tuple(plain(table) | {"values": table.compared} for table in asked.published),
        samples=_samples(asked, places) if asked.generate is not None else (),
        recipe=plain(asked),
        out=str(target),
        **more,
    )
    write(result, study_page.page(result), target, quiet)
    return result


def _kept(folder: Path, key: str) -> dict[str, Any] | None:
    """What a run of this key found before."""
    kept = folder / "found.json"
    if not kept.is_file():
        return None
    before = json.loads(kept.read_text(encoding="utf-8"))
    return before if before.get("key") == key else None


def _gpus(jobs: int) -> list[str | None]:
    """The GPU of each of `jobs` runs at a time, in turn, as CUDA_VISIBLE_DEVICES says it; None where there is no choice."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = said.split(",") if said else [str(n) for n in range(torch.cuda.device_count())]
    return [names[n % len(names)] if len(names) > 1 else None for n in range(jobs)]


def _run(asked: Study, arm: Arm, seed: int, key: str, folder: Path, gpu: str | None) -> dict[str, Any]:
    """What one run finds: kept in `folder` under its key. In a process of its own, which then sees `gpu` alone.

    A training that was killed goes on from its last checkpoint, unless its seconds are compared.
    """
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    recipe = asked.recipe(arm, seed) if asked.trains else None
    begun = folder / "key"
    last = checkpoint.found(folder / "run") if begun.is_file() and begun.read_text() == key and not asked.clock else []
    if not last:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        begun.write_text(key)
    weights: Any = contextlib.nullcontext()
    if recipe is None:
        path = resolve(model_of(asked, arm))
        model, tokenizer = load(path, dtype=torch.float32, device=choose("auto")), load_tokenizer(path)
        size = sum(p.numel() for p in model.parameters())
        found: dict[str, Any] = {"key": key, "trainable": 0, "parameters": size, "metrics": {}}
    else:
        run = Run(set_up(recipe), folder / "run")
        size = {"key": key, "trainable": sum(p.numel() for p in trainable(run.model).values())}
        size |= {"parameters": parameter_count(run.model), "state_bytes": state_bytes(run.model, recipe.train.length)}
        if last:
            run.restore(last[-1])
        start = time.perf_counter()
        try:
            trained = run.train(progress=False)
        except DivergedError as error:
            return _keep(folder, size | {"peak_bytes": peak_memory(run.device), "metrics": {}, "diverged": error.what})
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
    shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "key").unlink()
    (folder / "found.json").write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def _key(asked: Study, arm: Arm, seed: int) -> str:
    """SHA-256 of all that a run depends on: what it does, and the weights and texts that it reads."""
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
    did = [model_of(asked, arm), seed] if recipe is None else recipe.to_dict()
    said = [_on(did), _on(plain(ask)), _on(plain(arm.variants)), texts, [_weights(f) for f in folders], versions()]
    said += [] if asked.clock is None else ["clock", machine(choose(recipe.train.device if recipe else "auto"))]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _on(said: Any) -> Any:
    """What is said without what is off: an option that did not exist when a run was made was off in it."""
    if isinstance(said, Mapping):
        return {name: _on(value) for name, value in said.items() if value is not None and value is not False}
    return [_on(one) for one in said] if isinstance(said, list | tuple) else said


def _weights(folder: str) -> list[str]:
    """SHA-256 of each file of weights, configuration and tokenizer in a model's folder."""
    out = []
    for path in sorted(p for p in resolve(folder).iterdir() if p.suffix in (".safetensors", ".json")):
        with path.open("rb") as file:
            out.append(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}")
    return out


def _rows(asked: Study, arm: Arm, found: list[dict[str, Any]], jobs: int) -> list[Row]:
    """The arm, and each of its variants. Metrics are of the runs that ended."""
    spent: dict[str, float] = {}
    diverged = tuple(seed for seed, run in zip(asked.seeds, found, strict=True) if "diverged" in run)
    if asked.trains:
        spent["peak_bytes"] = max(run["peak_bytes"] for run in found)
        spent |= {"state_bytes": found[0]["state_bytes"]} if found[0].get("state_bytes") else {}
        if jobs == 1 and not diverged and all("tokens_per_s" in run for run in found):
            spent["tokens_per_s"] = sum(run["tokens_per_s"] for run in found) / len(found)
            spent |= {"seconds": max(run["seconds"] for run in found)} if all("seconds" in run for run in found) else {}
    first = found[0]
    ended = [run for run in found if "diverged" not in run]
    variants = [run.get("variants", {"": {"metrics": {}}}) for run in ended]
    rows = []
    for name in ("", *(variant.name for variant in arm.variants)):
        several = [
            run[name]["metrics"] | ({} if name else main["metrics"]) for run, main in zip(variants, ended, strict=True)
        ]
        values = {metric: [one[metric] for one in several] for metric in (several[0] if several else ())}
        metrics = {metric: (sum(v) / len(v), max(v) - min(v)) for metric, v in values.items()}
        own = (0, first["parameters"], {}) if name else (first["trainable"], first["parameters"], spent)
        rows.append(Row(row_name(arm, name), metrics, *own, diverged, "" if name else arm.family))
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
            several = [run[name]["curve"] for run in runs]
            across = [(a + b - 1) / 2 for a, b, _ in several[0]]
            mine[row_name(arm, name)] = (
                across,
                [sum(v[2] for v in some) / len(runs) for some in zip(*several, strict=True)],
            )
        if len(asked.arms) > 1:
            curves.setdefault("every arm as it is", {})[arm.name] = mine[arm.name]
        if len(mine) > 1 or len(asked.arms) == 1:
            curves[arm.name] = mine
    return {"smaller": ask.smaller, "brief": ask.brief, "note": ask.note, "trained": ask.at[0], "curves": curves}


def _nearest(asked: Study, ask: Generate) -> dict[str, float]:
    """Scores of the trivial rival: the completion of the training prompt that shares most words with the question."""
    train: Any = asked.recipe(asked.arms[0], 0).data.train
    if not isinstance(train, Pairs):
        raise SpecError("the base trains on no pairs, and is asked for completions", where="base.data.train")
    wanted = questions(ask.data.pairs())[: ask.limit or None]  # type: ignore[attr-defined]
    scores = score(nearest(train.pairs(), [q.prompt for q in wanted]), [q.references for q in wanted])
    return {name: getattr(scores, name) for name in METRICS if hasattr(scores, name)}


def _nearest_mean(asked: Study) -> float:
    """Accuracy, in percent, of the trivial rival: the class whose mean training example is nearest."""
    data: Any = asked.recipe(asked.arms[0], 0).data
    if data.held_out is None:
        raise SpecError("classes are told apart, and nothing is held out to ask", where="base.data.held_out")
    return 100 * nearest_mean(data.train.examples(), data.held_out.examples())


def _samples(asked: Study, places: Mapping[tuple[str, int], Path]) -> tuple[tuple[str, str, str], ...]:
    """(prompt, arm, text) of the first three questions, of the first seed."""
    assert asked.generate is not None
    prompts = [q.prompt for q in questions(asked.generate.data.pairs())[:3]]  # type: ignore[attr-defined]
    out = []
    for arm in asked.arms:
        kept = json.loads((places[arm.name, asked.seeds[0]] / "found.json").read_text(encoding="utf-8"))
        texts = kept.get("texts", ["(it diverged)"] * len(prompts))
        out += [(prompt, arm.name, text) for prompt, text in zip(prompts, texts, strict=False)]
    return tuple(out)


def _given(recipe: str | Path | Mapping[str, Any]) -> str | Path | dict[str, Any]:
    return dict(recipe) if isinstance(recipe, Mapping) else recipe
