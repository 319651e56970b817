"""What was found of cost against length: plain data, how it reads in a terminal, and its page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rich.console import Group
from rich.text import Text

from dovetail.report import html, plots
from dovetail.report.plain import plain
from dovetail.report.render import as_text, grid, si

FORWARD, STEP, DECODE = "forward", "training step", "decode"
WITHIN = 0.1  # of a slope, within which it is said to hold


@dataclass(frozen=True)
class Cell:
    """One measurement. seconds: of a call over `rows` rows (of one token when decoding), median; spread: largest less
    smallest. bytes: of its peak above what was there before; when decoding, of the state. why: nothing was measured."""

    what: str
    length: int
    rows: int
    seconds: float | None = None
    spread: float = 0.0
    bytes: int | None = None
    why: str = ""

    @property
    def per_row(self) -> float:
        """Seconds for one row."""
        assert self.seconds is not None
        return self.seconds / self.rows


@dataclass(frozen=True)
class Slope:
    """Time of a row rises as length ** power, from the first to the last of the lengths that it was fitted to."""

    power: float
    first: int
    last: int


@dataclass(frozen=True)
class Measured:
    """One arm. asked: the slope that it should have, if any. octaves: of which, at most, slopes are. plans: use ->
    kernel and why."""

    name: str
    parameters: int
    asked: float | None
    octaves: int
    plans: Mapping[str, str]
    cells: Sequence[Cell]

    def of(self, what: str) -> list[Cell]:
        """What was measured of this, by rising length."""
        return sorted((c for c in self.cells if c.what == what and not c.why), key=lambda c: c.length)

    def at(self, what: str, length: int) -> Cell | None:
        return next((c for c in self.of(what) if c.length == length), None)

    def slope(self, what: str) -> Slope | None:
        """By least squares of log time on log length over the longest octaves; None for fewer than two lengths."""
        cells = self.of(what)
        cells = [c for c in cells if c.length * 2**self.octaves >= cells[-1].length]
        if len(cells) < 2:
            return None
        across, up = [math.log(c.length) for c in cells], [math.log(c.per_row) for c in cells]
        x, y = sum(across) / len(cells), sum(up) / len(cells)
        power = sum((a - x) * (b - y) for a, b in zip(across, up, strict=True)) / sum((a - x) ** 2 for a in across)
        return Slope(power, cells[0].length, cells[-1].length)

    def holds(self, what: str) -> bool | None:
        """Whether the slope is the one asked for, within a tenth; None where none is asked, or none was found."""
        found = self.slope(what)
        return None if self.asked is None or found is None else abs(found.power / self.asked - 1) <= WITHIN

    def missing(self) -> list[str]:
        """What was not measured, and why, a line for each reason."""
        out: dict[tuple[str, str], list[int]] = {}
        for c in self.cells:
            if c.why:
                out.setdefault((c.what, c.why), []).append(c.length)
        return [f"{self.name}, {what} at {', '.join(f'{n:,}' for n in at)}: {why}" for (what, why), at in out.items()]


@dataclass(frozen=True)
class Scaled:
    """All that was found."""

    name: str
    date: str
    device: str
    versions: Mapping[str, str]
    command: str
    arms: tuple[Measured, ...]
    recipe: Mapping[str, Any]

    @staticmethod
    def of(data: Mapping[str, Any]) -> Scaled:
        """From `to_dict`, as docs/results keeps it."""
        arms = tuple(Measured(**arm | {"cells": tuple(Cell(**c) for c in arm["cells"])}) for arm in data["arms"])
        names = ("name", "date", "device", "versions", "command", "recipe")
        return Scaled(arms=arms, **{name: data[name] for name in names})

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `rows`, the slopes and the longest decoding, are in the format of docs/results."""
        rows: list[dict[str, Any]] = []
        for arm in self.arms:
            for what in (FORWARD, STEP):
                if (slope := arm.slope(what)) is not None:
                    one: dict[str, Any] = {
                        "case": arm.name,
                        "metric": f"slope of {what}",
                        "ours": round(slope.power, 3),
                    }
                    one |= {"from": slope.first, "to": slope.last}
                    one |= (
                        {}
                        if arm.asked is None
                        else {"target": arm.asked, "within 10%": "yes" if arm.holds(what) else "no"}
                    )
                    rows.append(one)
            if last := arm.of(DECODE)[-1:]:
                assert last[0].seconds is not None
                row = {"case": arm.name, "metric": "ms/token decoded", "ours": round(last[0].seconds * 1e3, 4)}
                rows.append(row | {"to": last[0].length, "state bytes": last[0].bytes})
        facts = {name: plain(getattr(self, name)) for name in ("name", "date", "device", "versions", "command")}
        return facts | {"rows": rows, "arms": plain(self.arms), "recipe": plain(self.recipe)}

    def speeds(self) -> list[list[str]]:
        """(arm, length, ratio in print, ratio of our training steps) where both are known."""
        published = self.recipe["published"]
        if published is None:
            return []
        by_name, out = {arm.name: arm for arm in self.arms}, []
        for name, ratios in published["values"].items():
            for length, ratio in ratios.items():
                own, base = (by_name[n].at(STEP, int(length)) for n in (name, published["against"]))
                if own is not None and base is not None:
                    out.append([name, f"{int(length):,}", f"{ratio:g}", f"{base.per_row / own.per_row:.2f}"])
        return out

    def __rich__(self) -> Any:
        lengths = self.recipe["at"]
        columns = [
            "arm",
            "slope, forward",
            "slope, step",
            "asked",
            f"step at {lengths[-1]:,}",
            "memory",
            "decode",
            "state",
        ]
        table = grid(*columns, right=len(columns) - 1, title=self.name)
        for arm in self.arms:
            step, decode = arm.of(STEP)[-1:], arm.of(DECODE)[-1:]
            longest = step[0] if step and step[0].length == lengths[-1] else None
            table.add_row(
                arm.name, *(_power(arm.slope(what)) for what in (FORWARD, STEP)), _verdict(arm),
                "-" if longest is None else _time(longest.per_row), "-" if longest is None else _bytes(longest.bytes),
                *([_time(decode[0].seconds or 0.0), _bytes(decode[0].bytes)] if decode else ["-", "-"]),
            )  # fmt: skip
        lines = [Text(line, style="dim") for arm in self.arms for line in arm.missing()]
        return Group(table, Text(""), *lines)

    def __str__(self) -> str:
        return as_text(self)


