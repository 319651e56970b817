"""What a study found: plain data, how it reads in a terminal, and its page."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

from rich.console import Group
from rich.text import Text

from dovetail.report import clock, html, plots
from dovetail.report.plain import plain
from dovetail.report.render import as_text, grid, si

SMALLER_IS_BETTER = frozenset({"nats"})
Curve = tuple[Sequence[float], Sequence[float]]  # positions in the row, and nats/token there
_MANY = 14  # orders beyond which a terminal sums them up
CLAIMS = "An order is claimed only where the gap exceeds twice the spread over seeds (largest less smallest)."


@dataclass(frozen=True)
class Row:
    """One arm, or a variant of it. metrics: name -> (mean over seeds, largest less smallest). trainable, parameters:
    scalars.

    spent: peak_bytes of training (the largest of its seeds); tokens_per_s, and seconds with evaluation and saving (of the
    longest), where runs had the device to themselves; state_bytes that decoding keeps of a row of the trained length,
    where it decodes; empty for what was not trained. diverged: seeds whose training did, which metrics leave out.
    family: rows of one are joined where quality stands against state_bytes.
    """

    name: str
    metrics: Mapping[str, tuple[float, float]]
    trainable: int
    parameters: int
    spent: Mapping[str, float]
    diverged: tuple[int, ...] = ()
    family: str = ""


@dataclass(frozen=True)
class Order:
    """How two arms stand on a metric. gap: above 0 where the first is better; None where one has no value. spread: the
    larger of both arms', which one seed does not tell, nor seeds of which some diverged (known)."""

    first: str
    second: str
    gap: float | None
    spread: float
    known: bool = True

    @property
    def outcome(self) -> str:
        if not self.known or self.gap is None or abs(self.gap) <= 2 * self.spread:
            return "unresolved"
        return "above" if self.gap > 0 else "below"


