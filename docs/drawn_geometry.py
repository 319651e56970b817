"""The pictures of algorithms/geometry.md."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from matplotlib.figure import Figure

from dovetail import geometry as geo
from dovetail.cli.algo_geometry import calipers, outline
from dovetail.geometry import Shape
from dovetail.report.plots import COLOURS


def measures() -> Figure:
    """Forty points: their convex hull, the farthest and the closest two, the least rectangle and the smallest circle."""
    points = torch.randn(40, 2, generator=torch.Generator().manual_seed(4)) * torch.tensor([2.0, 1.0])
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axes = figure.subplots()
    cloud = Shape("points", points.double())
    outline(axes, cloud, COLOURS[0])
    calipers(axes, cloud)
    axes.set_aspect("equal", "datalim")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def clipping() -> Figure:
    """A rotated box clipped by another, which is convex; and two dented polygons, whose common area is in three pieces."""
    angle = torch.tensor([0.3, 1.0])
    x = torch.tensor([-1.6, 1.6, 1.6, -1.6]) + torch.zeros(2, 1)
    y = torch.tensor([-0.8, -0.8, 0.8, 0.8]) + torch.zeros(2, 1)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    boxes = torch.stack([x * cos - y * sin, x * sin + y * cos], -1).double()
    comb = torch.tensor(
        [[0, 0], [5, 0], [5, 3], [4, 3], [4, 1], [3, 1], [3, 3], [2, 3], [2, 1], [1, 1], [1, 3], [0, 3]]
    )
    band = torch.tensor([[-0.5, 1.4], [2.5, 2.0], [5.5, 1.4], [5.5, 2.2], [2.5, 2.7], [-0.5, 2.2]])
    found = geo.polygon_intersection(*boxes[:, None])
    pairs = ((boxes, found), ((comb, band), geo.simple_intersection(comb, band)))
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    for axes, (two, (pieces, count)) in zip(figure.subplots(1, 2), pairs, strict=True):
        for polygon, colour in zip(two, COLOURS, strict=False):
            outline(axes, Shape("polygon", polygon), colour)
        for piece, n in zip(pieces, count.tolist(), strict=True):
            axes.fill(*piece[:n].T.tolist(), color=COLOURS[7], alpha=0.6, lw=0)
        axes.set_aspect("equal", "datalim")
    return figure


def half_planes() -> Figure:
    """Seven half-planes, their borders as lines with a short mark to the side that is in, and what is in all of them."""
    angle = torch.tensor([0.2, 1.1, 1.9, 2.9, 3.9, 4.6, 5.6], dtype=torch.float64)
    planes = torch.stack([angle.cos(), angle.sin(), torch.tensor([1.5, 1.0, 1.9, 1.2, 1.0, 1.6, 1.3])], -1)
    found = geo.half_plane_intersection(planes, torch.tensor([-3.0, -3, 3, 3]))
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes = figure.subplots()
    for a, b, c in planes.tolist():
        foot, along = (a * c, b * c), (-b, a)
        axes.plot(*([f - 9 * d, f + 9 * d] for f, d in zip(foot, along, strict=True)), color=COLOURS[7], lw=1)
        axes.plot(*([f, f - 0.25 * n] for f, n in zip(foot, (a, b), strict=True)), color=COLOURS[7], lw=2)
    outline(axes, Shape("polygon", found.points), COLOURS[1])
    axes.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    return figure


def simplified() -> Figure:
    """A coast of 400 points, and what stays of it within two tolerances."""
    rng = torch.Generator().manual_seed(2)
    t = torch.linspace(0, 1, 400, dtype=torch.float64)
    rough = torch.zeros_like(t)
    for octave in range(1, 8):
        rough += torch.sin(2 * math.pi * (2**octave * t + torch.rand(1, generator=rng))) / 2**octave
    coast = torch.stack([6 * t, rough], -1)
    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*coast.T.tolist(), color=COLOURS[7], lw=0.8, label="400 points")
    for tolerance, colour in ((0.05, COLOURS[0]), (0.2, COLOURS[1])):
        line = geo.simplify(coast, tolerance).points
        axes.plot(*line.T.tolist(), "o-", color=colour, lw=1, ms=2.5, label=f"within {tolerance}: {len(line)}")
    axes.set_aspect("equal", "datalim")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "measures": measures, "clipping": clipping, "half_planes": half_planes, "simplified": simplified,
}  # fmt: skip
