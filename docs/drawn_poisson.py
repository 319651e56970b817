"""The pictures of algorithms/poisson.md."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from matplotlib.figure import Figure

from dovetail.report.plots import COLOURS
from dovetail.stats import PoissonProcess, arrival_counts, dispersion_test
from dovetail.stats.tails import chi_square_quantile, poisson_log_probability


def arrivals() -> Figure:
    """Arrivals of a rate that swings like a day, and how many came in spans, beside what is expected."""
    length, spans = 48.0, 48
    process = PoissonProcess(lambda t: 12 * (1 - torch.cos(2 * math.pi * t / 24)), bound=24.0)
    times = process.arrivals(length, 0)
    edges = torch.linspace(0, length, spans + 1, dtype=torch.float64)
    fit = PoissonProcess.fit(times, edges=edges)
    fine = torch.linspace(0, length, 400, dtype=torch.float64)
    figure = Figure(figsize=(8.6, 3.8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 5))
    upper.vlines(times, 0, 1, color=COLOURS[0], lw=0.4)
    upper.set(yticks=[], ylabel="arrivals")
    middle = (edges[1:] + edges[:-1]) / 2
    error = torch.stack([fit.rates - fit.low, fit.high - fit.rates])
    lower.errorbar(middle, fit.rates, error, fmt="o", ms=3, lw=0.8, color=COLOURS[0], label="fit, 95% intervals")
    lower.plot(fine, 12 * (1 - torch.cos(2 * math.pi * fine / 24)), color=COLOURS[1], label="the rate")
    lower.set(xlabel="hours", ylabel="arrivals an hour")
    lower.legend(frameon=False)
    return figure


def patterns() -> Figure:
    """Three logs of one rate: too even, Poisson and in bunches, with their indices of dispersion."""
    rng, length = torch.Generator().manual_seed(1), 40.0
    parents = PoissonProcess(1.25).arrivals(length - 0.4, 4)
    logs = {
        "a comb": torch.linspace(0.05, length - 0.3, 190, dtype=torch.float64) + 0.1 * torch.rand(190, generator=rng),
        "Poisson": PoissonProcess(5.0).arrivals(length, 0),
        "bunches": (parents[:, None] + 0.3 * torch.rand(len(parents), 4, generator=rng)).flatten(),
    }
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    for i, (axes, (name, times)) in enumerate(zip(figure.subplots(3, 1, sharex=True), logs.items(), strict=True)):
        counts = arrival_counts(times, torch.linspace(0, length, 41, dtype=torch.float64))
        test = dispersion_test(counts)
        axes.vlines(times, 0, 1, color=COLOURS[i], lw=0.8)
        index = test.statistic / (len(counts) - 1)
        axes.set(yticks=[], title=f"{name}: index of dispersion {index:.2f}, p = {test.p:.2g}")
        axes.title.set_fontsize(9)
    axes.set_xlabel("seconds")
    return figure


def coverage() -> Figure:
    """How often the 95% interval has the true rate in it, against the expected count: Garwood's, and n ± 1.96 √n."""
    means = torch.linspace(0.2, 20, 500, dtype=torch.float64)
    n = torch.arange(0, 90, dtype=torch.float64)
    p = poisson_log_probability(n, means[:, None]).exp()
    exact = (chi_square_quantile(0.025, 2 * n) / 2, chi_square_quantile(0.975, 2 * n + 2) / 2)
    usual = (n - 1.96 * n.sqrt(), n + 1.96 * n.sqrt())
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for (low, high), label, colour in ((exact, "Garwood", COLOURS[0]), (usual, "n ± 1.96 √n", COLOURS[1])):
        inside = (low <= means[:, None]) & (means[:, None] <= high)
        axes.plot(means, (p * inside).sum(-1), color=colour, lw=1, label=label)
    axes.axhline(0.95, color="grey", ls=":")
    axes.set(xlabel="expected count", ylabel="how often it is inside", ylim=(0.6, 1.005))
    axes.legend(frameon=False)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {"arrivals": arrivals, "patterns": patterns, "coverage": coverage}
