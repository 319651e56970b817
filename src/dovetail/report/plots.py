"""Plots as inline SVG that follows the page's own text colour, so that it reads on light and on dark."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

_INK = "#010203"  # drawn in this, then replaced by the page's colour
COLOURS = ("#2f6fdb", "#d9622b", "#2d9d6b", "#b04ac0", "#c8951a", "#d13f5c", "#2aa5b8", "#7d8590", "#8a6d3b", "#5a5fd6")


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    mark: float | None = None,
    mark_is: str = "",
) -> str:
    """Curves by name; mark: where a vertical line stands, and what it is."""
    figure, axes = _figure()
    for i, (name, (across, up)) in enumerate(series.items()):
        style = "--" if i >= len(COLOURS) else "-"
        axes.plot(
            across, up, style, color=COLOURS[i % len(COLOURS)], label=name, marker="o", markersize=3, linewidth=1.6
        )
    if mark is not None:
        axes.axvline(mark, color=_INK, linewidth=0.8, linestyle=":")
        axes.annotate(
            mark_is,
            (mark, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -10),
            textcoords="offset points",
            color=_INK,
        )
    return _finished(figure, axes, x, y)


def points(series: Mapping[str, tuple[float, float]], *, x: str, y: str, log: bool = True) -> str:
    """One point a name."""
    figure, axes = _figure()
    for i, (name, (across, up)) in enumerate(series.items()):
        axes.plot(
            [across], [up], "os^Dv"[i // len(COLOURS) % 5], color=COLOURS[i % len(COLOURS)], label=name, markersize=7
        )
    if log and all(across > 0 for across, _ in series.values()):
        axes.set_xscale("log")
    return _finished(figure, axes, x, y)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.0), layout="constrained")
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
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dovetail", "text.color": _INK}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")
