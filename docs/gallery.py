"""The pictures and texts of scenes.md: rows of the procedural world, drawn and told by the code. Used by generate.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from dovetail.data import Clips, Scenes, Windows
from dovetail.data.scenes import ACTIONS, SHAPES, Scene
from dovetail.geometry import rotated_to_corners

SHOWN = 23  # the scene whose labels and texts are shown
CLIP = 9


def scenes() -> Figure:
    """The first scenes."""
    figure, axes = plt.subplots(3, 6, figsize=(9, 4.6))
    for axis, scene in zip(axes.flat, Scenes(count=18), strict=True):
        _picture(axis, scene.image)
    figure.tight_layout(pad=0.3)
    return figure


def labels() -> Figure:
    """One scene: its boxes, rotated boxes, masks of what is seen and of the whole things."""
    scene = Scenes()[SHOWN]
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.1))
    for axis, title in zip(axes, ("boxes", "rotated_boxes, polygons", "masks", "full_masks, added up"), strict=True):
        axis.set_title(title, fontsize=9)
    _picture(axes[0], scene.image)
    for label, (x0, y0, x1, y1) in zip(scene.labels, scene.boxes, strict=True):
        axes[0].add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="w"))
        axes[0].text(x0, y0 - 2, SHAPES[label].name, color="w", fontsize=6)
    _picture(axes[1], scene.image)
    for polygon, corners in zip(scene.polygons, _corners(scene), strict=True):
        axes[1].add_patch(Polygon(corners, fill=False, edgecolor="w"))
        axes[1].add_patch(Polygon(polygon, fill=False, edgecolor="0.6", linestyle=":"))
    numbers = np.arange(1, len(scene.labels) + 1)[:, None, None]
    _picture(axes[2], (scene.masks * numbers).max(0))
    _picture(axes[3], scene.full_masks.sum(0))
    figure.tight_layout(pad=0.5)
    return figure


def windows() -> Figure:
    """Six windows, each with what is asked and where to click."""
    figure, axes = plt.subplots(2, 3, figsize=(9.5, 6.8))
    for axis, row in zip(axes.flat, Windows(count=6), strict=True):
        _picture(axis, row.image)
        x0, y0, x1, y1 = row.boxes[row.target]
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="r"))
        axis.plot(*row.point, "r+", markersize=9)
        axis.set_title(row.instruction, fontsize=8)
    figure.tight_layout(pad=0.5)
    return figure


def clips() -> Figure:
    """The frames of a clip, with what happens under each."""
    row = Clips()[CLIP]
    figure, axes = plt.subplots(4, 8, figsize=(9, 5.2))
    for t, axis in enumerate(axes.flat):
        _picture(axis, row.frames[t])
        action = int(row.frame_actions[t])
        axis.set_xlabel(f"{t} {ACTIONS[action - 1] if action else ''}", fontsize=6, color="C3" if action else "0.5")
    figure.suptitle(row.caption, fontsize=7.5)
    figure.tight_layout(pad=0.3)
    return figure


def texts() -> str:
    """What is said of the scene of `labels`, in both languages."""
    english, chinese = (Scenes(language=language)[SHOWN] for language in ("en", "zh"))
    lines = ["| | English | 中文 |", "| --- | --- | --- |"]
    lines += [f"| caption | {english.caption} | {chinese.caption} |"]
    lines += [
        f"| thing {a.object} | {a.text} | {b.text} |" for a, b in zip(english.phrases, chinese.phrases, strict=True)
    ]
    lines += [
        f"| {a.kind} | {a.text} *{a.answer}* | {b.text}*{b.answer}* |"
        for a, b in zip(english.questions, chinese.questions, strict=True)
    ]
    return "\n".join([*lines, ""])


PICTURES: tuple[Callable[[], Figure], ...] = (scenes, labels, windows, clips)


def write(out: Path) -> int:
    """NAME.png of each picture and texts.txt, into the folder `out`; how many pictures there are."""
    out.mkdir(parents=True)
    for painter in PICTURES:
        figure = painter()
        figure.savefig(out / f"{painter.__name__}.png", dpi=110)
        plt.close(figure)
    (out / "texts.txt").write_text(texts(), encoding="utf-8")
    return len(PICTURES)


def _picture(axis: Axes, image: np.ndarray) -> None:
    """An image (3,H,W) or (H,W), in coordinates in which a pixel's centre is at its number and a half."""
    height, width = image.shape[-2:]
    shown = image.transpose(1, 2, 0) if image.ndim == 3 else image
    axis.imshow(shown, interpolation="nearest", extent=(0, width, height, 0), cmap="magma")
    axis.set(xticks=[], yticks=[])


def _corners(scene: Scene) -> np.ndarray:
    return rotated_to_corners(torch.from_numpy(scene.rotated_boxes)).numpy()
