"""Pages of what was measured, made from docs/results/*.json alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dovetail.errors import DataError
from dovetail.report import clock, html, plots
from dovetail.report.bench import Benchmark
from dovetail.report.scaling_page import Scaled
from dovetail.report.scaling_page import sections as scaling_sections
from dovetail.report.study_page import CLAIMS
from dovetail.report.study_recipe import METRICS

FIRST = ("case", "metric", "ours", "spread", "peer", "theirs", "ratio", "floor", "target")  # columns; then a row's own
CEILINGS = {
    "bf16_matmul_tflops": ("bf16 matmul", "TFLOP/s"),
    "fp32_matmul_tflops": ("fp32 matmul", "TFLOP/s"),
    "copy_tbs": ("copy", "TB/s"),
}
RULES = ("target_ratio", "target_within", "met")  # what the column of targets says
SHOWN = 60  # pairs in print beyond which a page tells only those that agree and those that contradict by number


def results_page(files: Sequence[Path], known: Iterable[Benchmark] = ()) -> str:
    """Targets, one table a file of docs/results with what was run on what, and the benchmarks (of `known`) that have no
    file yet. Raises DataError for a file out of form."""
    lines = ["# Results", "", "Made from `docs/results/*.json`, which the code that measured wrote. `ratio` is above 1"]
    lines += ["where Dovetail is better, whatever the metric. Times on a CPU are comparable within one file only.", ""]
    if not files:
        lines += ["Nothing has been measured yet.", ""]
    by_file = {b.file: b for b in known}
    lines += targets(files)
    for file in files:
        about = by_file.pop(file.name).about if file.name in by_file else None
        lines += result_lines(file, heading=True, about=about)
    if by_file:
        lines += ["## Not measured yet", "", "| benchmark | what it measures | needs |", "| --- | --- | --- |"]
        lines += [f"| {b.name} | {_number(b.about)} | {', '.join(b.needs()) or '-'} |" for b in by_file.values()]
        lines += [""]
    return "\n".join(lines)


def targets(files: Sequence[Path]) -> list[str]:
    """Every row that has a target, met or not. Empty where there is none."""
    rows = [(file, row) for file in files for row in _read(file)["rows"] if "met" in row]
    if not rows:
        return []
    lines = ["## Targets", "", f"{sum(row['met'] for _, row in rows)} of {len(rows)} are met.", ""]
    lines += ["| result | case | target | |", "| --- | --- | --- | --- |"]
    for file, row in rows:
        name = _read(file)["name"]
        cells = (_number(row["case"]), _target(row), "met" if row["met"] else f"best reached: {_reached(row)}")
        lines.append(f"| [{name}](#{name}) | {' | '.join(cells)} |")
    return [*lines, ""]


def result_lines(file: Path, heading: bool = False, kind: str | None = None, about: str | None = None) -> list[str]:
    """One file of results; kind: only the rows of this part, of which there are some; about: what was measured. Raises
    DataError otherwise, and for a file out of form. A file with a page of its own is a link to it."""
    result = _read(file)
    rows, name = result["rows"], result["name"]
    facts = [result["date"], result["device"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())]
    if "ceilings" in result:
        limits = [f"{label} {result['ceilings'][key]:g} {unit}" for key, (label, unit) in CEILINGS.items()]
        facts.append(f"ceilings here: {', '.join(limits)}")
    if kind is not None:
        rows = [row for row in rows if row["case"].split(",")[0] == kind]
        if not rows:
            raise DataError(f"nothing was measured of {kind!r}", where=str(file), remedy="run bench/adapter_sweep.py")
    lines = [f"## {name}", ""] if heading else []
    lines += [about, ""] if about else []
    if heading and _has_page(result):
        lines += [f"[Plots and all numbers]({file.stem}.md)", ""]
    lines += [f"`{result['command']}`", "", " · ".join(facts), ""]
    if heading and "orders" in result:
        return lines
    shown = [
        {key: value for key, value in row.items() if key not in RULES and not _nested(value)}
        | ({"target": _target(row) + (", met" if row["met"] else "")} if "met" in row else {})
        for row in rows
    ]
    found = dict.fromkeys(key for row in shown for key in row)
    columns = [*(c for c in FIRST if c in found), *(c for c in found if c not in FIRST)]
    lines += ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(_number(row.get(column)) for column in columns) + " |" for row in shown]
    return [*lines, ""]


def _target(row: Mapping[str, Any]) -> str:
    """What a row is to reach."""
    wanted = [f"{_number(row['target'])} {_number(row['metric'])}"] if "target" in row else []
    wanted += [f"{_number(row['target_ratio'])}x the peer"] if "target_ratio" in row else []
    peer = f"the peer ({_number(row.get('peer'))})"
    wanted += [f"within {row['target_within']:.0%} of {peer}"] if "target_within" in row else []
    return " and ".join(wanted) or f"as near {peer} as its benchmark asks"  # rows older than target_within


def _reached(row: Mapping[str, Any]) -> str:
    """What it does, in the same terms."""
    found = [_number(row["ours"])] if "target" in row else []
    found += [f"{_number(row['ratio'])}x"] if "target_ratio" in row else []
    found += [f"{row['ours'] / row['theirs'] - 1:+.1%}"] if "target_within" in row or not found else []
    return " and ".join(found)


def _nested(value: Any) -> bool:
    """What a cell cannot hold, such as the log of a training."""
    return isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value)


def own_pages(files: Iterable[Path]) -> dict[str, str]:
    """Name -> page of each file that has plots: costs against length, and studies of arms."""
    pages = {}
    for file in files:
        data = _read(file)
        if _has_page(data):
            parts = scaling_sections(Scaled.of(data)) if "arms" in data else study_sections(data)
            pages[f"{file.stem}.md"] = "\n\n".join([f"# {data['name']}", *parts, ""])
    return pages


def study_sections(data: Mapping[str, Any]) -> list[str]:
    """The pieces of a study's page, HTML, from its report.json."""
    rows, recipe = data["rows"], data["recipe"]
    facts = ", ".join(f"{k} {v}" for k, v in data["versions"].items())
    seeds = ", ".join(map(str, rows[0]["seeds"]))
    out = [
        f'<p class="soft">{escape(data["date"])} · {escape(data["device"])} · {escape(facts)} · '
        f"<code>{escape(data['command'])}</code> · seeds {seeds}</p>"
    ]
    if data.get("races"):
        out.append(clock.section(data["races"]))
    for name, series in data.get("curves", {}).items():
        trained = recipe["lengths"]["at"][0]
        drawn = _lines(series, x="position in the row, tokens", y="nats/token", mark=trained, mark_is="trained length")
        out.append(f"<h3>Loss by position: {escape(name)}</h3>{drawn}")
    if not (data.get("races") or data.get("curves")):
        out.append(_against_cost(data))
    out += ["<h2>Arms</h2>", _arms(rows)]
    gaps = [
        [o["first"], o["outcome"], o["second"], "-" if o["gap"] is None else f"{o['gap']:+.3f}", f"{o['spread']:.3f}"]
        for o in data["orders"]
    ]
    out += ["<h2>Orders</h2>", html.table(["arm", "is", "of", "gap", "spread over seeds"], gaps)]
    out.append(f'<p class="soft">{escape(CLAIMS)}</p>')
    if data["against_print"]:
        out += _in_print(data)
    if data["samples"]:
        said = [
            [escape(arm), f"<pre>{escape(prompt)}</pre>", f"<pre>{escape(text)}</pre>"]
            for prompt, arm, text in data["samples"]
        ]
        out += ["<h2>Samples</h2>", html.table(["arm", "prompt", "text"], said, safe=True, text=(1, 2))]
    plain = escape(json.dumps(recipe, indent=1, ensure_ascii=False))
    return [*out, f"<details><summary>recipe</summary><pre>{plain}</pre></details>"]


