"""What a swap and a comparison found: plain data, JSON, and how it reads in a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dovetail.report.arms import Stage, Verdict
from dovetail.report.cost import Cost
from dovetail.report.measure import Bucket, Layers, Quality
from dovetail.report.ngram_rival import NGramResult
from dovetail.report.plain import plain
from dovetail.report.render import (
    as_text,
    bounded,
    computed,
    grid,
    growth,
    layer_cells,
    left_out,
    merged,
    outcome_lines,
    rate,
    said,
    si,
    verdict_lines,
)
from dovetail.surgery import Move


@dataclass(frozen=True)
class Column:
    """One way of having the model. name: "before", "after", "rival", "after, healed", "rival, healed".

    quality: None where nothing was given to measure on; otherwise of the first seed. nats: mean over seeds,
    nats/token. see: tokens that it is shown at a time, where truncated.
    """

    name: str
    what: str
    cost: Cost
    quality: Quality | None
    nats: float | None
    see: int | None = None

    @property
    def layers(self) -> Layers | None:
        """Hidden states against the model as it was; None where they were not measured."""
        return None if self.quality is None else self.quality.layers


@dataclass(frozen=True)
class Report:
    """What a swap changed. diff: (path, old, new) of the spec. moves: what happened to each part's weights.

    carried, reinitialised, dropped: parameter names (dropped ones are the old model's). rival: what the trivial
    alternative is, or why there is none. verdicts: after against it. length: tokens in a scored row; rows: how many.
    computed_in: dtype of the copies that were scored and timed; bytes of weights and state are in their own (cost.size).
    """

    diff: tuple[tuple[str, Any, Any], ...]
    moves: tuple[Move, ...]
    carried: tuple[str, ...]
    reinitialised: tuple[str, ...]
    dropped: tuple[str, ...]
    columns: tuple[Column, ...]
    rival: str
    verdicts: tuple[Verdict, ...]
    length: int
    rows: int
    tokens_sha256: str | None
    device: str
    computed_in: str
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return plain(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def __rich__(self) -> Any:
        return _swapped(self)

    def __str__(self) -> str:
        return as_text(self)


@dataclass(frozen=True)
class ArmResult:
    """One arm at one stage. nats: mean over seeds. spread: over seeds (0: no seed matters; None: one seed, matters).

    see: tokens that the model is shown at a time, where truncated. quality: of each seed. diff, moves: of the swap.
    """

    name: str
    stage: Stage
    length: int
    see: int | None
    nats: float
    spread: float | None
    seeds: tuple[int, ...]
    quality: tuple[Quality, ...]
    cost: Cost
    diff: tuple[tuple[str, Any, Any], ...]
    moves: tuple[Move, ...]

    @property
    def kl(self) -> float | None:
        """KL from the model as it was, in nats/token, of the first seed; None where it was not measured."""
        return self.quality[0].kl

    @property
    def layers(self) -> Layers | None:
        """Hidden states against the model as it was, of the first seed; None where they were not measured."""
        return self.quality[0].layers

    def by_position(self) -> list[Bucket]:
        """Loss by position, averaged over seeds."""
        return [
            Bucket(b[0].start, b[0].stop, sum(x.nats for x in b) / len(b), sum(x.count for x in b))
            for b in zip(*(q.by_position for q in self.quality), strict=True)
        ]


@dataclass(frozen=True)
class Sample:
    arm: str
    prompt: str
    text: str


@dataclass(frozen=True)
class Result:
    """Everything that a comparison found.

    context: trained length in tokens. spec: of the model as it is. text: corpus, hashes and tokens scored. dtype: of
    the weights, what is computed in, and of the state. ngram: None where the recipe asks for none.
    """

    name: str
    title: str
    date: str
    device: str
    dtype: str
    versions: Mapping[str, str]
    command: str
    context: int | None
    spec: Mapping[str, Any]
    text: Mapping[str, Any]
    arms: tuple[ArmResult, ...]
    verdicts: tuple[Verdict, ...]
    claims: str
    samples: tuple[Sample, ...]
    samples_are: str
    recipe: Mapping[str, Any]
    out: str
    ngram: NGramResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON, with `rows` in the format of docs/results."""
        return plain(self) | {"rows": _rows(self)}

    def __rich__(self) -> Any:
        return _comparison(self)

    def __str__(self) -> str:
        return as_text(self)


def named(arm: str, stage: str) -> str:
    """What an arm is called at a stage."""
    return arm if stage == "as it is" else f"{arm}, {stage}"


def first_of_length(lengths: Mapping[str, int]) -> dict[str, str]:
    """For each name, the first one of the same length: what its speed is set against."""
    first: dict[int, str] = {}
    return {name: first.setdefault(length, name) for name, length in lengths.items()}


def _rows(result: Result) -> list[dict[str, Any]]:
    """Rows in the format of docs/results: every arm against its rival, its speed against the first arm of its length."""
    by_name = {arm.name: arm for arm in result.arms}
    peers = first_of_length({arm.name: arm.length for arm in result.arms})
    out: list[dict[str, Any]] = []
    for v in (*result.verdicts, *(result.ngram.verdicts if result.ngram else ())):
        ours, theirs = by_name[named(v.arm, v.stage)], by_name.get(named(v.rival, v.stage))
        peer, nats = (v.rival, ours.nats + v.gap) if theirs is None else (theirs.name, theirs.nats)  # n-grams: no arm
        row = {"case": ours.name, "metric": "nats/token", "ours": ours.nats, "spread": v.spread, "peer": peer}
        ratio = nats / ours.nats if ours.nats else None
        out.append(row | {"theirs": nats, "ratio": ratio, "seeds": list(ours.seeds), "outcome": v.outcome})
    for arm in result.arms:
        for kind in ("prefill", "decode"):
            first = by_name[peers[arm.name]]
            if arm.cost.speed is None or arm is first:
                continue
            ours, theirs = (getattr(a.cost.speed, kind) for a in (arm, first))
            row = {
                "case": arm.name,
                "metric": f"{kind} tokens/s",
                "ours": ours.tokens_per_second,
                "spread": ours.spread,
            }
            out.append(row | {"peer": first.name, "theirs": theirs.tokens_per_second, "ratio": ours.ratio})
    return out


def _swapped(report: Report) -> Group:
    """What changed, what became of the weights, and the columns side by side."""
    changed = grid("changed", "from", "to")
    for path, old, new in report.diff:
        changed.add_row(path, said(old), said(new))
    moves = grid("weights", "how", "parts", "scalars", "largest error")
    groups: dict[tuple[str, str], list[Move]] = {}
    for move in report.moves:
        groups.setdefault((move.exactness, move.how), []).append(move)
    for (exactness, how), same in groups.items():
        errors = [move.error for move in same if move.error is not None]
        worst = f"{max(errors):.3g}" if errors else ""
        moves.add_row(exactness, how, str(len(same)), f"{sum(m.count for m in same):,}", worst)
    kept = f"{len(report.carried)} tensors carried, {len(report.reinitialised)} with anything re-initialised, "
    lines: list[Any] = [changed, Text(kept + f"{len(report.dropped)} dropped")]
    if report.moves:
        lines.append(moves)
    lines.append(_columns(report))
    lines.append(Text(computed(report.computed_in, report.columns[0].cost), style="dim"))
    lines += [Text(note, style="dim") for note in bounded((c.name, c.see) for c in report.columns)]
    lines += [Text(note, style="dim") for note in left_out((c.name, c.layers) for c in report.columns)]
    return Group(*lines, Text(f"rival: {report.rival}"), *verdict_lines(report.verdicts))


def _columns(report: Report) -> Table:
    table = grid(f"at {report.length} tokens", *(c.name for c in report.columns), right=len(report.columns))
    for name, cells in facts(report):
        table.add_row(name, *cells)
    return table


def facts(report: Report) -> list[tuple[str, list[str]]]:
    """What was measured of every column: (what, a cell for each), where it was measured of any."""
    dtype = report.columns[0].cost.size.dtype
    asked: list[tuple[str, Any]] = [
        ("nats/token", lambda c: None if c.nats is None else f"{c.nats:.4f}"),
        ("KL from before, nats/token", lambda c: None if c.quality is None or c.quality.kl is None else f"{c.quality.kl:.4f}"),
        ("hidden-state error, first block", _layer(0)),
        ("  last block", _layer(1)),
        ("  worst (block)", _layer(2)),
        ("parameters", lambda c: f"{c.cost.size.parameters:,}"),
        ("bytes of weights", lambda c: si(c.cost.size.weight_bytes)),
        ("FLOPs/token", lambda c: si(c.cost.size.flops_per_token)),
        (f"state bytes/token, {dtype}", lambda c: growth(c.cost, c.see)),
        (f"state bytes, {dtype}", lambda c: si(c.cost.size.state_bytes)),
        *_speed_facts("prefill"),
        *_speed_facts("decode"),
        ("peak memory, bytes", lambda c: None if c.cost.memory is None or c.cost.memory.bytes is None else si(c.cost.memory.bytes)),
    ]  # fmt: skip
    scored = [c.quality for c in report.columns if c.quality is not None]
    if scored:
        for i, bucket in enumerate(merged(scored[0].by_position)):
            asked.insert(1 + i, (f"  at {bucket.start}-{bucket.stop - 1}", _position(i)))
    rows = [(name, [read(c) for c in report.columns]) for name, read in asked]
    return [
        (name, ["-" if cell is None else cell for cell in cells])
        for name, cells in rows
        if any(cell is not None for cell in cells)
    ]


def _speed_facts(kind: str) -> list[tuple[str, Any]]:
    def measured(column: Any) -> Any:
        return None if column.cost.speed is None else getattr(column.cost.speed, kind)

    def ratio(column: Any) -> str | None:
        found = measured(column)
        return None if found is None else f"{found.ratio:.2f}±{found.ratio_spread:.2f}"

    def tokens(column: Any) -> str | None:
        found = measured(column)
        return None if found is None else f"{found.tokens_per_second:,.0f}"

    return [(f"{kind} tokens/s", tokens), ("  ratio to before", ratio)]


def _position(index: int) -> Any:
    return lambda c: None if c.quality is None else f"{merged(c.quality.by_position)[index].nats:.4f}"


def _layer(index: int) -> Any:
    return lambda c: layer_cells(c.layers)[index] if c.layers is not None and c.layers.errors else None


def _comparison(result: Result) -> Group:
    """Loss by position, state and speed first; orders; samples last."""
    lines: list[Any] = [Text(result.title, style="bold")]
    for length in dict.fromkeys(arm.length for arm in result.arms):
        here = [arm for arm in result.arms if arm.length == length]
        spans = [f"{b.start}-{b.stop - 1}" for b in merged(here[0].by_position())]
        times = "" if result.context is None else f" ({length / result.context:g}x the trained context)"
        table = grid(
            "arm",
            "mean",
            "spread",
            *spans,
            "KL",
            right=3 + len(spans),
            title=f"loss by position, nats/token, rows of {length} tokens{times}",
        )
        for arm in here:
            spread = "?" if arm.spread is None else f"{arm.spread:.4f}" if arm.spread else "-"
            nats = (f"{b.nats:.3f}" for b in merged(arm.by_position()))
            table.add_row(arm.name, f"{arm.nats:.4f}", spread, *nats, said(arm.kl, 4))
        if result.ngram is not None:
            of = result.ngram.at(length)
            table.add_row(
                result.ngram.name, f"{of.nats:.4f}", "-", *(f"{b.nats:.3f}" for b in merged(of.by_position)), "-"
            )
        lines.append(table)
    legend = (
        "spread: over seeds, ? where one seed cannot tell it. KL: from the model as it was, within its trained context."
    )
    lines.append(Text(legend if result.ngram is None else f"{legend} {result.ngram.said}", style="dim"))
    apart = [arm for arm in result.arms if arm.layers is not None]
    if any(arm.layers.errors for arm in apart if arm.layers is not None):
        lines += [Text(""), _layers(apart)]
    lines += [Text(note, style="dim") for note in left_out((a.name, a.layers) for a in apart)]
    lines += [Text(""), _costs(result), Text(computed(result.dtype, result.arms[0].cost), style="dim")]
    lines += [Text(note, style="dim") for note in bounded((a.name, a.see) for a in result.arms)]
    lines += [
        Text(""),
        Text("orders", style="bold"),
        *verdict_lines(result.verdicts),
        *([] if result.ngram is None else outcome_lines(result.ngram.verdicts)),
        Text(result.claims, style="dim"),
        Text(""),
    ]
    for prompt in dict.fromkeys(s.prompt for s in result.samples):
        lines.append(Text(f"samples ({result.samples_are}): {prompt!r}", style="bold"))
        lines += [
            Text(f"  {s.arm}: {s.text!r}", overflow="ellipsis", no_wrap=True)
            for s in result.samples
            if s.prompt == prompt
        ]
    return Group(*lines)


def _layers(apart: Sequence[ArmResult]) -> Table:
    table = grid(
        "arm",
        "first block",
        "last block",
        "worst (block)",
        right=3,
        title="hidden states, relative error to the model as it was, within its trained context",
    )
    for arm in apart:
        table.add_row(arm.name, *layer_cells(arm.layers))
    return table


def _costs(result: Result) -> Table:
    table = grid(
        "arm",
        "weights",
        "state B/token",
        "state",
        "prefill tok/s",
        "decode tok/s",
        "peak",
        right=6,
        title="weights, state and speed",
    )
    for arm in result.arms:
        if arm.stage != "as it is":
            continue  # healing changes no cost
        cost = arm.cost
        peak = None if cost.memory is None else cost.memory.bytes
        table.add_row(
            arm.name,
            si(cost.size.weight_bytes) + "B",
            growth(cost, arm.see),
            si(cost.size.state_bytes) + "B",
            "-" if cost.speed is None else rate(cost.speed.prefill),
            "-" if cost.speed is None else rate(cost.speed.decode),
            "-" if peak is None else si(peak) + "B",
        )
    return table
