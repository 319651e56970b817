"""Decoding steps that are compiled and, on CUDA, replayed as one graph: between two tokens the host has next to nothing to do.

A step is the same work for every token, on the same buffers: where the token goes and what it sees is told by tensors of
the state (`State.uncount`). Prompts are read as ever, since every one has another length, and their state is copied in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.errors import RunError, UserError
from dovetail.kernels.installed import TRITON
from dovetail.kernels.linear import beside, stepping
from dovetail.parts.state import State
from dovetail.sampling import limits
from dovetail.sampling.decode import prefilled

GRANULE = 128  # tokens: a capacity that is chosen here is a whole multiple, so that lengths that are near share it
PIECES = 256  # of a row of scores
WARM = 2  # compiled steps before a graph is captured: kernels are tuned and workspaces made by then


class Captured:
    """A decoder-only model with a decoding step that is compiled once, and then serves prompt after prompt.

    rows: how many prompts at once. capacity: tokens of a row, its prompt and the new ones. backend, options: what
    compiles, and Inductor's options (`tuned` unless given). `compilations` and `captures` count. Nothing is compiled
    before the first step; what is changed in the model is seen at the next prompt, and compiled anew where need be.
    Raises UserError for an encoder-decoder.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        capacity: int,
        *,
        backend: str = "inductor",
        options: Mapping[str, Any] | None = None,
    ):
        if hasattr(model, "encode"):
            raise UserError(
                "compiled decoding of an encoder-decoder: every length of source would be compiled anew",
                remedy="leave compile out",
            )
        self.model, self.rows, self.capacity = model, rows, capacity
        self.device: torch.device = next(model.parameters()).device
        self.backend = backend
        self.options = tuned(self.device, rows) if options is None else dict(options)
        self.compilations = self.captures = 0
        self._reading: Reading | None = None
        self._state: State | None = None
        self._made_for: Any = None

    @torch.inference_mode()
    def read(self, prompts: Sequence[Sequence[int]], new: int) -> Reading:
        """The prompts are read, and steps go on from there; those of the prompts before are over.

        Raises UserError for prompts that do not fit, or that the model cannot take.
        """
        if len(prompts) != self.rows:
            raise UserError(f"{len(prompts)} prompts for {self.rows} rows", remedy="make another Captured, or add rows")
        used = max(map(len, prompts), default=0)
        if used + new > self.capacity:
            raise UserError(
                f"a prompt of {used} tokens and {new} new ones for a capacity of {self.capacity}",
                remedy="make a Captured of a larger capacity",
            )
        fresh, first = prefilled(self.model, prompts, new, self.capacity)
        fresh.uncount()
        held, given = ([] if s is None else s.buffers() for s in (self._state, fresh))
        made_for = (fresh.begun, fresh.ahead, *((t.shape, t.dtype) for t in given), *_facts(self.model))
        if made_for == self._made_for:
            for old, value in zip(held, given, strict=True):
                old.copy_(value)
        else:
            self._begin_anew(fresh)
            self._made_for = made_for
        self._reading = Reading(self, first, self.capacity - used)
        return self._reading

    def _begin_anew(self, state: State) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = 0
        self._state = state
        self._tokens = torch.zeros(self.rows, dtype=torch.long, device=self.device)  # one tensor for every step
        self._step = torch.compile(_step(self.model, state), backend=self._compile, fullgraph=True, dynamic=False)

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from torch._dynamo import lookup_backend

        self.compilations += 1
        if self.device.type == "cuda" and self.rows == 1 and TRITON:
            beside.take_in(graph)
        options = {"config_patches": self.options} if self.backend == "inductor" else {}
        return lookup_backend(self.backend)(graph, inputs, **options)

    @torch.inference_mode()
    def step(self, reading: Reading, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The newest tokens (R,) -> scores of their successors (R,V), which the next step overwrites, and the best (R,)."""
        if reading is not self._reading:
            raise RunError(
                "these prompts are over: others were read by the same compiled steps",
                remedy="finish one generation before the next, or give each a Captured of its own",
            )
        from torch._dynamo.exc import TorchDynamoException  # seconds to import, of which others need know nothing

        if tokens.shape != self._tokens.shape:
            raise UserError(
                f"{tuple(tokens.shape)} tokens for {self.rows} rows", remedy="give each row its newest token"
            )
        self._tokens.copy_(tokens)
        if self.device.type != "cuda" or self._warm < WARM:
            self._warm += 1
            # What guards look at was looked at when the prompts were read, and once more in their first step.
            with torch.compiler.set_stance(skip_guard_eval_unsafe=reading.steps > 0 and self.compilations > 0):
                try:
                    return self._taken()
                except TorchDynamoException as error:
                    raise UserError(
                        f"this model's decoding step cannot be compiled: {str(error).strip().splitlines()[0]}",
                        remedy="leave compile out",
                    ) from error
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        self._graph.replay()
        return self._scores, self._best.clone()

    def _capture(self) -> None:
        """Capturing runs nothing, so that the state is as it was; the replay that follows takes the step."""
        self._graph = torch.cuda.CUDAGraph()
        # The model's device need not be the current one, which torch would take a stream of.
        with torch.cuda.device(self.device), torch.cuda.graph(self._graph, stream=torch.cuda.Stream(self.device)):
            self._scores, self._best = self._taken()
        self.captures += 1

    def _taken(self) -> tuple[Tensor, Tensor]:
        with stepping():
            return self._step(self._tokens)


class Reading:
    """Steps that go on from prompts: `first` (R,V) are the scores after them, `best` (R,) the likeliest next token by the
    newest scores. left: how many there can be."""

    def __init__(self, captured: Captured, first: Tensor, left: int):
        self.captured, self.first, self.left = captured, first, left
        self.best: Tensor | None = None
        self.steps = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        """Scores (R,V) float, which the next step overwrites. Raises RunError beyond the capacity."""
        if self.steps >= self.left:
            raise RunError("the compiled steps' state is full", remedy="make a Captured of a larger capacity")
        scores, self.best = self.captured.step(self, tokens)
        self.steps += 1
        return scores


def _step(model: Any, state: State) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def step(tokens: Tensor) -> tuple[Tensor, Tensor]:
        scores = model(tokens[:, None], state=state).logits[:, -1].float()
        for timeline in state.room.timelines.values():
            timeline.step = None  # over; left there, its tensors would be results of the graph
        return scores, _best(scores)

    # Compilers keep what they made with the code, and only so much: each runner has code of its own.
    step.__code__ = step.__code__.replace()
    return step


def _best(scores: Tensor) -> Tensor:
    """argmax of (R,V), the first of equals. In pieces: one program of a GPU takes 22 µs over the 128,256 of a row."""
    cut = F.pad(scores, (0, -scores.shape[1] % PIECES), value=-torch.inf).unflatten(1, (PIECES, -1))
    highest, at = cut.max(-1)
    piece = highest.argmax(-1, keepdim=True)
    return (piece * cut.shape[2] + at.gather(1, piece)).squeeze(1)


def tuned(device: torch.device, rows: int) -> dict[str, Any]:
    """Inductor's options for a step of so many rows. On CUDA small kernels beside each other are one. One row: products with
    a vector that have no kernel of their own (a bias) become reductions, searched for the best shape, which read weights
    nearer to the speed of memory than the library's products do."""
    # Not triton.enable_pdl, which would be 4% faster: its kernels wait for the one before them alone, and one that loads
    # nothing (a fill) waits for none, so that what comes behind it may read what is not written yet.
    if device.type != "cuda":
        return {}
    return {"combo_kernels": True} | ({"coordinate_descent_tuning": True} if rows == 1 else {})


def _facts(model: nn.Module) -> tuple[Any, ...]:
    """What a captured step takes for granted of the model: how its tensors lie, on CUDA where, and what is switched on."""
    held = (*model.parameters(), *model.buffers())
    where = [(t.data_ptr() if t.is_cuda else 0, t.shape, t.dtype, t.stride()) for t in held]
    how = [(m.training, getattr(m, "active", ()), id(getattr(m, "routes", ()))) for m in model.modules()]
    return (*where, *how)


class _Kept:
    """What a model keeps of its own compiled steps: the last. Copies of the model begin without."""

    captured: Captured | None = None

    def __deepcopy__(self, memo: Any) -> _Kept:
        return _Kept()

    def __reduce__(self) -> Any:
        return _Kept, ()


def compiled(model: Any, prompts: Sequence[Sequence[int]], new: int) -> Reading:
    """Compiled steps behind the prompts. The runner stays with the model, for further prompts of as many rows and no more
    tokens than it holds; other ones take its place."""
    kept: _Kept = model.__dict__.setdefault("_compiled_steps", _Kept())
    needed = max(map(len, prompts), default=0) + new
    runner = kept.captured
    if runner is None or runner.rows != len(prompts) or runner.capacity < needed:
        capacity, table = -(-needed // GRANULE) * GRANULE, limits.table(model.spec)
        if table is not None and not hasattr(model, "encode"):
            capacity = max(needed, min(capacity, table - model.front.vectors - model.front.held))
        kept.captured = None  # its memory is free before the next one takes some
        kept.captured = runner = Captured(model, len(prompts), capacity)
    return runner.read(prompts, new)
