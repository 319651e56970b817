"""Reports in the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from dovetail.report.measure import Bucket

if TYPE_CHECKING:
    from dovetail.report.arms import Verdict
    from dovetail.report.compare import ArmResult, Result
    from dovetail.report.cost import Cost
    from dovetail.report.swap import Report

WIDTH = 100  # columns, where a file or a pipe has no width of its own
_MARK = {"beats its trivial rival": "green", "loses to its trivial rival": "bold red", "unresolved": "yellow"}


def swap_report(report: Report) -> Group:
    """What changed, what became of the weights, and the columns side by side."""
    changed = _table("changed", "from", "to")
    for path, old, new in report.diff:
        changed.add_row(path, _said(old), _said(new))
    moves = _table("weights", "how", "parts", "scalars")
    groups: dict[tuple[str, str], list[int]] = {}
    for move in report.moves:
        groups.setdefault((move.exactness, move.how), []).append(move.count)
    for (exactness, how), counts in groups.items():
        moves.add_row(exactness, how, str(len(counts)), f"{sum(counts):,}")
    kept = f"{len(report.carried)} tensors carried, {len(report.reinitialised)} with anything re-initialised, "
    lines: list[Any] = [changed, Text(kept + f"{len(report.dropped)} dropped")]
    if report.moves:
        lines.append(moves)
    lines.append(_columns(report))
    lines.append(Text(computed(report.computed_in, report.columns[0].cost), style="dim"))
    lines += [Text(note, style="dim") for note in bounded((c.name, c.see) for c in report.columns)]
    return Group(*lines, Text(f"rival: {report.rival}"), *verdict_lines(report.verdicts))


def _columns(report: Report) -> Table:
    table = _table(f"at {report.length} tokens", *(c.name for c in report.columns), right=len(report.columns))
    dtype = report.columns[0].cost.size.dtype
    facts: list[tuple[str, Any]] = [
        ("nats/token", lambda c: None if c.nats is None else f"{c.nats:.4f}"),
        ("KL from before, nats/token", lambda c: None if c.quality is None or c.quality.kl is None else f"{c.quality.kl:.4f}"),
        ("parameters", lambda c: f"{c.cost.size.parameters:,}"),
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
            facts.insert(1 + i, (f"  at {bucket.start}-{bucket.stop - 1}", _position(i)))
    for name, read in facts:
        cells = [read(c) for c in report.columns]
        if any(cell is not None for cell in cells):
            table.add_row(name, *("-" if cell is None else cell for cell in cells))
    return table


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


def comparison(result: Result) -> Group:
    """Loss by position, state and speed first; orders; samples last."""
    lines: list[Any] = [Text(result.title, style="bold")]
    for length in dict.fromkeys(arm.length for arm in result.arms):
        here = [arm for arm in result.arms if arm.length == length]
        spans = [f"{b.start}-{b.stop - 1}" for b in merged(averaged(here[0]))]
        times = "" if result.context is None else f" ({length / result.context:g}x the trained context)"
        table = _table(
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
            nats = (f"{b.nats:.3f}" for b in merged(averaged(arm)))
            table.add_row(arm.name, f"{arm.nats:.4f}", spread, *nats, kl(arm))
        lines.append(table)
    legend = (
        "spread: over seeds, ? where one seed cannot tell it. KL: from the model as it was, within its trained context."
    )
    lines.append(Text(legend, style="dim"))
    lines += [Text(""), _costs(result), Text(computed(result.dtype, result.arms[0].cost), style="dim")]
    lines += [Text(note, style="dim") for note in bounded((a.name, a.see) for a in result.arms)]
    lines += [
        Text(""),
        Text("orders", style="bold"),
        *verdict_lines(result.verdicts),
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


def _costs(result: Result) -> Table:
    table = _table(
        "arm", "state B/token", "state", "prefill tok/s", "decode tok/s", "peak", right=5, title="state and speed"
    )
    for arm in result.arms:
        if arm.stage != "as it is":
            continue  # healing changes no cost
        cost = arm.cost
        peak = None if cost.memory is None else cost.memory.bytes
        table.add_row(
            arm.name,
            growth(cost, arm.see),
            si(cost.size.state_bytes) + "B",
            "-" if cost.speed is None else rate(cost.speed.prefill),
            "-" if cost.speed is None else rate(cost.speed.decode),
            "-" if peak is None else si(peak) + "B",
        )
    return table


def computed(dtype: str, cost: Cost) -> str:
    """What the numbers were computed in, and what the bytes are of."""
    held = cost.size.dtype
    return f"computed in {dtype}; bytes are of weights and state in {held}."


def growth(cost: Cost, see: int | None) -> str:
    """State bytes per further token: none where the model is shown `see` tokens at a time."""
    return "0" if see is not None else f"{cost.size.state_bytes_per_token:,.0f}"


def bounded(shown: Iterable[tuple[str, int | None]]) -> list[str]:
    """Why a truncated arm's state does not grow, for those (name, see) that are truncated."""
    return [
        f"{name}: 0 bytes per further token, as it is shown at most {see} at a time: its state is bounded."
        for name, see in shown
        if see is not None
    ]