def _arms(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line an arm: every metric, as mean ± largest less smallest, the trivial rival's, and what it took."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    facts = [f for f in ("trainable", "peak_mb", "minutes", "state_bytes") if any(f in row for row in rows)]
    cases: dict[str, dict[str, Any]] = {}
    for row in rows:
        spread = f" ± {row['spread']:.3f}" if row.get("spread") else ""
        told = cases.setdefault(row["case"], {})
        told |= {row["metric"]: f"{row['ours']:.3f}{spread}"} | {f: row[f] for f in facts if f in row}
    rivals = {row["peer"]: {} for row in rows if "peer" in row}
    for row in rows:
        if "peer" in row:
            rivals[row["peer"]][row["metric"]] = f"{row['theirs']:.3f}"
    table = [
        [name, *(told.get(column, "-") for column in (*metrics, *facts))] for name, told in (cases | rivals).items()
    ]
    said = {"trainable": "trained", "peak_mb": "peak, MB", "state_bytes": "decoding state, bytes"}
    return html.table(["arm", *metrics, *(said.get(f, f) for f in facts)], table)


def _in_print(data: Mapping[str, Any]) -> list[str]:
    """How the orders here agree with those in print: all pairs, or where they are many those that do not."""
    pairs = data["against_print"]
    words = [
        "unresolved here" if p["here"] == "unresolved" else "as in print" if p["here"] == p["print"] else "contradicts"
        for p in pairs
    ]
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    sources = dict.fromkeys(row["published_in"] for row in data["rows"] if "published_in" in row)
    out = ["<h2>Beside print</h2>", f"<p>{escape('; '.join(sources))}. {len(pairs)} pairs: {escape(counts)}.</p>"]
    kept = [
        [p["metric"], p["first"], p["print"], p["second"], word]
        for p, word in zip(pairs, words, strict=True)
        if len(pairs) <= SHOWN or word == "contradicts"
    ]
    return [*out, html.table(["metric", "arm", "in print is", "of", "here"], kept)] if kept else out


def _against_cost(data: Mapping[str, Any]) -> str:
    """The main metric against trained parameters and peak memory, where arms differ in them."""
    recipe, rows = data["recipe"], data["rows"]
    main: str = METRICS.get(recipe.get("main") or "") or rows[0]["metric"]
    mine = [row for row in rows if row["metric"] == main and row.get("trainable") and row.get("peak_mb")]
    costs = {"trained parameters": "trainable", "peak memory, MB": "peak_mb"}
    if len({row["trainable"] for row in mine}) < 2:
        return ""
    marks = [plots.Mark(row["case"], tuple(float(row[c]) for c in costs.values()), row["ours"]) for row in mine]
    drawn = plots.ladder(marks, xs=list(costs), y=main, colours=plots.palette([m.name for m in marks], {}))
    return f"<h2>{escape(main)} against cost</h2><div>{drawn}</div>"


def _lines(series: Mapping[str, Any], **said: Any) -> str:
    names = list(series)
    drawn = plots.lines(series, **said, colours=plots.palette(names, {}), dashed=names[len(plots.COLOURS) :])
    return f"<div>{drawn}</div>"


def _has_page(data: Mapping[str, Any]) -> bool:
    return "arms" in data or "orders" in data


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        missing = [key for key in ("name", "date", "device", "versions", "command", "rows") if key not in data]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"not a result: {error!r}", where=str(file)) from None
    if missing:
        raise DataError(f"no {missing[0]!r} in a result", where=str(file), remedy="let the code that measures write it")
    return data


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{_number(key)}: {_number(item)}" for key, item in value.items())
    return " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