@dataclass(frozen=True)
class Found:
    """All that a study found. rival: the trivial alternative. published: a table in print (metric, source, values by
    arm, and apart, the least difference of a pair that is compared), several of them, or None.

    smaller: metrics of which less is better. brief: those of a terminal beside the main one. curves: plots of losses
    along the longest rows, by name of the row; trained: the length that a line marks there. note: what is measured.
    races: plots of losses by seconds of training; against: arms and the one that each is ordered against, the first
    unless some are given.
    """

    name: str
    date: str
    device: str
    versions: Mapping[str, str]
    command: str
    seeds: tuple[int, ...]
    main: str
    titles: Mapping[str, str]
    rows: tuple[Row, ...]
    rival: Row | None
    published: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
    samples: tuple[tuple[str, str, str], ...]
    recipe: Mapping[str, Any]
    out: str
    smaller: Collection[str] = SMALLER_IS_BETTER
    brief: tuple[str, ...] = ("nats",)
    note: str = ""
    trained: int | None = None
    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    races: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    against: Mapping[str, str] = field(default_factory=dict)

    @property
    def tables(self) -> tuple[Mapping[str, Any], ...]:
        """What is in print, a table a metric."""
        if self.published is None:
            return ()
        return (self.published,) if isinstance(self.published, Mapping) else tuple(self.published)

    def orders(self) -> list[Order]:
        """Every arm against the first one, or the first of its race, and against the trivial rival."""
        first, *others = self.rows
        pairs = [(row, first) for row in others]
        if self.against:
            by_name = {row.name: row for row in self.rows}
            pairs = [(by_name[name], by_name[other]) for name, other in self.against.items()]
        pairs += [(row, self.rival) for row in self.rows if self.rival is not None]
        return [self.order(a, b, self.main) for a, b in pairs]

    def order(self, a: Row, b: Row, metric: str) -> Order:
        """How two rows stand to each other: unresolved where one seed was run, which shows no spread, or one diverged."""
        known = len(self.seeds) > 1 and not a.diverged and not b.diverged
        return replace(order(a, b, metric, self.smaller), known=known)

    def against_print(self, table: Mapping[str, Any] | None = None) -> list[tuple[str, str, str, str]]:
        """(arm, arm, what is in print, what is found here) of every pair of a table in print, the first unless given.

        The trivial rival is an arm there, too; without the metric it is unresolved here, as any other.
        """
        if table is None:
            return self.against_print(self.tables[0]) if self.tables else []
        by_name = {row.name: row for row in (*self.rows, self.rival) if row is not None}
        values, pairs = table["values"], []
        for a, b in itertools.combinations(values, 2):
            gap = values[a] - values[b]
            if abs(gap) > table.get("apart", 0):
                here = self.order(by_name[a], by_name[b], table["metric"]).outcome
                pairs.append((a, b, "above" if gap > 0 else "below", here))
        return pairs

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `rows` are in the format of docs/results."""
        rows = []
        for row, metric in itertools.product(self.rows, self.titles):
            if metric not in row.metrics:
                continue
            ours, spread = row.metrics[metric]
            one: dict[str, Any] = {"case": row.name, "metric": self.titles[metric], "ours": round(ours, 4)}
            ended = [seed for seed in self.seeds if seed not in row.diverged]
            one |= {"spread": round(spread, 4), "seeds": ended, "trainable": row.trainable}
            one |= {"peak_mb": round(row.spent["peak_bytes"] / 1e6)} if row.spent else {}
            one |= {"minutes": round(row.spent["seconds"] / 60, 2)} if "seconds" in row.spent else {}
            one |= {"state_bytes": row.spent["state_bytes"]} if "state_bytes" in row.spent else {}
            if self.rival is not None and metric in self.rival.metrics:
                theirs = self.rival.metrics[metric][0]
                better, worse = (theirs, ours) if metric in self.smaller else (ours, theirs)
                one |= {
                    "peer": self.rival.name,
                    "theirs": round(theirs, 4),
                    "ratio": round(better / worse, 3) if worse else None,  # above 1 where ours is better
                }
            for table in self.tables:
                if row.name in table["values"] and table["metric"] == metric:
                    one |= {"published": _printed(table, row.name), "published_in": table["source"]}
            rows.append(one)
        rows += [
            {"case": row.name, "metric": "runs that diverged", "ours": len(row.diverged), "seeds": list(row.diverged)}
            for row in self.rows
            if row.diverged
        ]
        data = {n: plain(getattr(self, n)) for n in ("name", "date", "device", "versions", "command")} | {"rows": rows}
        data["orders"] = [plain(o) | {"outcome": o.outcome} for o in self.orders()]
        data["against_print"] = [
            dict(zip(("first", "second", "print", "here"), p, strict=True)) | {"metric": self.titles[table["metric"]]}
            for table in self.tables
            for p in self.against_print(table)
        ]
        data |= {"curves": plain(self.curves)} if self.curves else {}
        data |= {"races": plain(self.races)} if self.races else {}
        return data | {"samples": plain(self.samples), "recipe": plain(self.recipe)}

    def __rich__(self) -> Any:
        columns, cells = _cells(self, short=True)
        table = grid(*columns, right=len(columns) - 1, title=self.name)
        for row in cells:
            table.add_row(*row)
        lines: list[Any] = [table, Text("")]
        lines += map(Text, _ordered(self.orders()))
        for table in self.tables:
            title = f"in print, {self.titles[table['metric']]}: {table['source']}"
            lines += [Text(""), Text(title, style="bold"), *map(Text, _agreement(self, table))]
        return Group(*lines, Text(CLAIMS, style="dim"))

    def __str__(self) -> str:
        return as_text(self)


def order(first: Row, second: Row, metric: str, smaller: Collection[str] = SMALLER_IS_BETTER) -> Order:
    """How `first` stands to `second` on a metric. smaller: metrics of which less is better."""
    if metric not in first.metrics or metric not in second.metrics:
        return Order(first.name, second.name, None, 0.0)
    (a, spread_a), (b, spread_b) = first.metrics[metric], second.metrics[metric]
    return Order(first.name, second.name, b - a if metric in smaller else a - b, max(spread_a, spread_b))


def page(found: Found) -> str:
    """The page as text: nothing is fetched."""
    title = found.titles[found.main]
    columns, cells = _cells(found)
    broken = " Runs whose loss ceased to be finite are left out, and no order is claimed of their arms."
    body = [
        f"<h1>{escape(found.name)}</h1>"
        f'<p class="soft">{escape(found.date)} · {escape(found.device)} · '
        + escape(", ".join(f"{k} {v}" for k, v in found.versions.items()))
        + f" · <code>{escape(found.command)}</code></p>",
        clock.section(found.races) if found.races else "",
        _by_position(found) if found.curves else "" if found.races else _against_cost(found),
        _against_state(found) if any(row.family for row in found.rows) else "",
        html.table(columns, cells),
        f'<p class="soft">Means over seeds {", ".join(map(str, found.seeds))}, ± largest less smallest. Peak memory: of '
        f"training, the process's where the device is a CPU.{broken if any(row.diverged for row in found.rows) else ''} {escape(found.note)}</p>",
        "<h2>Orders</h2>"
        + html.table(
            ["arm", "is", "of", f"gap, {title}", "spread over seeds"],
            [[o.first, o.outcome, o.second, _gap(o), f"{o.spread:.3f}"] for o in found.orders()],
        )
        + f'<p class="soft">{escape(CLAIMS)}</p>',
    ]
    for table in found.tables:
        name, least = found.titles[table["metric"]], table.get("apart", 0)
        pairs = html.table(["arm", "arm", "in print", "here"], found.against_print(table))
        only = f" Pairs more than {least:g} apart there." if least else ""
        body.append(f"<h2>In print: {escape(name)}</h2><p>{escape(table['source'])}.{only}</p>" + pairs)
    if found.samples:
        rows = [
            [escape(arm), f"<pre>{escape(prompt)}</pre>", f"<pre>{escape(text)}</pre>"]
            for prompt, arm, text in found.samples
        ]
        body.append("<h2>Samples</h2>" + html.table(["arm", "prompt", "text"], rows, safe=True, text=(1, 2)))
    recipe = escape(json.dumps(found.recipe, indent=1, ensure_ascii=False, default=str))
    body.append(f"<details><summary>recipe</summary><pre>{recipe}</pre></details>")
    return html.whole(found.name, body)


def _against_cost(found: Found) -> str:
    colours = plots.palette([row.name for row in found.rows], {})
    title = found.titles[found.main]
    costs = {"trained parameters": lambda r: float(r.trainable), "peak memory, bytes": lambda r: r.spent["peak_bytes"]}
    marks = [
        plots.Mark(r.name, tuple(cost(r) for cost in costs.values()), r.metrics[found.main][0])
        for r in found.rows
        if found.main in r.metrics
    ]
    if not marks:
        return ""
    return f"<h2>{escape(title)} against cost</h2>" + plots.ladder(marks, xs=list(costs), y=title, colours=colours)


def _against_state(found: Found) -> str:
    title, series = found.titles[found.main], {}
    for family in dict.fromkeys(row.family for row in found.rows if row.family):
        points = sorted(
            (row.spent["state_bytes"], row.metrics[found.main][0])
            for row in found.rows
            if row.family == family and found.main in row.metrics and "state_bytes" in row.spent
        )
        if points:
            series[family] = tuple(zip(*points, strict=True))
    if not series:
        return ""
    dashed = list(series)[len(plots.COLOURS) :]
    x, colours = "decoding state of one row of the trained length, bytes", plots.palette(series, {})
    plot = plots.lines(series, x=x, y=title, colours=colours, dashed=dashed, log=True)
    return f"<h2>{escape(title)} against decoding state</h2>{plot}"


def _by_position(found: Found) -> str:
    out = ["<h2>Loss by position</h2>"]
    for what, series in found.curves.items():
        plot = plots.lines(
            series,
            x="position in the row, tokens",
            y="nats/token",
            mark=found.trained,
            mark_is="trained length",
            colours=plots.palette(series, {}),
            dashed=list(series)[len(plots.COLOURS) :],  # colours begin again
        )
        out.append(f"<h3>{escape(what)}</h3>{plot}")
    return "".join(out)


def _cells(found: Found, short: bool = False) -> tuple[list[str], list[list[str]]]:
    """Columns and their cells; short: of the metrics the main one, the published ones and the brief ones alone."""
    metrics = [m for m in found.titles if any(m in row.metrics for row in found.rows)]
    if short:
        kept = {found.main, *found.brief, *(table["metric"] for table in found.tables)}
        metrics = [m for m in metrics if m in kept]
    trained = any(row.spent for row in found.rows)
    timed = any("tokens_per_s" in row.spent for row in found.rows)
    lasted = any("seconds" in row.spent for row in found.rows)
    states = len({row.spent.get("state_bytes") for row in found.rows}) > 1
    broken = any(row.diverged for row in found.rows)
    columns = [
        "arm",
        *(found.titles[m] for m in metrics),
        *(["trained"] if trained else []),
        *([] if short else ["of"] if trained else ["parameters"]),
        *(["peak memory"] if trained else []),
        *(["tokens/s"] if timed else []),
        *(["minutes"] if lasted else []),
        *(["decoding state"] if states else []),
        *(["diverged"] if broken else []),
    ]
    several = len(found.tables) > 1
    columns += [f"in print: {found.titles[t['metric']]}" if several else "in print" for t in found.tables]
    cells = []
    for row in [*found.rows, *([] if found.rival is None else [found.rival])]:
        line = [row.name]
        for m in metrics:
            mean, spread = row.metrics.get(m, (None, 0.0))
            line.append("-" if mean is None else f"{mean:.3f} ± {spread:.3f}" if spread else f"{mean:.3f}")
        line += [f"{row.trainable:,}"] if trained else []
        line += [] if short else [f"{row.parameters:,}"]
        line += [si(row.spent["peak_bytes"]) + "B" if row.spent else "-"] if trained else []
        line += [f"{row.spent['tokens_per_s']:,.0f}" if "tokens_per_s" in row.spent else "-"] if timed else []
        line += [f"{row.spent['seconds'] / 60:.1f}" if "seconds" in row.spent else "-"] if lasted else []
        line += [si(row.spent["state_bytes"]) + "B" if row.spent.get("state_bytes") else "-"] if states else []
        line += ["seeds " + ", ".join(map(str, row.diverged)) if row.diverged else "-"] if broken else []
        line += [str(_printed(table, row.name)) for table in found.tables]
        cells.append(line)
    return columns, cells


def _ordered(orders: Sequence[Order]) -> list[str]:
    """A line an order; where there are many, one for all that stand alike to the same arm."""
    if len(orders) <= _MANY:
        return [f"{o.first}: {o.outcome} {o.second} (gap {_gap(o)}, spread {o.spread:.3f})" for o in orders]
    alike: dict[str, list[str]] = {}
    for o in orders:
        alike.setdefault(f"{o.outcome} {o.second}", []).append(o.first)
    return [f"{how}: {', '.join(names)}" for how, names in alike.items()]


def _gap(order: Order) -> str:
    return "-" if order.gap is None else f"{order.gap:+.3f}"


def _printed(table: Mapping[str, Any], name: str) -> Any:
    """What a table in print says of an arm: a value, its place in an order from 1, or ""."""
    said = table["values"].get(name, "")
    return round(-said) if table.get("order") and said else said


def _agreement(found: Found, table: Mapping[str, Any]) -> list[str]:
    pairs = found.against_print(table)
    words = [
        "unresolved here" if here == "unresolved" else "as in print" if here == printed else "CONTRADICTS print"
        for _, _, printed, here in pairs
    ]
    said = [f"{a} {printed} {b}: {word}" for (a, b, printed, _), word in zip(pairs, words, strict=True)]
    if len(pairs) <= _MANY:
        return said
    counts = [f"{words.count(word)} {word}" for word in ("as in print", "unresolved here", "CONTRADICTS print")]
    return [f"{len(pairs)} pairs: {', '.join(counts)}", *(line for line in said if line.endswith("CONTRADICTS print"))]
