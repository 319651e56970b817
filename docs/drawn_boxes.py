"""The pictures of algorithms/boxes.md."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from torch import Tensor

import dovetail.geometry as geo
from dovetail.report.plots import COLOURS


def overlap() -> Figure:
    """Two rotated boxes and the polygon that they share, for three positions, with IoU and the area shared."""
    pairs = (
        ((0.0, 0.0, 6.0, 3.0, 0.3), (1.5, 0.8, 5.0, 2.5, 1.2)),
        ((0.0, 0.0, 4.0, 4.0, 0.0), (0.0, 0.0, 4.0, 4.0, math.pi / 4)),
        ((0.0, 0.0, 6.0, 3.0, 0.4), (0.2, -0.1, 6.1, 2.9, 0.45)),
    )
    figure = Figure(figsize=(8.6, 3.0), layout="constrained")
    for axes, pair in zip(figure.subplots(1, 3), pairs, strict=True):
        a, b = torch.tensor(pair, dtype=torch.float64)
        corners = [geo.rotated_to_corners(box) for box in (a, b)]
        points, count = geo.polygon_intersection(corners[0], corners[1])
        shared = points.reshape(-1, 2)[: int(count)]
        for ring, colour in zip(corners, COLOURS, strict=False):
            axes.add_patch(Polygon(ring.numpy(), fill=False, ec=colour, lw=1.4))
        axes.add_patch(Polygon(shared.numpy(), fc=COLOURS[2], alpha=0.35, lw=0))
        axes.plot(*shared.T, "o", color=COLOURS[2], ms=3.5)
        iou = float(geo.rotated_iou(a, b, pairwise=False))
        axes.set_title(f"IoU {iou:.4f}, area {float(geo.polygon_area(shared)):.3f}", fontsize=9)
        axes.set(aspect="equal", xlim=(-4, 5), ylim=(-3.6, 3.9))
    return figure


def _crowd() -> tuple[Tensor, Tensor]:
    """Detections around four objects: (40, 5), (40,)."""
    rng = torch.Generator().manual_seed(4)
    objects = torch.tensor(
        [[20.0, 20, 26, 10, 0.4], [30, 27, 24, 9, 1.9], [62, 22, 30, 12, -0.5], [60, 50, 20, 20, 0.2]]
    )
    boxes = objects.repeat(10, 1) + torch.randn(40, 5, generator=rng) * torch.tensor([1.6, 1.6, 1.5, 1.0, 0.09])
    return boxes.double(), (0.35 + 0.6 * torch.rand(40, generator=rng)).double()


def suppression() -> Figure:
    """Forty detections of four objects; those that greedy suppression keeps; the scores that matrix NMS leaves."""
    boxes, scores = _crowd()
    kept = geo.rotated_nms(boxes, scores, 0.3)
    lowered = geo.matrix_nms(geo.rotated_iou(boxes, boxes), scores, sigma=0.1)
    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    titles = f"{len(boxes)} detections", f"rotated_nms: {len(kept)} kept", "matrix_nms: opacity is the score"
    for axes, title in zip(figure.subplots(1, 3), titles, strict=True):
        shown = kept if "kept" in title else torch.arange(len(boxes))
        opacity = lowered if "opacity" in title else scores
        for i in shown.tolist():
            ring = geo.rotated_to_corners(boxes[i]).numpy()
            axes.add_patch(Polygon(ring, fill=False, ec=COLOURS[i % 4], lw=1.2, alpha=min(1.0, float(opacity[i]))))
        axes.set_title(title, fontsize=9)
        axes.set(aspect="equal", xlim=(0, 85), ylim=(0, 68))
    return figure


def _pixels(axes: Axes, mask: Tensor, colour: str) -> None:
    squares = [Rectangle((c, r), 1, 1) for r, c in mask.nonzero().tolist()]
    axes.add_collection(PatchCollection(squares, fc=colour, alpha=0.35, ec="none"))


def masks() -> Figure:
    """A polygon with a hole; the pixels whose centres it has; the rings around those; their runs, column by column."""
    outline = torch.tensor([[1.2, 2.1], [8.7, 0.6], [13.3, 4.9], [10.4, 10.2], [3.1, 9.3]])
    hole = torch.tensor([[5.2, 3.9], [8.8, 3.4], [9.3, 6.8], [5.9, 7.1]])
    mask = geo.polygons_to_mask([outline, hole], 11, 15)
    rle = geo.rle_encode(mask)
    assert isinstance(rle, dict)
    figure = Figure(figsize=(8.6, 2.9), layout="constrained")
    drawn, traced, runs = figure.subplots(1, 3)
    _pixels(drawn, mask, COLOURS[0])
    for ring in (outline, hole):
        drawn.add_patch(Polygon(ring.numpy(), fill=False, ec=COLOURS[1], lw=1.3))
    rows, columns = torch.meshgrid(torch.arange(11), torch.arange(15), indexing="ij")
    drawn.plot(columns.flatten() + 0.5, rows.flatten() + 0.5, ".", color=COLOURS[7], ms=1.5)
    drawn.set_title(f"polygon -> mask: {int(geo.mask_area(mask))} centres inside", fontsize=9)
    rings = geo.mask_to_polygons(mask)
    for ring, colour in zip(rings, (COLOURS[2], COLOURS[3]), strict=True):
        traced.add_patch(Polygon(ring.numpy(), fill=False, ec=colour, lw=1.3))
        traced.plot(*ring.T, "o", color=colour, ms=2.5)
    traced.set_title("mask -> rings: areas " + " ".join(f"{float(geo.signed_area(r)):+.0f}" for r in rings), fontsize=9)
    _pixels(runs, mask, COLOURS[0])
    edges = torch.tensor(geo.rle_encode(mask, compressed=False)["counts"]).cumsum(0).tolist()  # pyright: ignore
    for number, place in enumerate(edges[:-1]):
        column, row = divmod(place, 11)
        runs.plot([column, column + 1], [row, row], color=COLOURS[1 if number % 2 else 2], lw=1.6)
    runs.set_title("mask -> run lengths, column by column", fontsize=9)
    runs.set_xlabel(rle["counts"].decode(), fontsize=7)
    for axes in (drawn, traced, runs):
        axes.set(aspect="equal", xlim=(0, 15), ylim=(11, 0))
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {"overlap": overlap, "suppression": suppression, "masks": masks}
