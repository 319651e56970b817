"""Plots as inline SVG that follows the page's own text colour, so that it reads on light and on dark."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dovetail.report.render import si

_INK = "#010203"  # drawn in this, then replaced by the page's colour
COLOURS = ("#2f6fdb", "#d9622b", "#2d9d6b", "#b04ac0", "#c8951a", "#d13f5c", "#2aa5b8", "#7d8590", "#8a6d3b", "#5a5fd6")
_DROPPED = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # no metadata block


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    mark: float | None = None,
    mark_is: str = "",
    like: Mapping[str, str] | None = None,
) -> str:
    """Curves by name. mark: where a vertical line stands, and what it is. like: curves drawn dashed, in the colour of
    the one named."""
    from matplotlib.ticker import FuncFormatter  # here and below: a second to import, and only a page needs it

    figure, axes = _figure()
    colours = _colours(series, like or {})
    for name, (across, up) in series.items():
        style = "--" if name in (like or {}) else "-"
        axes.plot(across, up, style, color=colours[name], label=name, marker="o", markersize=3, linewidth=1.6)
    if mark is not None:
        axes.axvline(mark, color=_INK, linewidth=0.8, linestyle=":")
        axes.annotate(
            mark_is, (mark, 1), xycoords=("data", "axes fraction"), xytext=(4, -10), textcoords="offset points", color=_INK
        )  # fmt: skip
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return _finished(figure, axes, x, y)


def points(series: Mapping[str, tuple[float, float]], *, x: str, y: str, like: Mapping[str, str] | None = None) -> str:
    """One point a name, across on a log scale. like: points drawn hollow, in the colour of the one named."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = _figure()
    colours = _colours(series, like or {})
    marks = dict(zip(dict.fromkeys(colours.values()), "os^DvPX*<>" * 9, strict=False))
    for name, (across, up) in series.items():
        colour = colours[name]
        face = "none" if name in (like or {}) else colour
        axes.plot([across], [up], marks[colour], color=colour, markerfacecolor=face, label=name, markersize=7)
    if all(across > 0 for across, _ in series.values()):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
    return _finished(figure, axes, x, y)


def _colours(names: Mapping[str, Any], like: Mapping[str, str]) -> dict[str, str]:
    own = [name for name in names if like.get(name) not in names]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(own)}
    return {name: colours[name if name in colours else like[name]] for name in names}


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.4, 4.0), layout="constrained")
    return figure, figure.subplots()


def _finished(figure: Any, axes: Any, x: str, y: str) -> str:
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.tick_params(colors=_INK, which="both")
    axes.grid(True, color=_INK, alpha=0.12, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=_INK, fontsize=9)
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "dovetail", "text.color": _INK}):
        figure.savefig(out, format="svg", transparent=True, metadata=_DROPPED)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    own = "p" + hashlib.sha256(svg.encode()).hexdigest()[:8]  # several plots stand in one page: ids must differ
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(y)} by {escape(x)}"', 1)
