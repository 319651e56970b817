"""A comparison, or a swap, as one self-contained page: nothing is fetched, light and dark both read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from dovetail.report import plots
from dovetail.report.arms import Verdict
from dovetail.report.measure import Layers
from dovetail.report.render import bounded, computed, growth, layer_cells, left_out, merged, rate, said, si
from dovetail.report.results import ArmResult, Column, Report, Result, facts
from dovetail.surgery import Move

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --soft: #5c6470; --paper: #fff; --line: #d9dde3; --good: #1a7f4b;
  --bad: #c0312f; --open: #9a6b00; --tint: #f5f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #9aa3af; --paper: #15181c; --line: #333a43;
  --good: #58c98b; --bad: #ff7b72; --open: #e3b341; --tint: #1d2126; } }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, "PingFang SC", "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; } tbody tr:nth-child(even) { background: var(--tint); }
th:first-child, td:first-child, td.text, th.text { text-align: left; } td.text { white-space: normal; }
thead th { color: var(--soft); font-weight: 600; }
svg { max-width: 100%; height: auto; } svg text { font-family: system-ui, "PingFang SC", "Noto Sans CJK SC", sans-serif !important; }
.beats { color: var(--good); } .loses { color: var(--bad); font-weight: 600; } .unresolved { color: var(--open); }
pre, code { font: 13px/1.5 ui-monospace, monospace; } pre { background: var(--tint); padding: .7rem; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; } details { margin: .5rem 0; } summary { cursor: pointer; }
"""


def page(found: Result | Report) -> str:
    """The whole page as text."""
    return _comparison(found) if isinstance(found, Result) else _swap(found)


def _comparison(result: Result) -> str:
    before = {arm.name: arm.name.removesuffix(f", {arm.stage}") for arm in result.arms if arm.stage == "healed"}
    ngram = result.ngram
    colours = plots.palette([arm.name for arm in result.arms] + ([] if ngram is None else [ngram.name]), before)
    rivals = {v.rival if v.stage == "as it is" else f"{v.rival}, {v.stage}" for v in result.verdicts}
    lengths = list(dict.fromkeys(arm.length for arm in result.arms))
    body = [
        f"<h1>{escape(result.name)}</h1><p>{escape(result.title)}</p>",
        f'<p class="soft">{escape(result.date)} · {escape(result.device)}, computed in {escape(result.dtype)} · '
        + escape(", ".join(f"{k} {v}" for k, v in result.versions.items()))
        + f" · <code>{escape(result.command)}</code></p>",
        *(part for length in lengths for part in _by_position(result, length, colours, before)),
        _layers(result.arms, colours, before),
        "<h2>State and speed</h2>" + _costs(result.arms),
        f'<p class="soft">{escape(computed(result.dtype, result.arms[0].cost))} State: what decoding one row remembers. '
        + " ".join(escape(note) for note in bounded((a.name, a.see) for a in result.arms))
        + " Speed: medians of rounds in which every arm took its turn in one process, batch 1, eager; in brackets the median ratio to the first arm of the same length, round by round. "
        f"Peak memory: of a prefill, above the weights{_memory_note(result)}.</p>",
        *(_quality_cost([a for a in result.arms if a.length == n], n, colours, before, rivals) for n in lengths),
        "<h2>Orders</h2>"
        + (_verdicts(result.verdicts) or "<p>No arm of this recipe names a rival.</p>")
        + ("" if ngram is None else f"<p>{escape(ngram.said)}</p>{_verdicts(ngram.verdicts, staged=False)}")
        + f'<p class="soft">{escape(result.claims)}</p>',
        "<h2>What was changed</h2>" + (_changed(result.arms) or "<p>Nothing was swapped.</p>"),
        "<h2>Text, model, recipe</h2>" + _sources(result),
    ]
    if result.samples:
        body.append(f"<h2>Samples</h2><p>{escape(result.samples_are)}.</p>" + _samples(result))
    return whole(result.name, body)


def _swap(report: Report) -> str:
    """What changed, what became of the weights, the columns side by side."""
    before = {c.name: c.name.removesuffix(", healed") for c in report.columns if c.name.endswith(", healed")}
    colours = plots.palette([c.name for c in report.columns], before)
    kept = f"{len(report.carried)} tensors carried, {len(report.reinitialised)} with anything re-initialised, "
    notes = bounded((c.name, c.see) for c in report.columns)
    scored = [c for c in report.columns if c.nats is not None]
    rivals = {c.name for c in scored if c.name.startswith("rival")}
    body = [
        "<h1>Swap</h1>"
        + f'<p class="soft">{escape(report.device)}, computed in {escape(report.computed_in)} · '
        + escape(", ".join(f"{k} {v}" for k, v in report.versions.items()))
        + "</p>",
        "<h2>What was changed</h2>" + _changes(report.diff, report.moves),
        f"<p>{kept}{len(report.dropped)} dropped.</p>",
        f"<h2>At {report.length} tokens</h2>"
        + table(["", *(c.name for c in report.columns)], [[name, *cells] for name, cells in facts(report)])
        + f'<p class="soft">{escape(computed(report.computed_in, report.columns[0].cost))} {escape(" ".join(notes))}</p>'
        + f"<p>rival: {escape(report.rival)}</p>"
        + _verdicts(report.verdicts),
        _layers(report.columns, colours, before),
        _quality_cost(scored, report.length, colours, before, rivals) if scored else "",
    ]
    if report.tokens_sha256 is not None:
        body.append(f"<p>{report.rows} rows scored, tokens_sha256: <code>{report.tokens_sha256}</code></p>")
    return whole("Swap", body)


