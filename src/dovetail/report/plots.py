"""Plots as inline SVG that follows the page's own text colour, so that it reads on light and on dark."""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from dovetail.report.render import si

_INK = "#010203"  # drawn in this, then replaced by the page's colour
COLOURS = ("#2f6fdb", "#d9622b", "#2d9d6b", "#b04ac0", "#c8951a", "#d13f5c", "#2aa5b8", "#7d8590", "#8a6d3b", "#5a5fd6")
_SHAPES = "os^DvPX*<>"
_AS_IS = "="  # before a label until the legend stands, which leaves out what begins with a low line
_DROPPED = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # no metadata block


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    mark: float | None = None,
    mark_is: str = "",
    colours: Mapping[str, str],
    dashed: Iterable[str] = (),
    floor: float | None = None,
    log: bool = False,
) -> str:
    """Curves by name, over whole numbers. mark: where a vertical line stands, and what it is. floor: where up begins.
    log: the axis across is one of logarithms, and says so."""
    from matplotlib.ticker import (
        FuncFormatter,
        MaxNLocator,
        NullFormatter,
    )  # here and below: slow to import, and only a page needs it

    figure, axes = _figure()
    for name, (across, up) in series.items():
        style = "--" if name in dashed else "-"
        axes.plot(across, up, style, color=colours[name], label=_AS_IS + name, marker="o", markersize=3, linewidth=1.6)
    if mark is not None:
        axes.axvline(mark, color=_INK, linewidth=0.8, linestyle=":")
        axes.annotate(
            mark_is, (mark, 1), xycoords=("data", "axes fraction"), xytext=(4, -10), textcoords="offset points", color=_INK
        )  # fmt: skip
    if floor is not None:
        axes.set_ylim(bottom=floor)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
        return _finished(figure, [axes], [f"{x} (log scale)"], y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return _finished(figure, [axes], [x], y)


def powers(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    colours: Mapping[str, str],
    dashed: Iterable[str] = (),
) -> str:
    """Curves by name with logarithms both ways, in which a power is a straight line; ticks at the numbers across."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    figure, axes = _figure()
    for name, (across, up) in series.items():
        style = "--" if name in dashed else "-"
        axes.plot(across, up, style, color=colours[name], label=_AS_IS + name, marker="o", markersize=3, linewidth=1.4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({value for across, _ in series.values() for value in across})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1024:g}k" if v % 1024 == 0 else f"{v:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return _finished(figure, [axes], [f"{x} (log scale)"], f"{y} (log scale)")


@dataclass(frozen=True)
class Mark:
    """One way of having a model. across: what it costs, in every panel. up: its quality. hollow: drawn as an outline.

    before: the mark from which a thin line leads here.
    """

    name: str
    across: tuple[float, ...]
    up: float
    hollow: bool = False
    before: str | None = None


def ladder(marks: Sequence[Mark], *, xs: Sequence[str], y: str, colours: Mapping[str, str]) -> str:
    """Panels side by side with one scale up and one legend: the quality of every mark against each of its costs.

    A panel is on a log scale (and says so) where the largest cost is ten times the smallest or more.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    figure, panels = _figure(len(xs))
    places, names = {mark.name: mark for mark in marks}, []
    shapes = _shapes(colours, {mark.name: mark.before for mark in marks if mark.before is not None})
    for i, (axes, x) in enumerate(zip(panels, xs, strict=True)):
        for mark in marks:
            colour = colours[mark.name]
            face = "none" if mark.hollow else colour
            if mark.before is not None:
                start = places[mark.before]
                axes.plot([start.across[i], mark.across[i]], [start.up, mark.up], color=colour, linewidth=0.9)
            size = 7 if mark.before is None else 4.5
            axes.plot(
                [mark.across[i]], [mark.up], shapes[mark.name], color=colour, markerfacecolor=face, label=_AS_IS + mark.name,
                markersize=size, markeredgewidth=1.4,
            )  # fmt: skip
        costs = [mark.across[i] for mark in marks]
        axes.margins(x=0.12)
        if min(costs) > 0 and max(costs) >= 10 * min(costs):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(
                LogLocator(10, subs=(1.0, 2.0, 5.0) if max(costs) < 1e3 * min(costs) else (1.0,))
            )
            axes.xaxis.set_minor_formatter(NullFormatter())
            x += " (log scale)"
        else:
            axes.xaxis.set_major_locator(MaxNLocator(4))
        spell = si if axes.get_xscale() == "log" else _spelled(min(costs), max(costs))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _, spell=spell: spell(value)))
        names.append(x)
    return _finished(figure, panels, names, y)


def _shapes(colours: Mapping[str, str], before: Mapping[str, str]) -> dict[str, str]:
    """A shape for each name: that of `before` where it has one; no two others of one colour have the same."""
    rank = {colour: i for i, colour in enumerate(dict.fromkeys(colours.values()))}
    shapes: dict[str, str] = {}
    used = Counter[str]()
    for name in (name for name in colours if name not in before):
        shapes[name] = _SHAPES[(rank[colours[name]] + used[colours[name]]) % len(_SHAPES)]
        used[colours[name]] += 1
    return shapes | {name: shapes[other] for name, other in before.items()}


def _spelled(low: float, high: float) -> Callable[[float], str]:
    """Numbers between two in one unit, with as many decimals as tell neighbouring ticks apart."""
    unit = si(high)[-1] if si(high)[-1] in "kMGT" else ""
    factor = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[unit]
    step = (high - low) / 4 / factor
    digits = 0 if step <= 0 else max(0, math.ceil(-math.log10(step)))
    return lambda value: f"{value / factor:.{digits}f}{unit}"


def palette(names: Iterable[str], like: Mapping[str, str]) -> dict[str, str]:
    """A colour for each name; that of another one for those in `like`, where the other is here."""
    names = list(names)
    own = [name for name in names if like.get(name) not in names]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(own)}
    return {name: colours[name if name in colours else like[name]] for name in names}


def _figure(panels: int | None = None) -> tuple[Any, Any]:
    """A figure, and its axes: one, or a list of panels that share the axis up."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.4, 4.0), layout="constrained")
    if panels is None:
        return figure, figure.subplots()
    return figure, list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])


def _finished(figure: Any, panels: Sequence[Any], xs: Sequence[str], y: str) -> str:
    from matplotlib.text import Text

    panels[0].set_ylabel(y)
    for axes, x in zip(panels, xs, strict=True):
        axes.set_xlabel(x)
        axes.grid(True, color=_INK, alpha=0.12, linewidth=0.6)
    legend = panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_text(text.get_text().removeprefix(_AS_IS))
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar in a name is one
    return inline(figure, f"{y} by {', '.join(xs)}")


def inline(figure: Any, label: str) -> str:
    """A figure as SVG to stand in a page: what is black in it takes the page's text colour. label: what a screen
    reader says."""
    from matplotlib import rc_context
    from matplotlib.colors import to_hex
    from matplotlib.text import Text

    for axes in figure.axes:
        axes.tick_params(colors=_INK, which="both")
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_INK)
    for text in figure.findobj(Text):
        if to_hex(text.get_color()) == "#000000":
            text.set_color(_INK)
    out = io.StringIO()
    with (
        rc_context({"svg.fonttype": "none", "svg.hashsalt": "dovetail", "text.color": _INK}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's own font has it
        figure.savefig(out, format="svg", transparent=True, metadata=_DROPPED)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    own = "p" + hashlib.sha256(svg.encode()).hexdigest()[:8]  # several plots stand in one page: ids must differ
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
