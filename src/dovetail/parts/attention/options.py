"""What attentions of every sort share: options that a position rules out, and the plan of each of their uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import BuildError
from dovetail.kernels.attention import Content, RelativeLogits, Score, Toeplitz
from dovetail.kernels.plan import Plan
from dovetail.parts.context import Context
from dovetail.parts.mask import Mask
from dovetail.parts.position.base import PositionModule, adds_values


def by_name(sizes: tuple[int, int, int, int]) -> dict[str, int]:
    """(heads, key/value heads, head width, value width) as the fields that say them: what an override by another kind
    of mixer takes over, whose own defaults may be others."""
    return dict(zip(("heads", "kv_heads", "head_dim", "value_dim"), sizes, strict=True))


def check_options(spec: Any, position: PositionModule, path: str) -> None:
    """Raises BuildError for a mixer's scale or dropout that cannot be beside its position."""
    kind = spec.position.kind
    if spec.scale is not None and position.scales:
        raise BuildError(
            f"scale={spec.scale} beside position {kind!r}, which sets the scale itself",
            where=path,
            remedy="leave scale out",
        )
    if spec.dropout and "regions" in position.hooks:
        raise BuildError(
            f"dropout on the weights of an attention over regions (position {kind!r})",
            where=path,
            remedy="set dropout to 0: regions merge by their normalisers, which dropped weights do not have",
        )


def score_like(position: PositionModule, cap: float | None = None) -> Score | None:
    """A score of the sort that `position` gives, without its numbers: for a plan."""
    if "score" not in position.hooks:
        return None if cap is None else Score(cap=cap)
    terms: tuple[Any, ...] = (Content(lambda start, stop: torch.empty(0, device="meta"), 0),)
    if position.tabled:
        terms = (Toeplitz(torch.empty(0, device="meta"), lambda distance: distance),)
    elif position.relative or position.gridded:
        places = 1 if position.gridded else None
        terms = (RelativeLogits(torch.empty(1, 1, 1, 2, device="meta"), 0, places=places),)
    return Score(terms, cap=cap, value_terms=_added if adds_values(position) else None)


def plans_of(
    length: int, rule: Mask, newest: Mask | None, chosen: Callable[[Context, Mask, int], Plan]
) -> dict[str, Plan]:
    """The plan of every use of a self-attention under `rule`: `chosen` of a context, a mask and a number of queries.

    newest: the mask of one decoding step; None where nothing decodes.
    """
    meta = torch.device("meta")
    plain = Context.of(1, length, meta)
    packed = Context.of(1, length, meta, segments=torch.zeros(1, length, dtype=torch.long, device=meta))
    uses = {"training, prefill": chosen(plain, rule, length), "padded or packed": chosen(packed, rule, length)}
    if newest is None:
        return uses
    stored = replace(plain, in_step=False, memo={})  # where the tokens of a state stand nobody promises
    with torch.no_grad():
        return uses | {"decoding": chosen(stored, newest, 1)}


def _added(p: Tensor, start: int, stop: int) -> Tensor:
    """Stands for a position's value terms."""
    return p
