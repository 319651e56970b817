"""Position: the places where position can enter a model.

A `stack.position` may only use `embed`; a `mixer.position` may only use the others. Each position says
in `hooks` which it uses; one that its place does not offer is refused when the model is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels.attention import BoundMask, Coords, Region, Score, Side
from dovetail.kernels.rotary import Turning
from dovetail.parts.context import Context
from dovetail.parts.mask import Kept
from dovetail.parts.state import LayerState, Room
from dovetail.spec import Slot, Spec, register


class PositionModule(nn.Module):
    """Base: every hook is the identity. B batch, T queries, S keys, H heads, G key heads, D width."""

    hooks: ClassVar[frozenset[str]] = frozenset()
    caches: ClassVar[str] = "rotated"  # "raw" where keys must be stored before rotation
    scales: ClassVar[bool] = False  # whether its score sets the attention's scale
    limit: int | None = None  # how many positions it has, where they end
    kept: Kept | None = None  # what of the past its regions read, where they leave some out
    axes: ClassVar[int] = 1  # position axes that it reads: 0 none, 1 text, 2 images, 3 M-RoPE
    adds_values: ClassVar[bool] = False  # whether its score has value terms
    tabled: ClassVar[bool] = False  # whether its score is a function of the distance along a text, and nothing else
    relative: ClassVar[bool] = (
        False  # whether, over tokens in step, it is a term by query and distance, or that and one by key
    )
    gridded: ClassVar[bool] = False  # whether it is terms by query and row, and query and column, of a grid
    turns_all: ClassVar[bool] = False  # whether keys that it did not turn (a prefix's) mean nothing beside its own

    def embed(self, x: Tensor, ctx: Context, tokens: Tensor | None = None, state: Any = None) -> Tensor:
        """(B,T,C) -> (B,T,C): position added to (or multiplied into) the token vectors.

        tokens (B,T): their ids, where they have any. state: what `new_state` made, while decoding.
        """
        return x

    def new_state(self, room: Room, held: int = 0) -> LayerState | None:
        """What `embed` remembers while decoding; None for most. held: positions that a prefix takes before the tokens.

        Raises BuildError where `embed` cannot go on from the tokens before.
        """
        return None

    def embed_qk(self, xq: Tensor, xk: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Inputs of the query and key maps, (B,T,C) and (B,S,C); values do not see it.

        In self-attention xk is xq; in cross-attention xk is the memory, which stands at `ctx.of_memory()`.
        """
        return xq, xk

    def rotate(self, q: Tensor, k: Tensor, at: Coords, ctx: Context) -> tuple[Tensor, Tensor]:
        """q (B,T,H,D) at `at.q`, k (B,S,G,D) at `at.k`."""
        return q, k

    @property
    def turns(self) -> bool:
        """Whether `rotate` is to turn pairs of q and k alike, and nothing else, which `turning` then says."""
        return False

    def turning(self, side: Side, dtype: torch.dtype) -> Turning:
        """What `rotate` does to queries and keys of one side, where it `turns`; tables in `dtype`."""
        raise BuildError(f"{type(self).__name__} does not turn queries and keys", remedy="ask whether it `turns`")

    def score(self, q: Tensor, k: Tensor, at: Coords, ctx: Context, project: Callable[..., Any]) -> Score:
        """Terms of the attention score from the raw q (B,T,H,D) and k (B,S,G,D)."""
        return Score()

    def regions(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BoundMask, score: Score | None, ctx: Context
    ) -> list[Region]:
        """Disjoint regions that together are the attention; usually one.

        q (B,H,T,D), k (B,G,S,D) heads first and as `rotate` left them (raw where there is no such hook), v
        (B,G,S,Dv); score is what the `score` hook and the mixer's soft cap gave.
        """
        return [Region(k, v, mask, score)]


class Vectors(PositionModule):
    """Base of positions that are a vector p each, whatever token stands there: x + p."""

    hooks: ClassVar[frozenset[str]] = frozenset({"embed"})

    def vectors(self, x: Tensor, ctx: Context, state: Any = None) -> Tensor:
        """p (B|1,T,C) in x's type, for x (B,T,C)."""
        raise TypeError(f"{type(self).__name__} does not say its vectors")

    def embed(self, x: Tensor, ctx: Context, tokens: Tensor | None = None, state: Any = None) -> Tensor:
        return x + self.vectors(x, ctx, state)


