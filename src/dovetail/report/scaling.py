"""Scaling: what a part costs against length. Nothing is trained to any end; time, memory and state are measured.

Arms are changes of one model. Each is measured in a process of its own, so that what it takes is its own, and at every
length: a forward, a training step (forward, loss, backward, AdamW), and tokens decoded behind a context.
"""

from __future__ import annotations

import datetime
import gc
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn import functional as F

from dovetail.errors import BuildError, RunError, SpecError, did_you_mean
from dovetail.models.build import build
from dovetail.report import scaling_page
from dovetail.report.cost import machine, peak, state_bytes, versions
from dovetail.report.plain import plain
from dovetail.report.processes import processes
from dovetail.report.scaling_page import DECODE, FORWARD, STEP, Cell, Measured, Scaled
from dovetail.report.study_recipe import chosen, override_of, said_only, slug, with_kept
from dovetail.report.written import keep, kept, write
from dovetail.spec import Spec
from dovetail.spec.spec import validate
from dovetail.training.device import autocast, choose, compiled, precision
from dovetail.training.optim import adamw
from dovetail.training.recipe import Section, overridden, read_yaml

_LEAST, _ENOUGH = 3, 20.0  # timings of a cell that always are, and seconds after which no more are
_TOKENS = 8  # decoded in one timing


class Arm(Section):
    """One part. change: overrides of the model by path, such as `blocks.mixer: {kind: linear}`. slope: what time should
    rise by, as a power of the length (1: linear); said to hold where it is found within 10%."""

    name: str
    change: dict[str, Any] = {}
    slope: float | None = Field(default=None, gt=0)


class Published(Section):
    """Speeds in print, as multiples of that of the arm `against`: arm -> length -> ratio. source: paper and table."""

    source: str
    against: str
    values: dict[str, dict[int, float]] = Field(min_length=1)


