"""The pictures of algorithms/approximation.md."""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.figure import Figure

from dovetail.report.plots import COLOURS
from dovetail.stats import (
    AdaptiveKL,
    Power,
    RunningMean,
    calibrate_temperature,
    constant,
    harmonic,
    iterates,
)


def steps() -> Figure:
    """Distance to the root of tanh(x) = 1/2 seen through noise, by steps of Robbins and Monro, over 200 runs."""
    n, sigma, slope = 1500, 0.5, 0.75
    root = torch.tensor(0.5, dtype=torch.float64).atanh()
    families = {
        "1/n, scaled by the slope": harmonic(1 / slope),
        "1/n, five times smaller": harmonic(1 / slope / 5),
        "n^(-2/3)": Power(1 / slope, 2 / 3),
        "constant 0.2": constant(0.2),
    }
    figure = Figure(figsize=(8.6, 4), layout="constrained")
    axes = figure.subplots()
    at = torch.arange(1, n + 1)

    def draw(errors: list[float], label: str, colour: str, style: str = "-") -> None:
        axes.loglog(at, errors, style, color=colour, label=label, lw=1.4)

    for (label, family), colour in zip(families.items(), COLOURS, strict=False):
        rng = torch.Generator().manual_seed(0)
        path = iterates(
            lambda x, rng=rng: x.tanh() - 0.5 + sigma * torch.randn(x.shape, generator=rng, dtype=x.dtype),
            torch.zeros(200, dtype=torch.float64),
            family,
        )
        errors, averaged, average = [], [], RunningMean()
        for _ in range(n):
            x = next(path)
            errors.append(float((x - root).square().mean().sqrt()))
            averaged.append(float((average.update(x) - root).square().mean().sqrt()))
        draw(errors, label, colour)
        if label == "n^(-2/3)":
            draw(averaged, "its average (Polyak-Ruppert)", colour, "--")
    axes.loglog(at, sigma / slope / at.sqrt(), ":", color="grey", label="the least possible, σ / slope √n")
    axes.set(xlabel="step (log scale)", ylabel="root mean square error (log scale)")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def temperature() -> Figure:
    """Mean loss of a classifier that is three times too sure, against the temperature, and the one that was found."""
    rng = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(2000, 10, generator=rng, dtype=torch.float64)
    labels = torch.multinomial(z.softmax(-1), 1, generator=rng)[:, 0]
    found = calibrate_temperature(3 * z, labels)
    ts = torch.logspace(-0.5, 1.5, 80, dtype=torch.float64)
    nats = [float(torch.nn.functional.cross_entropy(3 * z / t, labels)) for t in ts]
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.semilogx(ts, nats, color=COLOURS[0])
    axes.plot([1, found.temperature], [found.before, found.after], "o", color=COLOURS[1])
    axes.annotate(f"as it is: {found.before:.2f} nats", (1, found.before), xytext=(8, 4), textcoords="offset points")
    axes.annotate(
        f"T = {found.temperature:.2f}: {found.after:.2f} nats", (found.temperature, found.after), xytext=(0, 12),
        textcoords="offset points", ha="center",
    )  # fmt: skip
    axes.set(xlabel="temperature (log scale)", ylabel="nats a label", ylim=(0, 4))
    return figure


def kl() -> Figure:
    """The KL coefficient finding its value, and finding it again when the policy changes half way."""
    rng = torch.Generator().manual_seed(0)
    control, target = AdaptiveKL(0.2, target=6.0), 6.0
    coefficients, seen = [], []
    for step in range(1200):
        looseness = 3.0 if step < 600 else 9.0  # KL of the policy at a coefficient of 1
        seen.append(looseness / control.coefficient + float(torch.randn((), generator=rng)))
        coefficients.append(control.update(seen[-1]))
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(seen, color=COLOURS[0], lw=0.8)
    upper.axhline(target, color="grey", ls=":")
    upper.set(ylabel="KL, nats", ylim=(0, 30))
    lower.plot(coefficients, color=COLOURS[1])
    lower.set(xlabel="batch", ylabel="coefficient β")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {"steps": steps, "temperature": temperature, "kl": kl}
