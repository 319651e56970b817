"""Which kernel serves each mixer, with each position and mask, and each gate, on CUDA and on CPU. Used by generate.py.

Every cell is what a small model of that part says of itself when it is built, as `dovetail show --plan` does. Positions
that are served alike share a row, masks a column. A path in bold is plain torch for want of a kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

import dovetail as dt
from dovetail.errors import BuildError, DataError
from dovetail.kernels.plan import Plan
from dovetail.parts.init import Normal
from dovetail.parts.weights import Linear
from dovetail.spec import Entry, Slot, Spec, entries, entry
from dovetail.spec.spec import field_category

LENGTH, DIM, SIDE = 4096, 256, 14
DEVICES = {"cuda": torch.bfloat16, "cpu": torch.float32}  # with the types that `show` plans for
# Values of required fields, by name.
FIELDS: dict[str, Any] = {
    "rank": 64, "length": 128, "size": 512, "step": 4, "stride": 64, "before": 256, "after": 256, "height": 64,
    "width": 64, "sections": (8, 12, 12), "trained": 1024, "window": 512, "sinks": 4, "factor": 2.0, "original": 2048,
}  # fmt: skip
KINDS: dict[tuple[str, str], dict[str, Any]] = {
    ("mixer", "linformer"): {"length": LENGTH},
    ("mixer", "window"): {"size": 7},
    ("mask", "random_blocks"): {"size": 64},
}
# Masks that are no columns: combinations of others, what hides nothing more than the place does, what rows that are padded
# or packed bring themselves ("padded or packed"), and that of models with two streams alone.
LEFT_OUT = ("and", "or", "full", "causal", "document", "padding", "permutation")

ABOUT = (
    f"What small models say of themselves at a length of {LENGTH:,}, as `dovetail show --plan` does: bf16 on CUDA, fp32",
    "on CPU (in bf16, plain attention there goes in bands). **Bold**: plain torch for want of a kernel.",
    "*refused*: cannot be built, as [what goes with what](pairs.md) says. Numbers lead to the reason.",
)


@dataclass(frozen=True)
class Served:
    """What a mixer says: (device, its (use, plan)s), or None where the model cannot be built."""

    plans: tuple[tuple[str, tuple[tuple[str, Plan], ...]], ...] | None

    @property
    def uses(self) -> str:
        return " / ".join(use for use, _ in self.plans[0][1]) if self.plans else ""

    def cell(self, whys: dict[tuple[str, str], int]) -> str:
        """Paths of the uses in turn (one for all where they are served alike), a line a device.

        whys: the number of each (path, reason), which new ones are put into.
        """
        if self.plans is None:
            return "*refused*"
        lines = []
        for device, chosen in self.plans:
            plans, said = [plan for _, plan in chosen], []
            for plan in plans[:1] if len(set(plans)) == 1 else plans:
                number = whys.setdefault((plan.path, plan.why), len(whys) + 1)
                path = f"**{plan.path}**" if plan.falls_back(device) else plan.path
                said.append(f"{path} [{number}](#why-{number})")
            lines.append(f"{device}: {' / '.join(said) or 'as torch has it'}")
        return "<br>".join(lines)


@dataclass(frozen=True)
class Table:
    """columns: names of each; rows: the name of each, what serves it in each column, and what is said beside it."""

    title: str
    about: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Served, ...], tuple[str, ...]], ...]


def page() -> str:
    """All tables, and why each path is taken."""
    whys: dict[tuple[str, str], int] = {}
    lines = ["# Which kernel runs", "", *ABOUT, ""]
    for table in tables():
        lines += [f"## {table.title}", "", table.about, "", f"| | {' | '.join(table.columns)} |"]
        lines += [f"| --- |{' --- |' * len(table.columns)}"]
        for name, row, beside in table.rows:
            lines.append(f"| {' | '.join([name, *(each.cell(whys) for each in row), *beside])} |")
        lines.append("")
    lines += ["## Why", ""]
    lines += [f'{number}. <span id="why-{number}"></span>{path}: {why}' for (path, why), number in whys.items()]
    return "\n".join([*lines, ""])


@cache
def tables() -> tuple[Table, ...]:
    """A table of positions and masks for each mixer that has a mask, one of all other mixers, one of gates."""
    masked = [e.kind for e in _all("mixer") if _holds(e, "mask")]
    return (*map(by_mask, masked), others([e.kind for e in _all("mixer") if e.kind not in masked]), gates())


def by_mask(kind: str) -> Table:
    """Of a mixer with a mask: none, and each kind that hides more than its place does."""
    masks = [None, *(e.kind for e in _all("mask") if e.kind not in LEFT_OUT)]
    found = {p: [served(kind, p, mask) for mask in masks] for p in positions(kind) if p is not None}
    columns: dict[tuple[Served, ...], list[str]] = {}  # what stands in it -> masks
    for i, mask in enumerate(masks):
        columns.setdefault(tuple(row[i] for row in found.values()), []).append(mask or "causal alone")
    rows: dict[tuple[Served, ...], list[str]] = {}
    for position, row in zip(found, zip(*columns, strict=True), strict=True):
        rows.setdefault(row, []).append(position)
    about = f"By position and mask, in a causal place; its uses in turn, or one for all of them: {next(iter(rows))[0].uses}."
    told = tuple((", ".join(names), row, ()) for row, names in rows.items())
    return Table(kind, about, tuple(map(", ".join, columns.values())), told)


def others(kinds: list[str]) -> Table:
    """Of mixers whose mask is a part of what they are, by position where that makes a difference."""
    rows: dict[tuple[str, Served], list[str]] = {}
    for kind in kinds:
        for position in positions(kind):
            rows.setdefault((kind, served(kind, position, None)), []).append(position or "")
    several = {kind for kind in kinds if sum(k == kind for k, _ in rows) > 1}
    told = [
        (f"{kind} with {', '.join(names)}" if kind in several else kind, (found,), (found.uses or "no choice to make",))
        for (kind, found), names in rows.items()
    ]
    return Table("Other mixers", "Their masks are a part of what they are.", ("kernels", "uses"), tuple(told))


def gates() -> Table:
    """Of gated feed-forwards, by activation."""
    rows: dict[Served, list[str]] = {}
    for e in _all("activation"):
        blocks = {"feedforward": {"kind": "glu", "activation": example("activation", e.kind)}}
        rows.setdefault(said(lambda blocks=blocks: _model("decoder", blocks), "feedforward"), []).append(e.kind)
    told = tuple((", ".join(names), (found,), ()) for found, names in rows.items())
    return Table("Gates of feed-forwards", "act(gate) · up, by activation.", ("kernels",), told)


def positions(kind: str) -> list[str | None]:
    """The positions that a mixer takes; None alone where it has none."""
    if not _holds(entry("mixer", kind), "position"):
        return [None]
    return [e.kind for e in _all("position") if served(kind, e.kind, None).plans is not None]


@cache
def served(kind: str, position: str | None, mask: str | None) -> Served:
    """The plans of a mixer of that kind on each device."""
    given = {"position": position, "mask": mask}
    mixer = example("mixer", kind) | {name: example(name, of) for name, of in given.items() if of is not None}
    return said(lambda: _built(entry("mixer", kind), mixer), "mixer")


def said(build: Callable[[], Any], branch: str) -> Served:
    """What the "mixer" or "feedforward" of what is built says for each device."""
    found = []
    for device, dtype in DEVICES.items():
        try:
            module = build()
        except BuildError:
            return Served(None)
        named = module.to(dtype).named_modules()
        choosing = [m for name, m in named if branch in name.split(".") and hasattr(m, "plans")]
        choosing = [m for m in choosing if not isinstance(m, Linear)]  # alike in all of them
        plans = {use: plan for m in choosing for use, plan in m.plans(device, LENGTH).items()}
        # How many of the tiles are empty differs from mask to mask, and is no other reason.
        told = tuple((use, Plan(p.path, re.sub(r"all but \d+%", "all but few", p.why))) for use, p in plans.items())
        found.append((device, told))
    return Served(tuple(found))


def example(category: str, kind: str) -> dict[str, Any]:
    """Plain data of a part with its defaults. Raises DataError for a required field of a name that is not known here."""
    given: dict[str, Any] = {"kind": kind} | KINDS.get((category, kind), {})
    for name, info in entry(category, kind).cls.model_fields.items():
        if info.is_required() and name not in given:
            if name not in FIELDS:
                raise DataError(
                    f"{category} {kind!r} needs {name!r}, of which the table of kernels knows no example",
                    where="docs/served.py, FIELDS",
                    remedy=f"add one for {name!r}, or give the field a default",
                )
            given[name] = FIELDS[name]
    return given


def _built(e: Entry, mixer: dict[str, Any]) -> Any:
    """On the meta device: in a decoder, or where nothing is causal in an encoder, or on a grid."""
    if e.capabilities.get("grid"):
        slot = Slot(dim=DIM, causal=False, init=Normal())
        with torch.device("meta"):
            stages = {"kind": "stages", "stages": [{"depth": 1, "norm": None, "blocks": {"mixer": mixer}}]}
            return slot.build(Spec.parse("container", stages), "container")
    kind = "encoder" if e.capabilities.get("causal") is False else "decoder"
    return _model(kind, {"mixer": mixer})


def _model(kind: str, blocks: dict[str, Any]) -> Any:
    whole = {"kind": kind, "vocab": 256, "dim": DIM, "depth": 1, "context": LENGTH, "blocks": blocks}
    return dt.build(whole, weights=False)


def _holds(e: Entry, category: str) -> bool:
    return any(field_category(e.cls, name) == category for name in e.cls.model_fields)


def _all(category: str) -> list[Entry]:
    return [e for e in entries() if e.category == category]