def averaged(arm: ArmResult) -> list[Bucket]:
    """Loss by position, averaged over seeds."""
    return [
        Bucket(b[0].start, b[0].stop, sum(x.nats for x in b) / len(b), sum(x.count for x in b))
        for b in zip(*(q.by_position for q in arm.quality), strict=True)
    ]


def kl(arm: ArmResult) -> str:
    """KL from the model as it was, of the first seed."""
    found = arm.quality[0].kl
    return "-" if found is None else f"{found:.4f}"


def verdict_lines(verdicts: Iterable[Verdict]) -> list[Text]:
    """Each verdict, and below it the numbers that it rests on."""
    out = []
    for v in verdicts:
        stage = "" if v.stage == "as it is" else ", healed"
        line = Text(f"{v.arm}{stage}: ")
        line.append(v.outcome, style=_MARK[v.outcome])
        spread = "unknown (one seed)" if v.spread is None else f"{v.spread:.4f}"
        error = "unknown (one row)" if v.error is None else f"{v.error:.4f}"
        rival = "" if v.rival == "rival" else f" ({v.rival}{stage})"
        line.append(f"{rival}\n  gap {v.gap:+.4f} nats/token; spread over seeds {spread}; error over rows {error}")
        out.append(line)
    return out


def merged(buckets: Sequence[Bucket], count: int = 4) -> list[Bucket]:
    """Neighbours put together until at most `count` are left."""
    per = -(-len(buckets) // count)
    out = []
    for i in range(0, len(buckets), per):
        some = buckets[i : i + per]
        total = sum(b.count for b in some)
        out.append(Bucket(some[0].start, some[-1].stop, sum(b.nats * b.count for b in some) / total, total))
    return out


def si(value: float) -> str:
    """1234567 -> "1.23M"."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.4g}"


def rate(measured: Any) -> str:
    """Tokens/s with its ratio to the one it is set against."""
    return f"{measured.tokens_per_second:,.0f} ({measured.ratio:.2f}±{measured.ratio_spread:.2f}x)"


def as_text(report: Any) -> str:
    """A report as plain text."""
    out = io.StringIO()
    Console(file=out, width=WIDTH, force_terminal=False).print(report)
    return out.getvalue()


def _position(index: int) -> Any:
    return lambda c: None if c.quality is None else f"{merged(c.quality.by_position)[index].nats:.4f}"


def _said(value: Any) -> str:
    return "-" if value is None else str(value)


def _table(*names: str, right: int = 0, title: str | None = None) -> Table:
    table = Table(box=None, header_style="bold", title=title, title_justify="left", title_style="bold", pad_edge=False)
    for i, name in enumerate(names):
        table.add_column(
            name, justify="right" if i >= len(names) - right and right else "left", overflow="fold", no_wrap=i == 0
        )
    return table
