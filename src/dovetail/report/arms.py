"""Arms: one model had in several ways, each scored on the same questions; and when an order between two is claimed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dovetail.errors import DivergedError, SpecError, UserError
from dovetail.parts.weights import Linear
from dovetail.report import heal as healing
from dovetail.report.measure import Quality, divergence, in_dtype, layer_errors, quality, token_nats
from dovetail.report.recipe import Arm, tokens_of
from dovetail.spec import override
from dovetail.surgery import Move, Transplant, quantise, transplant

Stage = Literal["as it is", "healed"]
STAGES: tuple[Stage, ...] = ("as it is", "healed")
_KL_TOKENS = 4096
_LAYER_TOKENS = 1024  # the hidden states of all layers are held at once


@dataclass
class Trial:
    """What came of one arm. nats: for each stage, (rows, length) of each seed. models: of the first seed.
    measured: copies of them in the dtype that was computed in, or the same ones.

    transplant: None where nothing was swapped. random: stages whose result depends on the seed.
    """

    arm: Arm
    length: int
    see: int | None
    stride: int | None
    transplant: Transplant | None
    models: dict[Stage, Any] = field(default_factory=dict)
    measured: dict[Stage, Any] = field(default_factory=dict)
    nats: dict[Stage, list[Tensor]] = field(default_factory=dict)
    quality: dict[Stage, list[Quality]] = field(default_factory=dict)
    seeds: dict[Stage, tuple[int, ...]] = field(default_factory=dict)
    random: dict[Stage, bool] = field(default_factory=dict)

    @property
    def last(self) -> Stage:
        """The last stage that the arm went through."""
        return "healed" if "healed" in self.models else "as it is"

    def mean(self, stage: Stage) -> float:
        """nats/token, averaged over seeds."""
        return sum(q.nats for q in self.quality[stage]) / len(self.quality[stage])

    def spread(self, stage: Stage) -> float | None:
        """Largest less smallest nats/token over seeds; 0 where no seed matters, None where one was run and matters."""
        values = [q.nats for q in self.quality[stage]]
        if not self.random[stage]:
            return 0.0
        return max(values) - min(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Verdict:
    """How an arm stands to its rival. gap: rival's nats/token less the arm's, so above 0 the arm is better.

    spread: over seeds, the larger of the two arms'; None when it is not known. error: standard error of the gap over
    rows of text. outcome: claimed only where the gap exceeds twice both.
    """

    arm: str
    rival: str
    stage: Stage
    outcome: Literal["beats its trivial rival", "loses to its trivial rival", "unresolved"]
    gap: float
    spread: float | None
    error: float | None


def run(
    base: Any,
    arm: Arm,
    rows: Tensor,
    seeds: Sequence[int],
    *,
    stride: int | None = None,
    reference: Any = None,
    tell: Callable[[str], None] = lambda what: None,
) -> Trial:
    """Makes the arm from `base` and scores it on rows (R, length + 1); with heal, before and after it.

    stride: step of truncated windows. reference: a copy of `base` in the dtype to compute in, where that is not its
    own; then copies in that dtype are scored. tell: is told what begins. Raises SpecError for a truncation or redraw
    without effect.
    """
    context = getattr(base.spec, "context", None)
    see = None if arm.truncate is None else tokens_of(arm.truncate, context)
    if see is not None and see >= rows.shape[1] - 1:
        raise SpecError(
            f"truncating rows of {rows.shape[1] - 1} tokens to {see} changes nothing",
            where=f"arm {arm.name!r}",
            remedy="leave truncate out, or score at a longer length",
        )
    trial = Trial(arm, rows.shape[1] - 1, see, stride if see is not None else None, None)
    reference = base if reference is None else reference
    for seed in seeds:
        tell(f"{arm.name}" + (f", seed {seed}" if trial.random.get("as it is") or arm.heal else ""))
        model, done = _make(base, arm, seed)
        drawn = done is not None and bool(done.reinitialised)
        if seed == seeds[0] or drawn:
            trial.transplant = trial.transplant or done
            _score(trial, "as it is", model, _like(reference, base, model), reference, rows, seed, drawn)
        if arm.heal is not None:
            model = _healed(model, base, arm, seed)
            _score(trial, "healed", model, _like(reference, base, model), reference, rows, seed, True)
        elif not drawn:
            break
    return trial


def untested(base: Any, arm: Arm, length: int, seed: int, reference: Any) -> Trial:
    """The arm made (and healed) without a score, where there is nothing to score it on."""
    model, done = _make(base, arm, seed)
    trial = Trial(arm, length, None, None, done, {"as it is": model})
    if arm.heal is not None:
        trial.models["healed"] = _healed(model, base, arm, seed)
    trial.measured[trial.last] = _like(reference, base, trial.models[trial.last])
    return trial


def judge(arm: Trial, rival: Trial, stage: Stage) -> Verdict:
    """The order of two trials of the same questions. Raises UserError when they were asked different ones."""
    ours, theirs = arm.nats[stage], rival.nats[stage]
    if ours[0].shape != theirs[0].shape:
        raise UserError(f"{arm.arm.name!r} and {rival.arm.name!r} were scored on different rows")
    gap = rival.mean(stage) - arm.mean(stage)
    known = [t.spread(stage) for t in (arm, rival)]
    spread = None if None in known else max(s for s in known if s is not None)
    by_row = torch.stack([x.double().mean(1) for x in theirs]).mean(0) - torch.stack(
        [x.double().mean(1) for x in ours]
    ).mean(0)
    error = float(by_row.std()) / math.sqrt(len(by_row)) if len(by_row) > 1 else None
    outcome = "unresolved"
    if spread is not None and error is not None and abs(gap) > 2 * max(spread, error):
        outcome = "beats its trivial rival" if gap > 0 else "loses to its trivial rival"
    return Verdict(arm.arm.name, rival.arm.name, stage, outcome, gap, spread, error)  # type: ignore[arg-type]


def verdicts(trials: Sequence[Trial]) -> list[Verdict]:
    """Every arm against every rival that names it, stage by stage."""
    by_name = {trial.arm.name: trial for trial in trials}
    return [
        judge(by_name[other], trial, stage)
        for trial in trials
        for other in trial.arm.rival_of
        for stage in STAGES
        if stage in trial.nats and stage in by_name[other].nats
    ]


def _make(base: Any, arm: Arm, seed: int) -> tuple[Any, Transplant | None]:
    if not (arm.swap or arm.fresh or arm.storage):
        return base, None
    done = transplant(base, override(base.spec, arm.swap), seed=seed, fresh=arm.fresh, rival=arm.redraw)
    if arm.redraw and not done.reinitialised:
        raise SpecError(
            "redraw changes nothing: no weight map of this swap is approximate",
            where=f"arm {arm.name!r}",
            remedy="leave it out, or name what starts anew in fresh",
        )
    if arm.storage is not None:
        counts = {path: m.weight.numel() for path, m in done.model.named_modules() if isinstance(m, Linear)}
        errors = quantise(done.model, arm.storage)  # type: ignore[arg-type]
        how = f"kept as {arm.storage.kind}"
        done.moves += [Move(path, "approximate", how, counts[path], {"weight": e}) for path, e in errors.items()]
    return done.model, done


def _healed(model: Any, base: Any, arm: Arm, seed: int) -> Any:
    assert arm.heal is not None
    try:
        return healing.heal(model, arm.heal, seed, base)
    except DivergedError as error:  # which names a folder that is gone
        raise DivergedError(
            f"{error.what}, while healing",
            where=f"arm {arm.name!r}, seed {seed}",
            remedy="lower heal.train.lr, lengthen heal.train.warmup or look at the data",
        ) from None


def _like(reference: Any, base: Any, model: Any) -> Any:
    """`model` as it is measured: itself where `base` is, else a copy in the dtype of `reference`."""
    if reference is base or model is base:
        return model if reference is base else reference
    return in_dtype(model, next(reference.parameters()).dtype)


def _score(
    trial: Trial, stage: Stage, model: Any, measured: Any, reference: Any, rows: Tensor, seed: int, drawn: bool
) -> None:
    nats = token_nats(measured, rows, see=trial.see, stride=trial.stride)
    first = stage not in trial.nats
    kl, layers = None, None
    if first and measured is not reference:
        context = min(getattr(reference.spec, "context", None) or trial.length, trial.length)
        kl = divergence(measured, reference, rows[: max(1, _KL_TOKENS // context), :context])
        some = min(context, _LAYER_TOKENS)
        layers = layer_errors(measured, reference, rows[: _LAYER_TOKENS // some, :some])
    least = trial.length if trial.see is None else trial.see - (trial.stride or max(1, trial.see // 2)) + 1
    seen = (trial.length, trial.length) if trial.see is None else (least, trial.see)
    trial.nats.setdefault(stage, []).append(nats)
    trial.quality.setdefault(stage, []).append(quality(nats, context=seen, kl=kl, layers=layers))
    trial.seeds[stage] = (*trial.seeds.get(stage, ()), seed)
    trial.random[stage] = drawn
    if first:
        trial.models[stage], trial.measured[stage] = model, measured