def whole(title: str, body: Iterable[str]) -> str:
    """A page by itself."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{"".join(body)}</body></html>\n'


def _by_position(result: Result, length: int, colours: Mapping[str, str], healed: Mapping[str, str]) -> list[str]:
    here = [arm for arm in result.arms if arm.length == length]
    times = "" if result.context is None else f", {length / result.context:g}x the trained context"
    series = {
        arm.name: (
            [(b.start + b.stop - 1) / 2 for b in arm.by_position()],
            [b.nats for b in arm.by_position()],
        )
        for arm in here
    }
    if result.ngram is not None:
        of = result.ngram.at(length)
        series[result.ngram.name] = (
            [(b.start + b.stop - 1) / 2 for b in of.by_position],
            [b.nats for b in of.by_position],
        )
    mark = result.context if result.context is not None and result.context < length else None
    plot = plots.lines(
        series,
        x="position in the row, tokens",
        y="nats/token",
        mark=mark,
        mark_is="trained context",
        colours=colours,
        dashed=healed,
    )
    spans = (f"{b.start}-{b.stop - 1}" for b in merged(here[0].by_position()))
    head = ["arm", "nats/token", "spread over seeds", "seeds", *spans, "KL from the model as it was"]
    rows = []
    for arm in here:
        spread = "unknown" if arm.spread is None else f"{arm.spread:.4f}" if arm.spread else "no seed matters"
        cells = [f"{b.nats:.3f}" for b in merged(arm.by_position())]
        rows.append([arm.name, f"{arm.nats:.4f}", spread, ", ".join(map(str, arm.seeds)), *cells, said(arm.kl, 4)])
    if result.ngram is not None:
        of = result.ngram.at(length)
        cells = [f"{b.nats:.3f}" for b in merged(of.by_position)]
        rows.append([result.ngram.name, f"{of.nats:.4f}", "no seed matters", "-", *cells, "-"])
    tokens = here[0].quality[0].tokens
    note = (
        f'<p class="soft">{tokens:,} tokens scored, the same for every arm; averages over seeds. KL is over rows within '
        "the trained context, in nats/token, of the first seed."
    )
    seen = [a for a in here if a.see is not None]
    for arm in seen:
        least, most = arm.quality[0].context
        note += f" {escape(arm.name)} sees {least} to {most} tokens deep in a row."
    return [
        f"<h2>Loss by position: rows of {length} tokens{escape(times)}</h2>",
        plot,
        table(head, rows),
        note + "</p>",
    ]


def _layers(found: Iterable[ArmResult | Column], colours: Mapping[str, str], healed: Mapping[str, str]) -> str:
    """Hidden states against the model as it was, after every block."""
    layers: dict[str, Layers] = {one.name: one.layers for one in found if one.layers is not None}
    apart = {name: some.errors for name, some in layers.items() if some.errors}
    if not layers:
        return ""
    body = "".join(f"<p>{escape(note)}</p>" for note in left_out(layers.items()))
    if apart:
        series = {name: (range(len(errors)), errors) for name, errors in apart.items()}
        plot = plots.lines(
            series, x="block", y="relative error of the hidden state", colours=colours, dashed=healed, floor=0.0
        )
        rows = [[name, *layer_cells(layers[name])] for name in apart]
        body = plot + table(["", "after the first block", "after the last", "worst (block)"], rows) + body
    return (
        "<h2>Layer by layer</h2>" + body + '<p class="soft">‖h − h₀‖ / ‖h₀‖ after every block, averaged over tokens: '
        "h₀ is the hidden state of the model as it was, for the same tokens, within its trained context. Of the first "
        "seed.</p>"
    )


def _costs(arms: Sequence[ArmResult]) -> str:
    head = ["arm", "parameters", "bytes of weights", "FLOPs/token", f"state bytes/token, {arms[0].cost.size.dtype}", "state bytes", "at tokens", "prefill tokens/s",
            "decode tokens/s", "peak memory, bytes"]  # fmt: skip
    rows = []
    for arm in arms:
        if arm.stage != "as it is":
            continue  # healing changes no cost
        s, speed, memory = arm.cost.size, arm.cost.speed, arm.cost.memory
        rows.append([
            arm.name, f"{s.parameters:,}", si(s.weight_bytes), si(s.flops_per_token), growth(arm.cost, arm.see), si(s.state_bytes),
            f"{s.length:,}",
            "" if speed is None else rate(speed.prefill), "" if speed is None else rate(speed.decode),
            "" if memory is None or memory.bytes is None else si(memory.bytes),
        ])  # fmt: skip
    return table(head, rows)


def _memory_note(result: Result) -> str:
    hows = dict.fromkeys(arm.cost.memory.how for arm in result.arms if arm.cost.memory is not None)
    return escape("".join(f" ({how})" for how in hows))


def _quality_cost(
    found: Sequence[ArmResult | Column],
    length: int,
    colours: Mapping[str, str],
    healed: Mapping[str, str],
    rivals: set[str],
) -> str:
    """nats/token of all that were scored on the same rows against what each costs."""
    sizes = [one.cost.size for one in found]
    kinds = {
        f"state bytes/token, {sizes[0].dtype}": [size.state_bytes / length for size in sizes],
        "parameters": [float(size.parameters) for size in sizes],
        "bytes of weights": [float(size.weight_bytes) for size in sizes],
        "FLOPs/token": [size.flops_per_token for size in sizes],
    }
    apart = {kind: costs for kind, costs in kinds.items() if len(set(costs)) > 1}
    same = [f"{kind} ({si(costs[0])})" for kind, costs in kinds.items() if kind not in apart]
    body = f"<p>The same for all: {escape(', '.join(same))}.</p>" if same else ""
    if apart:
        marks = [
            plots.Mark(
                one.name, across, one.nats or 0.0, healed.get(one.name, one.name) in rivals, healed.get(one.name)
            )
            for one, across in zip(found, zip(*apart.values(), strict=True), strict=True)
        ]
        body = plots.ladder(marks, xs=list(apart), y="nats/token", colours=colours) + body
        body += (
            '<p class="soft">Lower and further left is better. Hollow: a trivial rival. A line leads from what was swapped '
            "to the same when healed. State: what decoding a whole row remembers, divided by its tokens.</p>"
        )
    return f"<h2>Quality against cost: rows of {length} tokens</h2>" + body


def _verdicts(verdicts: Iterable[Verdict], staged: bool = True) -> str:
    """staged: whether the rival went through the arm's stage too."""
    rows = []
    for v in verdicts:
        stage = "" if v.stage == "as it is" else f", {v.stage}"
        spread = "unknown: one seed" if v.spread is None else f"{v.spread:.4f}"
        error = "unknown: one row" if v.error is None else f"{v.error:.4f}"
        word = f'<span class="{v.outcome.split()[0]}">{escape(v.outcome)}</span>'
        rows.append([escape(v.arm + stage), word, escape(v.rival + stage * staged), f"{v.gap:+.4f}", spread, error])
    head = ["arm", "outcome", "rival", "gap, nats/token", "spread over seeds", "error over rows"]
    return table(head, rows, safe=True) if rows else ""


