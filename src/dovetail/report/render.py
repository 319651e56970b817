"""What reports in the terminal, and pages, are put together from."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dovetail.report.arms import Verdict
from dovetail.report.cost import Cost
from dovetail.report.measure import Bucket, Layers

WIDTH = 100  # columns, where a file or a pipe has no width of its own
_MARK = {"beats its trivial rival": "green", "loses to its trivial rival": "bold red", "unresolved": "yellow"}


def computed(dtype: str, cost: Cost) -> str:
    """What the numbers were computed in, and what the bytes are of."""
    held = cost.size.dtype
    return f"computed in {dtype}; bytes are of weights and state in {held}."


def layer_cells(layers: Layers | None) -> list[str]:
    """Hidden-state error after the first, the last and the worst block (with its number); dashes where not measured."""
    if layers is None or not layers.errors:
        return ["-"] * 3
    errors = layers.errors
    return [f"{errors[0]:.2g}", f"{errors[-1]:.2g}", f"{errors[layers.worst]:.2g} ({layers.worst})"]


def left_out(measured: Iterable[tuple[str, Layers | None]]) -> list[str]:
    """Why hidden states were not compared, for those (name, layers) where they could not be."""
    return [
        f"{name}: hidden states are left out, {layers.why}."
        for name, layers in measured
        if layers is not None and layers.why
    ]


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


def outcome_lines(verdicts: Iterable[Verdict]) -> list[Text]:
    """A line for all arms that stand alike to the same rival, each with its gap in nats/token."""
    alike: dict[tuple[str, str], list[str]] = {}
    for v in verdicts:
        stage = "" if v.stage == "as it is" else f", {v.stage}"
        alike.setdefault((v.outcome, v.rival), []).append(f"{v.arm}{stage} ({v.gap:+.4f})")
    return [
        Text.assemble((outcome, _MARK[outcome]), f" ({rival}): {'; '.join(arms)}")
        for (outcome, rival), arms in alike.items()
    ]


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


def said(value: Any, digits: int | None = None) -> str:
    """A value, to so many decimals; a dash for None."""
    return "-" if value is None else str(value) if digits is None else f"{value:.{digits}f}"


class Grid(Table):
    """A table whose strings stand as they are: a name may hold what rich would take for markup."""

    def add_row(self, *cells: Any, **how: Any) -> None:
        super().add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), **how)


def grid(*names: str, right: int = 0, title: str | None = None) -> Grid:
    """An empty table with these columns, the last `right` of them flush right."""
    head = None if title is None else Text(title)
    table = Grid(box=None, header_style="bold", title=head, title_justify="left", title_style="bold", pad_edge=False)
    for i, name in enumerate(names):
        table.add_column(
            Text(name),
            justify="right" if i >= len(names) - right and right else "left",
            overflow="fold",
            no_wrap=i == 0,
        )
    return table
