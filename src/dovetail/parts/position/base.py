"""Position: the places where position can enter a model.

A `stack.position` may only use `embed`; a `mixer.position` may only use the others. Each position says
in `hooks` which it uses; one that its place does not offer is refused when the model is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels.attention import BoundMask, Coords, Region, Score
from dovetail.parts.context import Context
from dovetail.spec import Slot, Spec, register


class PositionModule(nn.Module):
    """Base: every hook is the identity. B batch, T queries, S keys, H heads, G key heads, D width."""

    hooks: ClassVar[frozenset[str]] = frozenset()
    caches: ClassVar[str] = "rotated"  # "raw" where keys must be stored before rotation
    scales: ClassVar[bool] = False  # whether its score sets the attention's scale
    limit: int | None = None  # how many positions it has, where they end
    axes: ClassVar[int] = 1  # position axes that it reads: 1 text, 2 images, 3 M-RoPE

    def embed(self, x: Tensor, ctx: Context) -> Tensor:
        """(B,T,C) -> (B,T,C): position added to (or multiplied into) the token vectors."""
        return x

    def embed_qk(self, xq: Tensor, xk: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Inputs of the query and key maps, (B,T,C) and (B,S,C); values do not see it.

        In self-attention xk is xq; in cross-attention xk is the memory, which stands at `ctx.of_memory()`.
        """
        return xq, xk

    def rotate(self, q: Tensor, k: Tensor, at: Coords, ctx: Context) -> tuple[Tensor, Tensor]:
        """q (B,T,H,D) at `at.q`, k (B,S,G,D) at `at.k`."""
        return q, k

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


@register("position", "none", oracle="formula: identity", source="Kazemnejad et al. 2023 (NoPE)")
class NoPosition(Spec):
    """No position at all (NoPE)."""

    def build(self, slot: Slot) -> nn.Module:
        return PositionModule()


def position_axes(model: nn.Module) -> int:
    """The most position axes that any position of the model reads: what a state must store of each token."""
    return max((m.axes for m in model.modules() if isinstance(m, PositionModule)), default=1)


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


def check_hooks(position: PositionModule, offered: frozenset[str], kind: str, path: str) -> None:
    """Raises BuildError when `position` uses a hook that its place would never call."""
    unused = position.hooks - offered
    if unused:
        raise BuildError(
            f"position {kind!r} works by {', '.join(sorted(unused))}, which this place never calls",
            where=path,
            remedy=f"here only {', '.join(sorted(offered)) or 'nothing'} is used; "
            + ("put it at the stack's position" if "embed" in unused else "put it at a mixer's position"),
        )