class Scaling(Section):
    """name: of the report. model: the base's spec. at: lengths of forwards and training steps, rising; decode_at: contexts
    behind which tokens are decoded, batch 1 and eager.

    batch_tokens: tokens of a call, in as many rows as it takes (the last length must fit); one row unless given. dtype:
    of the weights in forwards and decoding; a training step has fp32 weights and, with bfloat16, autocast. "auto" is
    bfloat16 where the device computes it faster. repeat: timings, of which the median counts, after two calls that do
    not; no fewer than 3, and no more than those once they took 20 s. compile: forwards and training steps under
    torch.compile. seconds: no length of an arm begins after these. octaves: the slope is of so many, the longest.
    """

    name: str
    model: dict[str, Any]
    arms: tuple[Arm, ...] = Field(min_length=1)
    at: tuple[int, ...] = Field(min_length=2)
    decode_at: tuple[int, ...] = ()
    batch_tokens: int | None = Field(default=None, ge=1)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    compile: bool = False
    repeat: int = Field(default=7, ge=_LEAST)
    seconds: float = Field(default=300.0, gt=0)
    octaves: int = Field(default=2, ge=1)
    published: Published | None = None
    out: str = "report"

    @model_validator(mode="after")
    def _consistent(self) -> Scaling:
        for name in ("at", "decode_at"):
            lengths = getattr(self, name)
            if any(a >= b for a, b in pairwise(lengths)) or (lengths and lengths[0] < 2):
                raise ValueError(f"{name} is {list(lengths)}; give lengths that rise, from 2 on")
        if self.batch_tokens is not None and self.batch_tokens < self.at[-1]:
            raise ValueError(f"batch_tokens {self.batch_tokens} hold no row of {self.at[-1]}")
        names = [arm.name for arm in self.arms]
        twice = [name for name in names if names.count(name) > 1]
        slugs = [slug(name) for name in names]
        if twice or len(set(slugs)) < len(names):
            what = f"two arms are called {twice[0]!r}" if twice else "two names of arms differ only in signs"
            raise ValueError(f"{what}; each has a folder of its own")
        if not all(slugs):
            raise ValueError(f"no folder can be called {names[slugs.index('')]!r}: give a letter or a digit")
        if self.published is not None:
            for name in (self.published.against, *self.published.values):
                if name not in names:
                    raise ValueError(f"published names {name!r}, which is no arm; {did_you_mean(name, names)}")
            if not {n for ratios in self.published.values.values() for n in ratios} & set(self.at):
                raise ValueError("published speaks of no length in at")
        return self

    def only(self, names: Sequence[str]) -> Scaling:
        """These arms alone, all where none is named, with what is in print of them, if of the one it is in multiples of.
        Raises SpecError for a name that no arm has."""
        if not names:
            return self
        kept, printed = chosen(names, [arm.name for arm in self.arms]), self.published
        values = {} if printed is None else {name: told for name, told in printed.values.items() if name in kept}
        if printed is not None:
            printed = printed.model_copy(update={"values": values}) if values and printed.against in kept else None
        arms = tuple(arm for arm in self.arms if arm.name in kept)
        return self.model_copy(update={"arms": arms, "published": printed})

    def spec(self, arm: Arm) -> Spec:
        """The model of an arm. Raises SpecError naming the arm."""
        said = [override_of(path, value) for path, value in arm.change.items()]
        where = f"arm {arm.name!r}"
        try:
            steps = [path.split(".")[0] for path in arm.change]
            return Spec.parse("model", overridden(self.model, said, [*self.model, *steps], "recipes/length.yaml"))
        except SpecError as error:
            inner = f": {error.where}" if error.where else ""
            raise SpecError(error.what, where=where + inner, remedy=error.remedy) from None

    @staticmethod
    def load(source: str | Path | dict[str, Any], overrides: Iterable[str] = ()) -> Scaling:
        """From a YAML file or plain data, with `key.key=value` overrides. Raises SpecError, and BuildError for an arm
        that cannot be built: all are, without weights."""
        where = str(source) if isinstance(source, (str, Path)) else "recipe"
        fields = overridden(source, overrides, Scaling.model_fields, "recipes/length.yaml")
        for name in ("at", "decode_at"):
            if isinstance(fields.get(name), list):
                fields[name] = tuple(fields[name])
        if isinstance(fields.get("arms"), list):
            said = enumerate(fields["arms"])
            fields["arms"] = tuple(validate(Arm, one, where=f"{where}: arms.{i}") for i, one in said)
        if isinstance(fields.get("published"), dict):
            fields["published"] = validate(Published, fields["published"], where=f"{where}: published")
        asked = validate(Scaling, fields, where=where)
        for arm in asked.arms:
            try:
                build(asked.spec(arm), weights=False)
            except BuildError as error:
                raise BuildError(error.what, where=f"arm {arm.name!r}: {error.where}", remedy=error.remedy) from None
        return asked


def is_scaling(recipe: Path) -> bool:
    """Whether a recipe asks what parts cost against length: it has `at`. Raises SpecError for a file that cannot be read."""
    data = read_yaml(recipe)
    return isinstance(data, dict) and "at" in data


