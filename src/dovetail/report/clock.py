"""Quality against the clock: held-out loss by seconds of training, and how soon an arm has the quality of another."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from dovetail.errors import RunError, SpecError
from dovetail.report import plots
from dovetail.training.recipe import Recipe, Section

INTERVALS = 5  # log lines with a rate, fewer of which tell no median
TITLES = {
    "seconds": "seconds of training",
    "reached": "seconds to the loss of the race's first arm",
    "speedup": "times as fast there",
}
SMALLER = frozenset({"seconds", "reached"})
NOTE = (
    "Seconds of training are steps at the median rate of the run's log: without evaluation, compiling and what the "
    "machine did besides; tokens/s is that rate, minutes are all of it. The first arm of a race says the loss that the "
    "others are to reach, its last held-out one with the same seed; between two evaluations a loss falls in a straight "
    "line. An arm that does not reach it with every seed has no time."
)
Curve = tuple[Sequence[float], Sequence[float]]  # seconds, nats/token


class Clock(Section):
    """races: arms by the name of their race. The first of each says the quality that the others are to reach, and is
    what they are ordered against. Runs must have the device to themselves: one job."""

    races: dict[str, Annotated[tuple[str, ...], Field(strict=False)]]

    @model_validator(mode="after")
    def _apart(self) -> Clock:
        named = [arm for race in self.races.values() for arm in race]
        twice = [arm for arm in named if named.count(arm) > 1]
        if twice or not named or min(map(len, self.races.values())) < 2:
            raise ValueError(f"arm {twice[0]!r} stands twice in races" if twice else "a race is of two arms or more")
        return self

    @property
    def against(self) -> dict[str, str]:
        """Each arm but the first of a race -> that first one."""
        return {arm: race[0] for race in self.races.values() for arm in race[1:]}

    def only(self, names: Collection[str]) -> Clock:
        """The races of these arms: of two or more, the first of the race, which says the quality, among them. Raises
        SpecError where none is left."""
        races = {name: tuple(arm for arm in race if arm in names) for name, race in self.races.items()}
        left = {name: race for name, race in races.items() if len(race) > 1 and race[0] == self.races[name][0]}
        if not left:
            near = [race for name, race in self.races.items() if races[name]] or list(self.races.values())
            first, *others = near[0]
            raise SpecError(
                f"no race is left of {', '.join(map(repr, names))}",
                where="clock",
                remedy=f"name the first arm of a race and another of it: {first!r} and {' or '.join(map(repr, others))}",
            )
        return self.model_copy(update={"races": left})

    def check(self, recipe: Recipe, arm: str) -> None:
        """Raises SpecError for a run that gives no curve, or no median of its rate."""
        train = recipe.train
        if recipe.data.held_out is None or not 0 < train.eval_every < train.steps:
            raise SpecError(
                "a clock reads the held-out loss in the course of training, and this run has none",
                where=f"arm {arm!r}",
                remedy="give data.held_out, and train.eval_every below train.steps",
            )
        if train.steps < INTERVALS * train.log_every:
            raise SpecError(
                f"{train.steps} steps with a rate every {train.log_every}: too few for a median",
                where=f"arm {arm!r}",
                remedy=f"set train.log_every to {max(1, train.steps // INTERVALS)} or less",
            )


def history(log: Path, steps: int, tokens: int) -> dict[str, Any]:
    """points: (step, held-out nats/token) of each evaluation; tokens_per_s: the median rate; seconds_per_step at that
    rate. log: log.jsonl of a run of so many steps and tokens. Raises RunError for a log without them."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    points = [(line["step"], line["held_out_nats"]) for line in lines if "held_out_nats" in line]
    rates = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]
    if not points or not rates:
        raise RunError("a log without evaluations, or without rates", where=str(log))
    rate = statistics.median(rates)
    return {"points": points, "tokens_per_s": rate, "seconds_per_step": tokens / steps / rate}


def curve(run: Mapping[str, Any]) -> Curve:
    """Of what `history` gave for a run."""
    past = run["clock"]
    return [step * past["seconds_per_step"] for step, _ in past["points"]], [nats for _, nats in past["points"]]


def reached(seconds: Sequence[float], nats: Sequence[float], goal: float) -> float | None:
    """When the loss is first `goal` or less: on the line between two evaluations; None if it never is."""
    for i, loss in enumerate(nats):
        if loss <= goal:
            if i == 0:
                return seconds[0]
            share = (nats[i - 1] - goal) / (nats[i - 1] - loss)
            return seconds[i - 1] + share * (seconds[i] - seconds[i - 1])
    return None


def timed(
    clock: Clock, found: Mapping[tuple[str, int], Mapping[str, Any]], seeds: Sequence[int]
) -> dict[tuple[str, int], dict[str, Any]]:
    """What each run of (arm, seed) found, with its times among the metrics and the median rate for its rate."""
    out = {key: dict(run) for key, run in found.items()}
    for key, run in out.items():
        if "clock" in run:
            whole = run["steps"] * run["clock"]["seconds_per_step"]
            run |= {"tokens_per_s": run["clock"]["tokens_per_s"], "metrics": run["metrics"] | {"seconds": whole}}
            out[key] = run
    for race in clock.races.values():
        if not all("clock" in out[race[0], seed] for seed in seeds):  # a first arm that diverged says no quality
            continue
        first = [curve(out[race[0], seed]) for seed in seeds]
        yard = [reached(*line, line[1][-1]) for line in first]
        for arm in race:
            runs = [out[arm, seed] for seed in seeds]
            if not all("clock" in run for run in runs):
                continue
            times = [reached(*curve(run), line[1][-1]) for run, line in zip(runs, first, strict=True)]
            for run, time, its in zip(runs, times, yard, strict=True):
                if time is not None and its is not None and None not in times:
                    run["metrics"] = run["metrics"] | {"reached": time, "speedup": its / time}
    return out


def curves(
    clock: Clock, found: Mapping[tuple[str, int], Mapping[str, Any]], seeds: Sequence[int]
) -> dict[str, dict[str, Curve]]:
    """A plot for each race: (seconds, nats/token) of its arms, means over the seeds that did not diverge."""
    out: dict[str, dict[str, Curve]] = {}
    for name, race in clock.races.items():
        out[name] = {}
        for arm in race:
            lines = [curve(found[arm, seed]) for seed in seeds if "clock" in found[arm, seed]]
            if lines:
                means = [
                    [sum(some) / len(lines) for some in zip(*side, strict=True)] for side in zip(*lines, strict=True)
                ]
                out[name][arm] = (means[0], means[1])
    return out


def section(races: Mapping[str, Mapping[str, Curve]]) -> str:
    """The races on a page."""
    out = ["<h2>Held-out loss against seconds of training</h2>"]
    for name, series in races.items():
        plot = plots.lines(series, x="seconds of training", y="nats/token", colours=plots.palette(series, {}))
        out.append(f"<h3>{escape(name)}</h3>{plot}")
    return "".join(out)
