"""Context: what a forward pass knows about its tokens besides their vectors."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from dovetail.errors import BuildError, DataError
from dovetail.kernels.attention import Both, BoundMask, Coords, Side
from dovetail.parts.mask import Document, Mask

_DOCUMENT = Document()


@dataclass(frozen=True)
class Context:
    """B batch (or 1 where all rows agree), T tokens, A position axes (1 text, 2 images, 3 M-RoPE).

    positions (B,T,A): what encodings read. order (B,T): what masks compare; it restarts with each document, so
    that a packed document sees what it would see alone. segments (B,T): documents of a packed row by number, no two
    with the same, negative for padding, or None. memory (B,S,C), memory_segments (B,S), memory_positions (B,S,A): encoder output and where its
    tokens stand (0..S-1 unless given).
    cond: named conditioning tensors (time, class, text). grid: height and width of a flattened image.
    aligned: a static promise that order is 0..T-1 in every row and nothing is padded or packed.
    pieces: feed-forwards take the tokens in so many pieces, one after the other, so that their hidden vectors never
        stand whole (Kitaev et al. 2020, section 3).
    in_step: a static promise that positions have one axis, along which tokens are as far apart as in `order`.
    memo: tables and masks computed once a forward and shared by the layers; never part of the pytree. Nothing that
        needs a gradient belongs there: activation checkpointing would not compute it again.
    """

    positions: Tensor
    order: Tensor
    segments: Tensor | None = None
    memory: Tensor | None = None
    memory_segments: Tensor | None = None
    memory_positions: Tensor | None = None
    cond: dict[str, Tensor] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    aligned: bool = False
    pieces: int = 1
    in_step: bool = False
    memo: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of(
        batch: int,
        length: int,
        device: torch.device,
        *,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        start: Tensor | int = 0,
    ) -> Context:
        """The context of (batch, length) tokens.

        attention_mask (B,T): nonzero where a token is real; padding on either side gives the same result.
        segments (B,T): document numbers of packed rows, negative for padding. A document is a run of one number,
        whatever padding lies inside it: [0, 0, 1, 0] are three. Positions restart with each.
        start: tokens that came before, () or (B,) (decoding).
        Raises DataError when the shapes do not match.
        """
        for name, given in (("attention_mask", attention_mask), ("segments", segments)):
            if given is not None and given.shape != (batch, length):
                raise DataError(f"{name} has shape {tuple(given.shape)}", remedy=f"give {(batch, length)}")
        plain = attention_mask is None and segments is None
        begins = isinstance(start, int) and start == 0
        if segments is not None:
            order, segments = documents(segments, attention_mask)
        elif attention_mask is not None:
            real = attention_mask.to(torch.bool)
            segments = torch.where(real, 0, -1)
            order = (real.long().cumsum(-1) - 1).clamp_min(0)
        else:
            order = torch.arange(length, device=device)[None]
        order = order + (start if isinstance(start, int) else start.view(-1, 1))
        in_step = positions is None
        positions = order if positions is None else positions
        if positions.dim() == 2:
            positions = positions[..., None]
        if positions.dim() != 3 or positions.shape[0] not in (1, batch) or positions.shape[1] != length:
            raise DataError(
                f"positions have shape {tuple(positions.shape)}", remedy=f"give {(batch, length)}, or (..., axes)"
            )
        return Context(positions, order, segments, aligned=plain and begins, in_step=in_step)

    @property
    def side(self) -> Side:
        return self.once("side", lambda: Side(self.order, self.segments, self.positions))

    def bind(self, rule: Mask, at: Coords | None = None) -> BoundMask:
        """`rule` over coordinates (the tokens themselves unless given), with documents kept apart.

        One bound mask for all layers that ask with the same rule object (see `mask.interned`) and coordinates.
        """
        at = self.coords if at is None else at
        apart = at.q.segments is not None and at.k.segments is not None
        if id(rule) not in at.memo:
            at.memo[id(rule)] = BoundMask(Both(rule, _DOCUMENT) if apart else rule, at)
        return at.memo[id(rule)]

    def narrowed(self, mask: BoundMask, rule: Mask) -> BoundMask:
        """`mask` with `rule` on top; one for all layers that ask with the same objects."""
        if id(rule) not in mask.memo:
            mask.memo[id(rule)] = BoundMask(Both(mask.rule, rule), mask.at)
        return mask.memo[id(rule)]

    @property
    def coords(self) -> Coords:
        return self.once("coords", lambda: Coords(self.side, self.side, self.aligned, in_step=self.in_step))

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, computed once in this forward for `key`."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def needs_memory(self, path: str) -> Tensor:
        if self.memory is None:
            raise BuildError(
                "a cross-attention without encoder output", where=path, remedy="pass memory, or encode first"
            )
        return self.memory

    def with_memory(self, memory: Tensor | None, segments: Tensor | None, positions: Tensor | None = None) -> Context:
        return replace(self, memory=memory, memory_segments=segments, memory_positions=positions, memo={})

    def of_memory(self) -> Context:
        """The context in which the memory's own tokens stand."""

        def make() -> Context:
            assert self.memory is not None
            order = torch.arange(self.memory.shape[1], device=self.memory.device)[None]
            positions = order[..., None] if self.memory_positions is None else self.memory_positions
            return Context(positions, order, self.memory_segments)

        return self.once("of_memory", make)

    @staticmethod
    def on_grid(height: int, width: int, device: torch.device, segments: Tensor | None = None) -> Context:
        """The context of a flattened image: positions (1,N,2) are (row, column), N = height · width."""
        row, column = torch.meshgrid(
            torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
        )
        order = torch.arange(height * width, device=device)[None]
        positions = torch.stack([row.flatten(), column.flatten()], -1)[None]
        return Context(positions, order, segments, grid=(height, width), aligned=segments is None)

    def needs_grid(self, path: str) -> tuple[int, int]:
        if self.grid is None:
            raise BuildError(
                "a part that works on images without a grid", where=path, remedy="make the context by Context.on_grid"
            )
        return self.grid