@register("position", "none", oracle="formula: identity", source="Kazemnejad et al. 2023 (NoPE)")
class NoPosition(Spec):
    """No position at all (NoPE)."""

    def build(self, slot: Slot) -> nn.Module:
        position = PositionModule()
        position.axes = 0  # type: ignore[misc]
        return position


def position_axes(model: nn.Module) -> int:
    """The most position axes that any position of the model reads: what a state must store of each token."""
    return max([1, *(m.axes for m in model.modules() if isinstance(m, PositionModule))])


def adds_values(position: nn.Module) -> bool:
    """Whether this position, or one inside it, adds to the output by value terms."""
    return any(isinstance(m, PositionModule) and m.adds_values for m in position.modules())


def refuse_prefix(position: nn.Module, path: str) -> None:
    """Raises BuildError where keys that nobody turned cannot stand beside those of this position."""
    if any(isinstance(m, PositionModule) and m.turns_all for m in position.modules()):
        raise BuildError(
            "a prefix beside a position that turns keys by where the queries are (xpos)",
            where=path,
            remedy="use prompt tuning, whose virtual tokens stand at positions, or another position",
        )


def refuse_text(slot: Slot, what: str) -> None:
    """Raises BuildError for a part that needs a grid (`what`, with its article) where the tokens are a line."""
    if slot.on_grid is False:
        raise BuildError(
            f"{what} works on the rows and columns of a grid, and here the tokens of a text stand in a line",
            where=slot.path,
            remedy="use it in a model of images; for text, an attention with a mask or a relative position of text",
        )


def check_axes(position: PositionModule, kind: str, slot: Slot) -> None:
    """Raises BuildError for a position that would not see both axes of a grid."""
    if slot.on_grid and position.axes not in (0, 2):
        raise BuildError(
            f"position {kind!r} does not read both the row and the column at which the tokens of a grid stand",
            where=slot.at("position").path,
            remedy="use one of two axes: axial, relative_bias_2d, {kind: sinusoidal, axes: 2}, {kind: cnn, axes: 2}",
        )


def refuse_cross(slot: Slot, kind: str) -> None:
    """Raises BuildError for a position between tokens of one sequence in an attention to another."""
    if slot.memory_dim is not None:
        raise BuildError(
            f"position {kind!r} is a distance within one sequence, and a cross-attention reads another",
            where=slot.path,
            remedy="set the cross mixer's position to none, or added",
        )


def head_width(slot: Slot, kind: str) -> int:
    """Width of the heads at this place. Raises BuildError where there are none."""
    if slot.head_dim is None:
        raise BuildError(
            f"position {kind!r} works on queries and keys, which this place never calls it with",
            where=slot.path,
            remedy="put it at an attention's position",
        )
    return slot.head_dim


def check_vectors(position: PositionModule, kind: str, path: str, empty: bool = True) -> None:
    """Raises BuildError for a position that is not `Vectors` where those alone are read. empty: none will do too."""
    if not isinstance(position, Vectors) and (position.hooks or not empty):
        raise BuildError(
            f"position {kind!r} is not a vector for each position, and this place reads nothing else",
            where=path,
            remedy="use one that is (learned, sinusoidal, floater), or put it at the stack's position",
        )


def check_hooks(
    position: PositionModule, offered: frozenset[str], kind: str, path: str, owner: str = "this place"
) -> None:
    """Raises BuildError when `position` uses a hook that its place, which `owner` names, would never call."""
    unused = position.hooks - offered
    if unused:
        better = "put it at a mixer's position" if offered == {"embed"} else "use another, or the mixer attention"
        better = "put it at the stack's position" if "embed" in unused else better
        raise BuildError(
            f"position {kind!r} works by {', '.join(sorted(unused))}, which {owner} never calls",
            where=path,
            remedy=f"here only {', '.join(sorted(offered)) or 'nothing'} is used; {better}",
        )
