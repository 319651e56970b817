"""The pictures of algorithms/extrema.md."""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.figure import Figure

from dovetail.report.plots import COLOURS
from dovetail.stats import largest_gap, peaks, sliding_max, sliding_min


def scores() -> torch.Tensor:
    """A detector's scores over 160 frames with four events, (160,)."""
    rng, t = torch.Generator().manual_seed(3), torch.arange(160.0)
    events = ((22, 0.9, 3), (61, 0.7, 5), (75, 0.95, 3), (130, 0.8, 6))
    bumps = sum(height * torch.exp(-(((t - at) / width) ** 2)) for at, height, width in events)
    return bumps + 0.1 * torch.randn(160, generator=rng)


def windows() -> Figure:
    """Scores over time, the largest and smallest of windows of 15, causal and centred."""
    x = scores()
    figure = Figure(figsize=(8.6, 4.4), layout="constrained")
    for axes, align in zip(figure.subplots(2, 1, sharex=True), ("causal", "centred"), strict=True):
        axes.plot(x, color=COLOURS[7], lw=0.9, label="scores")
        axes.step(range(160), sliding_max(x, 15, align=align), where="mid", color=COLOURS[1], label="maximum")
        axes.step(range(160), sliding_min(x, 15, align=align), where="mid", color=COLOURS[0], label="minimum")
        axes.set(title=align, ylabel="score")
        axes.title.set_fontsize(9)
    axes.set_xlabel("frame")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def picked() -> Figure:
    """The peaks of the scores: the largest of 15 frames, above the middle of the largest gap of such maxima."""
    x = scores()
    maxima = peaks(x, 15)
    gap = largest_gap(x[maxima])
    found = peaks(x, 15, float(gap.threshold))
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(6, 1), sharey=True)
    left.plot(x, color=COLOURS[7], lw=0.9)
    at = torch.arange(160)
    left.plot(at[maxima & ~found], x[maxima & ~found], "o", ms=4, color=COLOURS[0], mfc="none", label="largest of 15")
    left.plot(at[found], x[found], "o", color=COLOURS[1], label="and above the gap")
    left.set(xlabel="frame", ylabel="score")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    right.hlines(x[maxima], 0, 1, color=COLOURS[0], lw=1)
    for axes in (left, right):
        axes.axhspan(float(gap.low), float(gap.high), color=COLOURS[2], alpha=0.15, lw=0)
        axes.axhline(float(gap.threshold), color=COLOURS[2], ls="--", lw=1)
    right.set(xticks=[], xlabel="maxima")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {"windows": windows, "picked": picked}