def _changed(arms: Iterable[ArmResult]) -> str:
    return "".join(
        f"<details open><summary>{escape(arm.name)}</summary>{_changes(arm.diff, arm.moves)}</details>"
        for arm in arms
        if (arm.diff or arm.moves) and arm.stage == "as it is"
    )


def _changes(diff: Iterable[tuple[str, Any, Any]], moves: Iterable[Move]) -> str:
    rows = [[path, "" if old is None else str(old), "" if new is None else str(new)] for path, old, new in diff]
    groups: dict[tuple[str, str], list[Move]] = {}
    for move in moves:
        groups.setdefault((move.exactness, move.how), []).append(move)
    became = [
        [f"{exactness}: {how}", len(some), f"{sum(m.count for m in some):,}", _worst(some)]
        for (exactness, how), some in groups.items()
    ]
    weights = table(["weights", "parts", "scalars", "largest error"], became) if became else ""
    return table(["spec", "from", "to"], rows) + weights


def _worst(moves: Iterable[Move]) -> str:
    errors = [move.error for move in moves if move.error is not None]
    return f"{max(errors):.3g}" if errors else ""


def _sources(result: Result) -> str:
    facts = "".join(f"<p>{escape(str(k))}: <code>{escape(str(v))}</code></p>" for k, v in result.text.items())
    blocks = (("spec of the model", result.spec), ("recipe", result.recipe))
    more = (
        f"<details><summary>{name}</summary><pre>{escape(json.dumps(data, indent=1, ensure_ascii=False, default=str))}</pre></details>"
        for name, data in blocks
    )
    return facts + "".join(more)


def _samples(result: Result) -> str:
    out = []
    for prompt in dict.fromkeys(s.prompt for s in result.samples):
        out.append(f"<p>after <code>{escape(prompt)}</code></p>")
        rows = [[escape(s.arm), f"<pre>{escape(s.text)}</pre>"] for s in result.samples if s.prompt == prompt]
        out.append(table(["arm", "text"], rows, safe=True, text=(1,)))
    return "".join(out)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, safe: bool = False, text: Sequence[int] = ()) -> str:
    """An HTML table. safe: cells are HTML already. text: columns that hold running text."""
    kind = ['class="text"' if i in text else "" for i in range(len(head))]
    top = "".join(f"<th {k}>{escape(name)}</th>" for name, k in zip(head, kind, strict=True))
    lines = (
        "".join(f"<td {k}>{cell if safe else escape(str(cell))}</td>" for cell, k in zip(row, kind, strict=True))
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