def page(found: Scaled) -> str:
    """The page as text: nothing is fetched."""
    return html.whole(found.name, [f"<h1>{escape(found.name)}</h1>", *sections(found)])


def sections(found: Scaled) -> list[str]:
    """The pieces of the page, HTML."""
    asked = found.recipe
    rows = "one row" if asked["batch_tokens"] is None else f"{asked['batch_tokens']:,} tokens in rows of the length"
    how = (
        f"Each call reads {rows}; the median of {asked['repeat']} or fewer timings after two calls that do not count, "
        f"each arm in a process of its own. A training step: forward, loss, backward, AdamW, fp32 weights"
        f"{' under torch.compile' if asked['compile'] else ''}. Forward and decoding: weights in {asked['dtype']}; decoding "
        "eager, greedy, batch 1. Memory: the highest above what was there before (weights, and AdamW's moments in a step)."
    )
    out = [
        f'<p class="soft">{escape(found.date)} · {escape(found.device)} · '
        + escape(", ".join(f"{k} {v}" for k, v in found.versions.items()))
        + f" · <code>{escape(found.command)}</code></p><p>{escape(how)}</p>"
    ]
    for what, title in ((FORWARD, "Forward"), (STEP, "Training step")):
        out.append(f"<h2>{title}</h2>")
        out.append(_plot(found, what, "length, tokens", "µs/token", lambda c: 1e6 * c.per_row / c.length))
        out.append(_table(found, what, asked["at"], "time of a row", lambda c: _time(c.per_row)))
        out.append(_plot(found, what, "length, tokens", "peak memory of a call, bytes", lambda c: float(c.bytes or 0)))
        out.append(_table(found, what, asked["at"], "peak memory of a call", lambda c: _bytes(c.bytes)))
    out.append("<h2>Slopes</h2>" + _slopes(found))
    if asked["decode_at"]:
        out.append("<h2>Decoding</h2>")
        out.append(_plot(found, DECODE, "context, tokens", "ms/token", lambda c: 1e3 * (c.seconds or 0.0)))
        out.append(_table(found, DECODE, asked["decode_at"], "time of a token", lambda c: _time(c.seconds or 0.0)))
        out.append(_plot(found, DECODE, "context, tokens", "state, bytes", lambda c: float(c.bytes or 0)))
        out.append(_table(found, DECODE, asked["decode_at"], "bytes of state", lambda c: _bytes(c.bytes)))
        out.append(
            _table(
                found, DECODE, asked["decode_at"], "bytes of state a token of context",
                lambda c: _bytes(None if c.bytes is None else c.bytes / c.length),
            )
        )  # fmt: skip
    if speeds := found.speeds():
        published = asked["published"]
        head = ["arm", "length", "in print", "training steps here"]
        out.append(
            f"<h2>Speed beside what is in print</h2><p>{escape(published['source'])}; {escape(published['against'])} = 1. "
            "Other widths, depths, devices and code: what may be compared is how they rise.</p>"
            + html.table(head, speeds)
        )
    if missing := [line for arm in found.arms for line in arm.missing()]:
        out.append("<h2>Not measured</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in missing) + "</ul>")
    plans = [
        [arm.name, f"{arm.parameters:,}", use, why]
        for arm in found.arms
        for use, why in (arm.plans or {"": ""}).items()
    ]
    out.append("<h2>Plans</h2>" + html.table(["arm", "parameters", "use", "kernel"], plans, text=(2, 3)))
    recipe = escape(json.dumps(asked, indent=1, ensure_ascii=False, default=str))
    return [*out, f"<details><summary>recipe</summary><pre>{recipe}</pre></details>"]


def _plot(found: Scaled, what: str, x: str, y: str, value: Callable[[Cell], float]) -> str:
    series = {arm.name: [(c.length, value(c)) for c in arm.of(what)] for arm in found.arms}
    some = {name: [p for p in points if p[1] > 0] for name, points in series.items()}  # of which there are logarithms
    lines = {name: ([p[0] for p in points], [p[1] for p in points]) for name, points in some.items() if points}
    names = [arm.name for arm in found.arms]
    if not lines:
        return "<p>Nothing was measured.</p>"
    drawn = plots.powers(lines, x=x, y=y, colours=plots.palette(names, {}), dashed=names[len(plots.COLOURS) :])
    return f"<div>{drawn}</div>"


def _table(found: Scaled, what: str, lengths: Sequence[int], title: str, said: Callable[[Cell], str]) -> str:
    rows = []
    for arm in found.arms:
        cells = [arm.at(what, n) for n in lengths]
        rows.append([arm.name, *("-" if c is None else said(c) for c in cells)])
    return html.table([title, *(f"{n:,}" for n in lengths)], rows)


def _slopes(found: Scaled) -> str:
    rows = []
    for arm in found.arms:
        both = [arm.slope(what) for what in (FORWARD, STEP)]
        spans = ["" if s is None else f"{s.first:,} to {s.last:,}" for s in both]
        cells = [cell for slope, span in zip(both, spans, strict=True) for cell in (_power(slope), span)]
        rows.append([arm.name, *cells, "" if arm.asked is None else f"{arm.asked:g}", _verdict(arm)])
    head = ["arm", "forward", "lengths", "training step", "lengths", "should be", "within 10%"]
    return html.table(head, rows) + (
        '<p class="soft">The time of a row rises as length to the power of the slope: least squares of logarithms over '
        "the longest octaves that were measured.</p>"
    )


def _verdict(arm: Measured) -> str:
    held = [arm.holds(what) for what in (FORWARD, STEP)]
    return "-" if arm.asked is None else "/".join({True: "yes", False: "NO", None: "-"}[one] for one in held)


def _power(slope: Slope | None) -> str:
    return "-" if slope is None else f"{slope.power:.2f}"


def _time(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError


def _bytes(count: float | None) -> str:
    return "-" if count is None else f"{si(count)}B"
