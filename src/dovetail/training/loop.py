"""The loop: sums over micro-batches divided once, and nothing that makes the host wait for the device."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from dovetail import hub
from dovetail.adapters import adapters, save_adapter, trainable
from dovetail.adapters.files import check_room
from dovetail.adapters.many import after_backward, before_step, penalty, reads_gradients
from dovetail.data import Batches, Sampler
from dovetail.data.rows import real_tokens
from dovetail.errors import CheckpointError, ConfigError, DataError, DivergedError, SpecError, StoppedError
from dovetail.hub.atomic import recover
from dovetail.hub.files import CONFIGS
from dovetail.kernels import twins
from dovetail.training import checkpoint
from dovetail.training.alone import alone_in
from dovetail.training.device import autocast, compiled, peak_memory, peak_rate, precision
from dovetail.training.flops import flops_per_token, parameter_count
from dovetail.training.graphed import Graphed, Take
from dovetail.training.meters import Bar, Log, Rate
from dovetail.training.optim import Average, adamw, set_rate, update
from dovetail.training.recipe import Recipe, Train
from dovetail.training.resume import check_same, fixed, made_from
from dovetail.training.room import every, spoken
from dovetail.training.schedules import factor
from dovetail.training.scores import evaluate
from dovetail.training.setup import Parts, copy_tokenizer, set_up, with_helpers
from dovetail.training.stopping import sigterm_awaited


@dataclass(frozen=True)
class Result:
    """How a run ended. loss: of the last step. held_out: {nats, perplexity, accuracy, tokens} or None.

    tokens_per_s and mfu leave evaluation and saving out. text_sha256: of the corpora trained and measured on.
    """

    out: str
    steps: int
    parameters: int
    trainable: int
    tokens: int
    loss: float
    held_out: dict[str, float] | None
    tokens_per_s: float
    mfu: float
    mfu_against: str
    peak_bytes: int
    autocast: str
    device: str
    text_sha256: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit(
    source: str | Path | dict[str, Any] | Recipe,
    overrides: list[str] | tuple[str, ...] = (),
    *,
    resume: bool = False,
    progress: bool = True,
) -> Result:
    """Trains by a recipe and leaves a loadable model in `out`.

    source: a YAML file, plain data or a Recipe; overrides: `train.steps=40`. resume goes on from the last checkpoint
    in `out` (from the start when there is none), bitwise as if never interrupted on one device.
    Raises UserErrors for what the recipe asks and where another run is at work in `out`, DivergedError for losses,
    weights or scores that are not finite, RunError for disks that are full, StoppedError after a SIGTERM, with a
    checkpoint written (in the first step, which may be compiling, it ends the process).
    """
    recipe = Recipe.load(source, overrides)
    if not recipe.out:
        raise SpecError("the recipe names no folder to write", where="out", remedy="give out=runs/NAME")
    out = Path(recipe.out)
    if isinstance(recipe.model, str) and Path(recipe.model).resolve() == out.resolve():
        raise SpecError(
            "the trained model would be written over the one that it starts from",
            where=f"out: {out}",
            remedy="choose another out",
        )
    recover(out)
    with alone_in(out):
        last = checkpoint.found(out)
        if last and not resume:
            raise SpecError(
                "this folder holds a run already", where=str(out), remedy="go on with --resume, or choose another out"
            )
        stands = [name for name in CONFIGS if (out / name).exists()]
        if stands and not (out / "recipe.yaml").exists():
            raise SpecError(
                f"{stands[0]} stands in this folder, which no training wrote, and would be replaced",
                where=str(out),
                remedy="choose another out",
            )
        if recipe.adapter is not None:
            check_room(out)
        with twins.plain() if recipe.train.plain else nullcontext():
            run = Run(set_up(recipe), out)
            if last:
                run.restore(last[-1])
            return run.train(progress)


class Run:
    """One training: its parts, its optimiser, and where it stands (`step` steps are done)."""

    def __init__(self, parts: Parts, out: Path):
        recipe = parts.recipe
        self.parts, self.out, self.recipe, self.options = parts, out, recipe, recipe.train
        self.device, self.model = parts.device, parts.model
        self.objective = with_helpers(parts)
        t = self.options
        if self.objective.scope == "batch" and t.accumulate > 1:
            raise SpecError(
                f"{self.objective.kind} depends on the whole batch and cannot be accumulated",
                where="train.accumulate",
                remedy="set it to 1 and raise train.batch",
            )
        self.precision = precision(t.autocast, self.device)
        rows = parts.rows(parts.train)
        self.batches = Batches(
            rows, Sampler(len(rows), t.seed), t.batch, pin=self.device.type == "cuda", length=self._length
        )
        self.lr: float = t.lr or (recipe.adapter.rate(self.model.spec.dim) if recipe.adapter else 1e-3)  # type: ignore[attr-defined]
        self.optimizer = adamw(
            self.model, lr=self.lr, betas=t.betas, eps=t.eps, weight_decay=t.weight_decay, rates=t.rates
        )
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.read_after = reads_gradients(self.model)
        self.average = Average(trainable(self.model).items(), t.ema) if t.ema else None
        self.compiled = compiled(self.model, every(self.model) > 0) if t.compile else self.model
        self.stepped: list[Any] = [
            m for m in self.model.modules() if hasattr(m, "at_step")
        ]  # go by the step (performer)
        self.take: Take = self._take
        if t.graph is True and self.device.type != "cuda":
            raise SpecError("no CUDA graphs on this device", where="train.graph", remedy='set it to false or "auto"')
        if t.graph and self.device.type == "cuda":
            self.take = Graphed(self._take, self.optimizer, self.device)
        self.step, self.tokens, self.loss = 0, 0, math.nan

    @property
    def _length(self) -> int | None:
        """What every row is padded to: compiled code and graphs have one shape."""
        return self.options.length if self.options.compile or self.options.graph else None

    def restore(self, folder: Path) -> None:
        """Goes on from a checkpoint. Raises SpecError when it was written by another recipe, or of other things."""
        state = checkpoint.read_state(folder)
        check_same(state, self.recipe, self.made_from, folder)
        checkpoint.restore(folder, self.model, self.optimizer, self.average)
        self.batches.sampler.load(state["sampler"])
        self.step, self.tokens, self.loss = state["step"], state["tokens"], state["loss"]
        self.precision = state["autocast"]

    @cached_property
    def made_from(self) -> dict[str, Any]:
        return made_from(self.parts)

    def save(self) -> Path:
        """Writes a checkpoint. Raises DivergedError for weights that are not finite: they would cost an intact one."""
        largest = torch._foreach_norm([p.detach() for p in self.parameters if p.numel()], math.inf)  # type: ignore[arg-type]
        if not torch.stack([one.float() for one in largest]).isfinite().all():
            raise self._diverged(f"the weights are not finite after step {self.step}")
        state = {
            "recipe": fixed(self.recipe),
            "made_from": self.made_from,
            "sampler": self.batches.sampler.state(),
            "tokens": self.tokens,
            "loss": self.loss,
            "autocast": self.precision,
            "versions": {"torch": torch.__version__},
        }
        return checkpoint.save(self.out, self.step, self.model, self.optimizer, self.average, state, self.options.keep)

    def train(self, progress: bool = True) -> Result:
        t = self.options
        self.out.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(self.recipe, self.out)
        (self.out / "recipe.yaml").write_text(
            yaml.safe_dump(self.recipe.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
        _ = self.made_from  # what was read is hashed before it can change
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        peak, against = peak_rate(self.device, dtype)
        rate = Rate(flops_per_token(self.model, t.length, train=True, asked=self.objective.asked), peak)
        log, bar = Log(self.out, self.step), Bar(self.step, t.steps, progress)
        if t.checkpointing == "auto":
            bar.say(f"blocks made again in the backward, to fit: {spoken(every(self.model))}")
        if t.warmup > t.steps:  # as when a recipe is tried for a few steps
            bar.say(f"train.warmup is {t.warmup}: of {t.steps} steps none has the full rate")
        pending: list[tuple[int, Tensor, Tensor]] = []
        last: dict[str, Any] = {}
        held_out = None
        try:
            self.model.train()
            # A run that is resumed may have died between a save and the evaluation after it.
            missed = log.scored < self.step and _due(self.step, t.eval_every, t.steps)
            if self.parts.held_out is not None and (missed or self.step == t.steps):
                held_out = self._score(log, bar)
                rate.restart()
            with ExitStack() as awaited:
                told: Callable[[], bool] | None = None
                while self.step < t.steps:
                    due = {n: _due(self.step + 1, getattr(t, f"{n}_every"), t.steps) for n in ("log", "save", "eval")}
                    loss, norm, tokens = self.one_step()
                    self.step += 1
                    if told is None:  # the first step compiles, for minutes if it must, and has nothing to save before
                        told = awaited.enter_context(sigterm_awaited())
                    self.tokens += tokens
                    rate.add(tokens)
                    pending.append((self.step, loss, norm))
                    if self.device.type == "cpu" or any(due.values()):
                        last = self._read(pending) | {"lr": self.lr * _rate(t, self.step - 1)}
                        self.loss = last["loss"]
                    bar.advance()
                    if due["log"]:
                        last |= rate.take() | {"peak_bytes": peak_memory(self.device), "tokens": self.tokens}
                        log.write(self.step, last)
                        bar.show(self.step, last)
                    if due["save"]:  # first: what is scored next may go wrong
                        self.save()
                        rate.restart()
                    if due["eval"] and self.parts.held_out is not None:
                        held_out = self._score(log, bar)
                        rate.restart()
                    if told() and self.step < t.steps:
                        self._stop(pending)
            self._export()
        finally:
            log.close()
            bar.close()
        speed = rate.total / rate.seconds if rate.seconds else 0.0
        measured = {"train": self.parts.train} | ({"held_out": self.parts.held_out} if self.parts.held_out else {})
        result = Result(
            out=str(self.out),
            steps=self.step,
            parameters=parameter_count(self.model),
            trainable=sum(p.numel() for p in trainable(self.model).values()),
            tokens=self.tokens,
            loss=self.loss,
            held_out=held_out,
            tokens_per_s=speed,
            mfu=speed * rate.flops / peak,
            mfu_against=against,
            peak_bytes=peak_memory(self.device),
            autocast=self.precision,
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            text_sha256={name: tokens.meta["text_sha256"] for name, tokens in measured.items()},
        )
        (self.out / "result.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
        return result

    def _stop(self, pending: list[tuple[int, Tensor, Tensor]]) -> None:
        if pending:
            self.loss = self._read(pending)["loss"]
        raise StoppedError(
            f"told to stop after step {self.step} of {self.options.steps}",
            where=str(self.save()),
            remedy="go on with --resume",
        )

    def one_step(self) -> tuple[Tensor, Tensor, int]:
        """One optimiser step: (loss, gradient norm, tokens), the first two still on the device."""
        t = self.options
        set_rate(self.optimizer, _rate(t, self.step))
        micro = [self.batches.next() for _ in range(t.accumulate)]
        counts: dict[str, int] = {}
        for batch in micro:
            for name, count in self.objective.counts(batch).items():
                counts[name] = counts.get(name, 0) + count
        if not all(counts.values()):
            raise DataError(
                f"step {self.step + 1} has no label to learn from", remedy="look at the data with `dovetail preflight`"
            )
        before_step(self.model, self.step + 1, t.steps)
        for part in self.stepped:
            part.at_step(self.step)
        loss, norm = self.take(micro, counts)
        return loss, norm, sum(real_tokens(batch) for batch in micro)

    def _take(self, micro: list[dict[str, Tensor]], counts: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What a step does on the device: (loss, gradient norm)."""
        loss = torch.zeros((), device=self.device)
        for batch in micro:
            batch = {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}
            with autocast(self.precision, self.device):
                share = self.objective(self.compiled, batch).total(counts)
            share.backward()
            loss += share.detach()
        extra = penalty(self.model)
        if extra is not None:
            extra.backward()
        norm = update(self.optimizer, self.parameters, self.options.clip, self.read_after)
        after_backward(self.model, self.step + 1, self.options.steps)
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        return loss, norm

    def _score(self, log: Log, bar: Bar) -> dict[str, float]:
        """`evaluate`, shown, and logged where it is not yet."""
        held_out = self.evaluate()
        if log.scored < self.step:
            log.write(self.step, {f"held_out_{name}": value for name, value in held_out.items()})
        bar.say(f"step {self.step}  held-out {held_out['nats']:.4f} nats, {held_out['accuracy']:.2%} right")
        return held_out

    def evaluate(self) -> dict[str, float]:
        """Held-out scores of the model that will be exported, which leave random numbers as they were.

        Raises DivergedError where they are not finite.
        """
        assert self.parts.held_out is not None
        t = self.options
        rows = self.parts.rows(self.parts.held_out)
        how: Any = {"batch": t.batch, "limit": t.eval_batches, "precision": self.precision}
        # Not compiled: a graph for a few batches takes longer than they do.
        with checkpoint.same_random(), self.exported() as model:
            found = evaluate(model, self.objective, rows, **how)
        if not math.isfinite(found["nats"]):
            raise self._diverged(f"the held-out score is {found['nats']} nats after step {self.step}")
        return found

    @contextmanager
    def exported(self) -> Iterator[Any]:
        """Inside, the model is as it is exported: with the averaged weights with EMA, and the first draw of what is
        drawn anew by the step (which the next step sets again), as a model that is loaded has it."""
        for part in self.stepped:
            part.at_step(0)
        if self.average is not None:
            self.average.swap()
        try:
            yield self.model
        finally:
            if self.average is not None:
                self.average.swap()

    def _read(self, pending: list[tuple[int, Tensor, Tensor]]) -> dict[str, float]:
        """The newest loss and norm; raises DivergedError naming the first step whose numbers are not finite."""
        values = torch.stack([torch.stack([loss, norm.to(loss)]) for _, loss, norm in pending]).tolist()
        for (step, _, _), (loss, norm) in zip(pending, values, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
                raise self._diverged(f"{what} at step {step}")
        pending.clear()
        return {"loss": values[-1][0], "grad_norm": values[-1][1]}

    def _diverged(self, what: str) -> DivergedError:
        kept = checkpoint.found(self.out)
        return DivergedError(
            what,
            where=str(self.out),
            remedy="lower train.lr, lengthen train.warmup or look at the data; "
            + (f"{kept[-1].name} is intact" if kept else "no checkpoint was written yet"),
        )

    def _export(self) -> None:
        """The trained model into `out`: the published layout where one can say it, else Dovetail's own."""
        self.model.eval()
        with self.exported() as model:
            try:
                if adapters(model):
                    _save_adapter(model, self.out)
                else:
                    hub.save(model, self.out, format="hf", tokenizer_from=self.out)
            except (ConfigError, CheckpointError):
                hub.save(model, self.out, format="dovetail", tokenizer_from=self.out)


def _save_adapter(model: Any, out: Path) -> None:
    """The adapter alone, in PEFT's layout where that can say it."""
    try:
        save_adapter(model, out, name="default")
    except ConfigError:
        save_adapter(model, out, name="default", format="dovetail")


def _rate(t: Train, step: int) -> float:
    return factor(t.schedule, step, t.steps, warmup=t.warmup, decay=t.decay, final=t.final)


def _due(step: int, every: int, steps: int) -> bool:
    return step == steps or bool(every and step % every == 0)
