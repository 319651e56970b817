"""How a recipe's step fits into a device: its peak counted before anything is allocated, and what to make again for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, UnsupportedOperatorException

from dovetail.parts.containers import StackModule
from dovetail.parts.storage.base import Storage
from dovetail.training.memory import coded_bytes
from dovetail.training.simulate import step_bytes

MARGIN = 0.9  # of the memory: a prediction is within a tenth of what was measured
_WORKSPACES = {"cuda": 2 * 2**25}  # of cuBLAS
_EVERY = (0, 4, 2, 1)  # the fastest first
# What a model may raise without data: asking for values, an operation that fake tensors or a compiler's partition do not
# know, a constant that they did not expect.
_RAISED = (RuntimeError, AssertionError, DynamicOutputShapeException, UnsupportedOperatorException)


class Uncounted(Exception):
    """A step that cannot be counted; says why."""


@dataclass(frozen=True)
class Way:
    """How a step is taken. checkpointing: every how many blocks are made again in the backward (0: none). batch: rows
    at a time; accumulate: how often. sizes: bytes by what they are of."""

    batch: int
    accumulate: int
    checkpointing: int
    compiled: bool
    sizes: dict[str, float]

    @property
    def peak(self) -> float:
        return sum(self.sizes.values())

    def __str__(self) -> str:
        how = "compiled" if self.compiled else "eager"
        return f"{how}, {spoken(self.checkpointing)} made again, {self.accumulate} x {self.batch} rows: {self.peak / 1e9:,.2f} GB"


@dataclass(frozen=True)
class Step:
    """A step to find room for: `model` with its adapters, on the meta device, in the dtypes it is trained in.

    average: whether an averaged copy of the weights is kept. frozen: bytes of other models. storage: how the frozen maps
    of the blocks are kept, in codes; None as they are.
    """

    model: nn.Module
    batch: int
    length: int
    accumulate: int = 1
    precision: str = "none"
    compiled: bool = False
    average: bool = False
    frozen: float = 0.0
    storage: Storage | None = None

    def counts(self) -> bool:
        """Whether this is a model whose step can be counted: one stack that reads tokens and has a head."""
        return isinstance(self.model, StackModule) and hasattr(self.model, "head") and hasattr(self.model, "embedding")


def predict(step: Step, device: str, checkpointing: int) -> Way:
    """The peak of a step on a device of that type ("cuda"): weights, AdamW's moments in the weights' dtype, and the most
    that forward and backward hold beside them, by running them on fake tensors. Raises Uncounted."""
    model = step.model
    if not step.counts():
        raise Uncounted("only one stack that reads tokens and has a head is")
    try:
        counted = step_bytes(
            model, batch=step.batch, length=step.length, device=device, precision=step.precision, compiled=step.compiled,
            again=checkpointing,
        )  # fmt: skip
    except _RAISED as error:
        line = next(iter(str(error).strip().splitlines()), "")
        raise Uncounted(f"without data the model ends in {type(error).__name__}: {line}") from error
    sizes = states(step) | {"forward and backward": float(counted), "workspaces": float(_WORKSPACES.get(device, 0))}
    return Way(step.batch, step.accumulate, checkpointing, step.compiled, sizes)


def states(step: Step) -> dict[str, float]:
    """Bytes that stand from the first step to the last."""
    own = [*step.model.parameters(), *step.model.buffers()]
    trained = float(sum(p.numel() * p.element_size() for p in step.model.parameters() if p.requires_grad))
    weights = float(sum(t.numel() * t.element_size() for t in own))
    sizes = {
        "weights": weights if step.storage is None else coded_bytes(step.model, step.storage),
        "moments": 2 * trained,
    }
    return sizes | ({"average": trained} if step.average else {}) | ({"frozen": step.frozen} if step.frozen else {})


def ways(step: Step, device: str) -> Iterator[Way]:
    """Ways to take the same step, the fastest first: fewer blocks made again, then fewer rows at a time."""
    batch, accumulate = step.batch, step.accumulate
    while True:
        for every in _EVERY:
            yield predict(replace(step, batch=batch, accumulate=accumulate), device, every)
        if batch % 2:
            return
        batch, accumulate = batch // 2, accumulate * 2


def choose(step: Step, device: str, room: float) -> Way | None:
    """The fastest way that leaves a tenth of `room` bytes free; None where there is none. Raises Uncounted."""
    gradients = sum(p.numel() * p.element_size() for p in step.model.parameters() if p.requires_grad)
    if sum(states(step).values()) + gradients > MARGIN * room:
        return None
    return next((way for way in ways(step, device) if way.peak <= MARGIN * room), None)


def look(step: Step, device: str, room: float, checkpointing: bool | int | str) -> Way | None:
    """The way that a recipe's checkpointing asks for, by `choose` where it is "auto"; None where that finds none, or what
    stands from the first step on is more than the device has. Raises Uncounted."""
    if checkpointing == "auto":
        return choose(step, device, room)
    return None if sum(states(step).values()) > room else predict(step, device, int(checkpointing))


def spoken(checkpointing: int) -> str:
    """Which blocks are made again, for people."""
    return {0: "no block", 1: "every block"}.get(checkpointing, f"one block in {checkpointing}")


def every(model: Any) -> int:
    """Every how many blocks of a model are checkpointed; 0 for none."""
    return next((int(m.checkpointing) for m in model.modules() if isinstance(m, StackModule)), 0)


def chosen_for(model: nn.Module, t: Any, precision: str, device: torch.device, room: float) -> int:
    """What `train.checkpointing: auto` comes to: as few blocks as fit at the recipe's batch, all of them where none can
    be counted or nothing fits."""
    step = Step(model, t.batch, t.length, t.accumulate, precision, t.compile, bool(t.ema))
    try:
        way = choose(step, device.type, room)
    except Uncounted:
        return 1
    return way.checkpointing if way is not None and way.batch == t.batch else 1