def scaling(
    recipe: str | Path | Mapping[str, Any] | Scaling,
    out: str | Path | None = None,
    overrides: Iterable[str] = (),
    *,
    only: Sequence[str] = (),
    quiet: bool = False,
) -> Scaled:
    """Measures every arm at every length, and writes index.html and report.json into `out`.

    Every cell is kept under out/runs as soon as it was measured, and not measured again while recipe, device and versions
    are the same (a kernel that was changed is no other version: remove its arm's folder). What does not fit into memory
    is said so, and longer lengths of it are left out. only: names of the arms that are measured, all unless given; those
    are reported, and with them every arm that was measured to its end. Raises SpecError and BuildError for a recipe that does not fit or has no such arm, and RunError, once every other
    arm was measured, for an arm that failed in another way.
    """
    given = dict(recipe) if isinstance(recipe, Mapping) else recipe
    whole = given if isinstance(given, Scaling) else Scaling.load(given, overrides)
    source = str(recipe) if isinstance(recipe, (str, Path)) else "RECIPE"
    target, console = Path(out or whole.out), Console(stderr=True, quiet=quiet)
    bar = (TextColumn("{task.description}", markup=False), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    where, failed = machine(choose(whole.device)), {}

    def file(arm: Arm) -> Path:
        return target / "runs" / slug(arm.name) / "found.json"

    def ended(arm: Arm) -> bool:
        return bool((kept(file(arm), _key(whole, arm, where)) or {}).get("ended"))

    asked = with_kept(whole, only, ended)
    with Progress(*bar, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("arms", total=len(asked.arms))
        for arm in asked.arms:
            progress.update(task, description=arm.name)
            if not ended(arm) and (error := _apart(asked, arm, _key(asked, arm, where), file(arm))) is not None:
                failed[arm.name] = error
            progress.advance(task)
    if failed:
        name, error = next(iter(failed.items()))
        raise RunError(
            f"{len(failed)} of {len(asked.arms)} arms failed, first {name!r}: {error}",
            where=str(target / "runs"),
            remedy="mend or remove them and run the command again: what was measured is kept",
        )
    result = Scaled(
        name=asked.name,
        date=datetime.date.today().isoformat(),
        device=where,
        versions=versions(),
        command=" ".join(["dovetail compare", source, *overrides, *said_only(asked.arms, whole.arms)]),
        arms=tuple(_arm(asked, arm, file(arm)) for arm in asked.arms),
        recipe=plain(asked),
    )
    write(result, scaling_page.page(result), target, quiet)
    return result


def _arm(asked: Scaling, arm: Arm, path: Path) -> Measured:
    found = json.loads(path.read_text(encoding="utf-8"))
    cells = tuple(Cell(**cell) for cell in found["cells"])
    return Measured(arm.name, found["parameters"], arm.slope, asked.octaves, found["plans"], cells)


def _key(asked: Scaling, arm: Arm, where: str) -> str:
    """SHA-256 of all that the cells of an arm depend on, but for the code."""
    free = {"name", "model", "arms", "octaves", "published", "out"}
    rest = {name: value for name, value in plain(asked).items() if name not in free}
    said = [asked.spec(arm).to_dict(), rest, where, versions()]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _apart(asked: Scaling, arm: Arm, key: str, path: Path) -> str | None:
    """Measures an arm in a process of its own; what went wrong with it, where something did."""
    for _ in range(len(asked.at) * 2 + len(asked.decode_at) + 1):  # a process that is killed loses one cell
        with processes() as pool:
            try:
                pool.submit(_measure, asked, arm, key, path).result()
                return None
            except BrokenProcessPool:
                found = kept(path, key)
                if found is None or not found.get("trying"):
                    return "its process ended before it measured anything"
                killed = Cell(*found.pop("trying"), why="the process was killed, as systems short of memory do")
                keep(path, found | {"cells": [*found["cells"], asdict(killed)]})
            except Exception as error:  # whatever it is, the other arms are measured before it is raised
                return f"{type(error).__name__}: {error}"
    return "its process was killed again and again"


def _measure(asked: Scaling, arm: Arm, key: str, path: Path) -> None:
    """All cells of an arm that `path` does not hold yet, each written as it is found."""
    device, begin = choose(asked.device), time.monotonic()
    narrow = (precision("auto", device) if asked.dtype == "auto" else asked.dtype) in ("bf16", "bfloat16")
    model = build(asked.spec(arm), device=device)
    found = kept(path, key) or {
        "key": key,
        "parameters": sum(p.numel() for p in model.parameters()),
        "plans": _plans(model, device.type, asked.at[-1]),
        "cells": [],
    }
    found.pop("trying", None)
    before = {(cell["what"], cell["length"]): Cell(**cell) for cell in found["cells"]}
    for what, lengths in ((STEP, asked.at), (FORWARD, asked.at), (DECODE, asked.decode_at)):
        if what == FORWARD:
            model = model.eval().to(torch.bfloat16 if narrow else torch.float32)
        ended = ""
        for length in lengths:
            cell = before.get((what, length))
            if cell is None:
                rows = 1 if what == DECODE or asked.batch_tokens is None else asked.batch_tokens // length
                late = time.monotonic() - begin > asked.seconds
                ended = ended or (f"the limit of {asked.seconds:g} s an arm was reached" if late else "")
                keep(path, found | {"trying": [what, length, rows]})
                cell = Cell(what, length, rows, why=ended) if ended else _cell(asked, model, narrow, what, length, rows)
                found["cells"].append(asdict(cell))
                keep(path, found)
            ended = ended or (f"left out: at {length}, {cell.why}" if cell.why else "")
    keep(path, found | {"ended": True})


def _cell(asked: Scaling, model: Any, narrow: bool, what: str, length: int, rows: int) -> Cell:
    """One measurement; where memory does not suffice, a cell that says so."""
    vocab, device = model.spec.vocab, next(model.parameters()).device
    if asked.compile or device.type == "cuda":  # FlexAttention is compiled in any case
        torch.compiler.reset()  # a graph for each length: the number of those that one function may have is limited
    tokens = torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    kind = {FORWARD: _forward, STEP: _step, DECODE: _decode}[what]
    try:
        run, calls, held = kind(asked, model, tokens, narrow)
        times, memory = timed(run, device, asked.repeat)
        middle = statistics.median(times) / calls
        spread = (max(times) - min(times)) / calls
        return Cell(what, length, rows, middle, spread, memory if held is None else held)
    except BuildError as error:
        if what != DECODE:
            raise
        why = error.what
    except (RuntimeError, MemoryError) as error:
        if not _memory_ran_out(error):
            raise
        why = "out of memory"
    # Here the error, and with it the tensors that its frames held, is gone.
    model.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Cell(what, length, rows, why=why)


Run = tuple[Callable[[], object], int, int | None]  # what is timed, what its time is divided by, bytes if known


def _forward(asked: Scaling, model: Any, tokens: Tensor, narrow: bool) -> Run:
    """Logits of every token, without gradients."""
    run = compiled(model) if asked.compile else model
    return torch.no_grad()(lambda: run(tokens).logits), 1, None


def _step(asked: Scaling, model: Any, tokens: Tensor, narrow: bool) -> Run:
    """Every token is asked for itself: which one it is asked for changes no cost."""
    run = compiled(model.train()) if asked.compile else model.train()
    optimizer = adamw(model, lr=1e-6, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    def step() -> None:
        with autocast("bf16" if narrow else "none", tokens.device):
            logits = run(tokens).logits
        F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, 1, None


def _decode(asked: Scaling, model: Any, tokens: Tensor, narrow: bool) -> Run:
    """One token after another behind `tokens`, greedy, eager. Raises BuildError for a model that keeps no state."""
    held, token = state_bytes(model, tokens.shape[1]), tokens[:, -1:]
    state = model.new_state(1, tokens.shape[1] + (2 + asked.repeat) * _TOKENS)
    with torch.no_grad():
        model(tokens, state=state, logits=False)

    @torch.no_grad()
    def some() -> None:
        nonlocal token
        for _ in range(_TOKENS):
            token = model(token, state=state).logits.argmax(-1)

    return some, _TOKENS, held


def timed(run: Callable[[], object], device: torch.device, repeat: int) -> tuple[list[float], int | None]:
    """(seconds of each of `repeat` calls, peak bytes of one above what was there before), after two that are not timed."""
    run()  # compiles, and allocates what is kept
    memory = peak(run, device)
    times: list[float] = []
    while len(times) < repeat and (len(times) < _LEAST or sum(times) < _ENOUGH):
        times.append(_seconds(run, device))
    return times, memory.bytes


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _memory_ran_out(error: BaseException) -> bool:
    said = str(error)
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in said or "ALLOC_FAILED" in said


def _plans(model: Any, device: str, length: int) -> dict[str, str]:
    """use -> kernel and why, of the first mixer that has a plan."""
    for name, module in model.named_modules():
        if "mixer" in name.split(".") and hasattr(module, "plans"):
            return {use: f"{p.path}: {p.why}" for use, p in module.plans(device, length).items()}  # type: ignore[operator]
    return {}
