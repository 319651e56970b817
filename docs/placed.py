"""Where an adapter's parameters sit: a small decoder, adapted and drawn to scale. Used by generate.py and pictures.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

import dovetail as dt
from dovetail.parts.adaptable import adaptables
from dovetail.parts.weights import Linear

SMALL: dict[str, Any] = {
    "kind": "decoder", "vocab": 96, "dim": 64, "depth": 2,
    "blocks": {
        "mixer": {"kind": "attention", "heads": 4, "kv_heads": 2, "position": {"kind": "rope"}},
        "feedforward": {"kind": "glu", "hidden": 96},
    },
}  # fmt: skip
ORDER = ("front", "embedding", "blocks.0.mixer", "blocks.0.places.mixer", "blocks.0.feedforward", "blocks.0.places")
FROZEN, TRAINS, OTHER, OFF = "#dfe3ea", "#f28e2b", "#fbd9b5", "#b8c4d6"
UNITS = 95  # entries of a weight to an inch of the picture


def adapted(spec: Any) -> Any:
    """The small decoder with this adapter on it as "default", and whatever that stands on."""
    model = dt.build(SMALL)
    for name in spec.needs:
        dt.adapt(model, "bottleneck", name=name)
    return dt.adapt(model, spec)


def places(spec: Any) -> Figure:
    """Weights of one block (grey) and, beside them, what stands around them: trains (orange) or is frozen (pale)."""
    model = adapted(spec)
    rows = [(path, place) for path, place in adaptables(model) if not path.startswith("blocks.1")]
    rows = [(path, place) for path, place in rows if place.attached() or _weight_shape(place)]
    rows.sort(key=lambda row: next((i for i, start in enumerate(ORDER) if row[0].startswith(start)), len(ORDER)))
    drawn: list[tuple[str, Any, float]] = []
    height = 0.0
    for path, place in rows:
        tall = max((_weight_shape(place) or (24, 0))[0], *(h for _, _, h in _boxes(place)), 0)
        drawn.append((path, place, height))
        height += tall + 40
    widest = max(430.0, *(228 + sum(_advance(label, w) for label, w, _ in _boxes(place)) for _, place, _ in drawn))
    figure = plt.figure(figsize=(widest / UNITS, (height + 30) / UNITS))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(-10, widest - 10), ylim=(height, -30))
    ax.axis("off")
    ours = [p for name, p in model.named_parameters() if p.requires_grad]
    base = sum(p.numel() for p in dt.build(SMALL, weights=False).parameters())
    said = f"{spec.kind}: {sum(p.numel() for p in ours):,} parameters train beside {base:,}"
    ax.text(0, -14, f"{said}\n(block 0 of {SMALL['depth']} shown, to scale)", fontsize=8.5, va="center", weight="bold")
    for path, place, y in drawn:
        _row(ax, path, place, y)
    return figure


def _row(ax: Axes, path: str, place: Any, y: float) -> None:
    shape = _weight_shape(place)
    if shape:
        stored = getattr(place, "stored", None)
        ax.text(0, y + 10, f"{path}  {_size(shape)}" + (f", {stored.storage.kind}" if stored else ""), fontsize=7)
        ax.add_patch(_rectangle(0, y + 14, shape[1], shape[0], OFF if stored else FROZEN))
        at = 0
        for _, rows in place.parts if isinstance(place, Linear) else ():  # maps that are fused in one weight
            ax.plot([0, shape[1]], [y + 14 + at] * 2, color="white" if at else "none", lw=1)
            at += rows
    else:
        ax.text(0, y + 10, path, fontsize=7)
        ax.add_patch(Rectangle((0, y + 14), 96, 24, fc="none", ec="grey", lw=0.8, ls="--"))
        ax.text(48, y + 26, type(place).__name__.removesuffix("Module"), fontsize=7, ha="center", va="center")
    x = 208.0
    for (label, width, height), group in zip(_boxes(place), _groups(place), strict=True):
        down = _first_row(place) if shape and height > width else 0  # beside the rows that it is for
        _box(ax, x, y + down, label, width, height, group)
        x += _advance(label, width)


def _box(ax: Axes, x: float, y: float, label: str, width: float, height: float, group: list[Tensor | None]) -> None:
    tensors = [t for t in group if t is not None]
    trains = any(t.requires_grad for t in tensors) if tensors else True
    buffer = bool(tensors) and not any(isinstance(t, nn.Parameter) for t in tensors)
    ax.text(x, y + 11, label, fontsize=6.5, linespacing=0.95, va="bottom")
    patch = _rectangle(x, y + 14, width, height, TRAINS if trains else OFF if buffer else OTHER)
    if not tensors or _many(tensors):
        patch.set(ls="--", fc="none", ec=TRAINS)
    ax.add_patch(patch)
    at = 0.0
    for t in tensors if len(tensors) > 1 and not _many(tensors) else ():  # one under the other, a segment each
        ax.plot([x, x + width], [y + 14 + at] * 2, color="white", lw=1)
        at += t.shape[0]


def _first_row(place: Any) -> int:
    return min((s[0][0] for a in place.attached().values() if (s := getattr(a, "segments", None))), default=0)


def _groups(place: Any) -> list[list[Tensor | None]]:
    return [tensors for _, tensors in _named(place)]


def _boxes(place: Any) -> list[tuple[str, float, float]]:
    """(label, width, height) of every box beside a place."""
    found = []
    for name, tensors in _named(place):
        real = [t for t in tensors if t is not None]
        if not real:
            found.append((f"{name}\nreads the front's", 60.0, 24.0))
        elif _many(real):
            found.append((f"{name}.*\n{sum(t.numel() for t in real):,} in {len(real)}", 60.0, 60.0))
        elif real[0].dim() < 2:
            length = sum(t.numel() for t in real)
            across = len(real) == 1 and length == getattr(place, "in_features", 0) != getattr(place, "out_features", 0)
            found.append((f"{name}\n{length}", *((float(length), 4.0) if across else (4.0, float(length)))))
        else:
            shape = (sum(t.shape[0] for t in real), real[0].shape[1])
            found.append((f"{name}\n{_size(shape)}", float(shape[1]), float(shape[0])))
    return found


def _named(place: Any) -> Iterator[tuple[str, list[Tensor | None]]]:
    """(name, tensors) of every box: b0, b1, ... are one, as are the tensors of a network."""
    several = len(place.attached()) > 1
    for adapter, module in place.attached().items():
        mark = f"{adapter}." if several else ""
        groups: dict[str, list[tuple[str, Tensor]]] = {}
        anchors = [(n, b) for n, b in module.named_buffers() if n.startswith("start_")]
        for name, tensor in [*module.named_parameters(), *anchors]:
            head, _, rest = name.partition(".")
            groups.setdefault(head if rest else re.sub(r"\d+$", "", name), []).append((name, tensor))
        for head, found in groups.items():
            names = [name for name, _ in found]
            last = re.sub(r"\D+", "", names[-1])
            said = names[0] if len(names) == 1 else head if "." in names[0] else f"{names[0]}–{last}"
            yield mark + said, [tensor for _, tensor in found]
        if not groups:
            yield mark + type(module).__name__, [None]


def _many(tensors: list[Tensor]) -> bool:
    return len(tensors) > 1 and len({(t.dim(), *t.shape[1:]) for t in tensors}) > 1


def _advance(label: str, width: float) -> float:
    return max(width, 4.6 * max(map(len, label.split("\n")))) + 10


def _weight_shape(place: Any) -> tuple[int, int] | None:
    if isinstance(place, Linear):
        return place.out_features, place.in_features
    weight = getattr(place, "weight", None)
    return (weight.shape[0], weight.shape[1]) if isinstance(weight, Tensor) and weight.dim() == 2 else None


def _size(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _rectangle(x: float, y: float, width: float, height: float, colour: str) -> Rectangle:
    return Rectangle((x, y), width, height, fc=colour, ec="grey", lw=0.6)