def documents(segments: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(order, segments) of rows (B,T) whose documents are runs of one number, and where numbers may come again.

    mask: nonzero where a token is real; hiding a document does not join its neighbours. order: real tokens of the same
    document before each token, 0 for padding. segments: a row's documents numbered from 0, -1 for padding, so that
    equal numbers are one document and masks need compare nothing else.
    """
    given = segments >= 0
    count = given.long().cumsum(-1)  # 1 at a row's first
    last = torch.where(given, count, 0).cummax(-1)
    previous = segments.gather(-1, last.indices.roll(1, -1))  # number of the one before, if there is one
    first = given & ((count == 1) | (segments != previous))
    real = given if mask is None else given & mask.to(torch.bool)
    seen = real.long().cumsum(-1)
    before = torch.where(first, seen - real.long(), 0).cummax(-1).values
    return torch.where(real, seen - 1 - before, 0), torch.where(real, first.long().cumsum(-1) - 1, -1)


def refuse_memory(keys: Tensor | None, values: Tensor | None, path: str) -> None:
    """Raises BuildError where a mixer that reads its own input alone is given keys or values."""
    if keys is not None or values is not None:
        raise BuildError(
            "a mixer that reads its own input was given keys or values",
            where=path,
            remedy="leave them out, or build it as a cross mixer: one that can read an encoder",
        )


_TENSORS = ("positions", "order", "segments", "memory", "memory_segments", "memory_positions", "cond")
_STATIC = ("grid", "aligned", "pieces", "in_step")


def _flatten(ctx: Context) -> tuple[list[Any], Any]:
    return [getattr(ctx, name) for name in _TENSORS], tuple(getattr(ctx, name) for name in _STATIC)


def _unflatten(values: Any, static: Any) -> Context:
    return Context(**dict(zip((*_TENSORS, *_STATIC), (*values, *static), strict=True)))


_pytree.register_pytree_node(Context, _flatten, _unflatten, serialized_type_name="dovetail.Context")
assert {f.name for f in fields(Context)} == {*_TENSORS, *_STATIC, "memo"}
