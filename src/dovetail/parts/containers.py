"""Containers: blocks in an arrangement. `Stack` runs them one after another at one width."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dovetail.errors import BuildError, DataError, SpecError
from dovetail.parts.block import PreNorm
from dovetail.parts.context import Context
from dovetail.parts.norm import RmsNorm
from dovetail.parts.position.base import NoPosition, check_axes, check_hooks
from dovetail.parts.reversible import run_reversible
from dovetail.parts.state import Room, State
from dovetail.parts.weights import Drops
from dovetail.spec import Slot, Spec, entry_of, register
from dovetail.spec.categories import BlockPart, NormPart, PositionPart
from dovetail.spec.paths import fold, selected
from dovetail.spec.ranges import Chance

PIECES, TOKENS = 4, 2048  # of a feed-forward under checkpointing: at most so many, of so many tokens at least


@register(
    "container", "stack", default=True, oracle="transformers bart encoder", source="Vaswani et al. 2017, figure 1"
)
class Stack(Spec):
    """`depth` blocks at one width.

    blocks: one block for all layers, or a list of {layers: "0" | "1:" | "::2" | "0:4", ...block}; kept as one
    entry a layer. position: what is added to the embedded tokens. norm_in: norm of them (BERT, BART).
    norm: after the last block. dropout: on the embedded tokens; dropout_last: behind the last norm (T5). streams: 2 for
    reversible blocks, which carry two copies of the stream side by side (Reformer); hidden states are then twice as wide.
    """

    depth: int = 2
    blocks: tuple[BlockPart, ...] = (PreNorm(),)
    position: PositionPart = NoPosition()
    norm_in: NormPart | None = None
    norm: NormPart | None = RmsNorm()
    dropout: Chance = 0.0
    dropout_last: Chance = 0.0
    streams: Literal[1, 2] = 1

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        depth = data.get("depth", cls.model_fields["depth"].default)
        given = data.get("blocks", cls.model_fields["blocks"].default)
        if not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth is {depth!r}; give a whole number of at least 1")
        return data | {"blocks": _expanded(given, depth)}

    def to_dict(self) -> dict[str, Any]:
        """Blocks compressed: one mapping when all agree, else a list with `layers`."""
        data = super().to_dict()
        runs = fold(self.blocks)
        if len(runs) == 1:
            return data | {"blocks": runs[0][1].to_dict()}
        return data | {"blocks": [{"layers": span} | block.to_dict() for span, block in runs]}

    def build(self, slot: Slot) -> nn.Module:
        return StackModule(self, slot)


class StackModule(Drops):
    def __init__(self, spec: Stack, slot: Slot):
        super().__init__()
        self.position = slot.build(spec.position, "position")
        path = f"{slot.path}.position".lstrip(".")
        check_hooks(self.position, frozenset({"embed"}), spec.position.kind, path, "a stack")
        check_axes(self.position, spec.position.kind, slot)
        self.norm_in = None if spec.norm_in is None else slot.build(spec.norm_in, "norm_in")
        self.drop, self.drop_last = spec.dropout, spec.dropout_last
        self.streams = spec.streams
        self.blocks = nn.ModuleList()
        for i, block in enumerate(spec.blocks):
            _check_streams(block, spec.streams, slot.at(f"blocks.{i}").path)
            self.blocks.append(slot.build(block, f"blocks.{i}", layer=i, depth=spec.depth))
        self.norm = None if spec.norm is None else slot.build(spec.norm, "norm", dim=spec.streams * slot.dim)
        self.checkpointing = 0  # every how many blocks are made again in the backward
        specs = [block.spec for block in self.blocks]
        self.first = tuple(i for i, spec in enumerate(specs) if spec not in specs[:i])  # of every sort of block

    def embed(
        self, x: Tensor, ctx: Context, tokens: Tensor | None = None, layers: list[dict[str, Any]] | None = None
    ) -> Tensor:
        """Token vectors (B,T,C) with position, norm and dropout.

        tokens (B,T): their ids, where they have any. layers: what `new_layers` made, when decoding.
        """
        x = self.position.embed(x, ctx, tokens, None if layers is None else layers[0].get("position"))
        x = x if self.norm_in is None else self.norm_in(x)
        return self.dropout(x)

    def check_length(self, length: int) -> None:
        """Raises DataError for rows beyond the position table, known from their shape: a GPU's lookup would end the process."""
        limit = self.position.limit
        if limit is not None and length > limit:
            raise DataError(
                f"rows of {length} tokens, and position {length - 1} is beyond the learned table of {limit}",
                remedy=f"give at most {limit} tokens a row, or a model with a larger context",
            )

    def run(self, x: Tensor, ctx: Context, layers: list[dict[str, Any]] | None = None) -> Tensor:
        """The blocks and the last norm, (B,T,C) -> (B,T,streams·C). layers: their states when decoding."""
        if self.streams == 2:
            x = torch.cat([x, x], -1)
            if layers is None:
                return self.finish(run_reversible(list(self.blocks), x, ctx))
        again = self.checkpointing and self.training and torch.is_grad_enabled()
        if again and torch.compiler.is_compiling():
            # Nothing that is checkpointed may fill the context's tables under a compiler: one block of every sort is
            # traced for that alone, and the rest of it is dead code.
            with torch.no_grad():
                for i in self.first:
                    self.blocks[i](x, ctx, None if layers is None else layers[i])
            # Each piece is made again just before its own backward, which an eager recomputation would not do.
            ctx = replace(ctx, pieces=max(1, min(PIECES, x.shape[0] * x.shape[1] // TOKENS)))
        for i, block in enumerate(self.blocks):
            layer = None if layers is None else layers[i]
            if again and i % self.checkpointing == 0:
                x = checkpoint(block, x, ctx, layer, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x, ctx, layer)
        # The norm's backward reads the last block's output: kept, as the input of what is checkpointed next, that
        # block's pieces need not all be made again for it at once.
        return checkpoint(self.finish, x, use_reentrant=False) if again else self.finish(x)  # type: ignore[return-value]

    def finish(self, x: Tensor) -> Tensor:
        """Behind the last block, (B,T,streams·C): the last norm and dropout."""
        x = x if self.norm is None else self.norm(x)
        return F.dropout(x, self.drop_last) if self.drop_last and self.training else x

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        """Token vectors (B,T,C) -> hidden states (B,T,streams·C)."""
        layers = None if state is None else state.layers
        return self.run(self.embed(x, ctx, layers=layers), ctx, layers)

    def new_layers(self, room: Room, held: int = 0) -> list[dict[str, Any]]:
        """Fresh layer states; what the stack's position remembers stands with the first, as "position".

        held: positions that a prefix takes before the tokens.
        Raises BuildError for a mixer that cannot decode, or room beyond the position table.
        """
        limit = self.position.limit
        if limit is not None and room.capacity + held > limit:
            raise BuildError(
                f"a state of {room.capacity + held} tokens, and the learned position table ends at {limit}",
                remedy=f"give a capacity of at most {limit}" + (", virtual tokens counted" if held else ""),
            )
        layers = []
        for i, block in enumerate(self.blocks):
            if not hasattr(block, "new_state"):
                raise BuildError(
                    f"{type(block).__name__} keeps no state", where=f"blocks.{i}", remedy="run it without one"
                )
            layers.append(block.new_state(room))  # type: ignore[operator]
        remembered = self.position.new_state(room, held)
        if remembered is not None:
            layers[0]["position"] = remembered
        return layers


def _check_streams(block: Spec, streams: int, path: str) -> None:
    """Raises BuildError when a block carries another number of streams than its stack."""
    carries = 1 if block.kind == "ref" else entry_of(block).capabilities.get("streams", 1)
    if carries != streams:
        raise BuildError(
            f"a {block.kind!r} block carries {carries} stream{'s' if carries > 1 else ''}, and its stack has {streams}",
            where=path,
            remedy=f"set the stack's streams to {carries}, or choose another block",
        )


def _expanded(given: Any, depth: int) -> tuple[Any, ...]:
    """One entry a layer from one block, a list with `layers`, or a tuple that is expanded already."""
    if isinstance(given, (Spec, dict, str)):
        return (given,) * depth
    items = list(given) if isinstance(given, (list, tuple)) else []
    if not items:
        raise ValueError(f"blocks is {given!r}; give one, {depth}, or a list of ranges with 'layers'")
    if not any(isinstance(item, dict) and "layers" in item for item in items):
        if len(items) == 1:
            return tuple(items) * depth
        if len(items) != depth and all(isinstance(item, Spec) and item == items[0] for item in items):
            return (items[0],) * depth  # one block for all layers, expanded before the depth was changed
        if len(items) != depth:
            raise ValueError(
                f"{len(items)} blocks for a depth of {depth}; give one, {depth}, or ranges with 'layers' "
                "(a stack whose layers differ needs its blocks set along with its depth)"
            )
        return tuple(items)
    filled: list[Any] = [None] * depth
    spans: list[tuple[Any, Any]] = []
    for item in items:
        if not isinstance(item, dict) or "layers" not in item:
            raise ValueError("a list of blocks with 'layers' needs it in every entry")
        block = {key: value for key, value in item.items() if key != "layers"}
        try:
            rows = selected(str(item["layers"]), depth)
        except SpecError as error:
            raise ValueError(f"layers {item['layers']!r}: {error.what}") from None
        for i in rows:
            filled[i] = block
        spans.append((item["layers"], block))
    idle = [span for span, block in spans if not any(block is kept for kept in filled)]
    if idle:
        raise ValueError(f"the block for layers {idle[0]!r} has no effect: later entries replace it everywhere")
    missing = [i for i, block in enumerate(filled) if block is None]
    if missing:
        raise ValueError(f"no block is given for layers {missing}")
    return tuple(filled)


def stack_slot(spec: Any, slot: Slot) -> Slot:
    """The slot of a stack's inside: its depth and the model's context and init."""
    return replace(slot, depth=spec.depth, context=spec.context, init=spec.init)
