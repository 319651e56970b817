"""Relative positions in the score: tables of distances (Toeplitz) and terms of content against distance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.errors import BuildError, DataError
from dovetail.kernels.attention import Coords, RelativeLogits, Score, Toeplitz
from dovetail.parts.context import Context
from dovetail.parts.norm import LayerNorm
from dovetail.parts.position.base import PositionModule, head_width, refuse_cross, refuse_text
from dovetail.parts.weights import Lookup
from dovetail.spec import Slot, Spec, register
from dovetail.spec.categories import NormPart
from dovetail.spec.ranges import Chance


@register("position", "t5_buckets", oracle="transformers t5", source="Raffel et al. 2020, section 2.1", endless=True)
class T5Buckets(Spec):
    """q·k + b[head, bucket(i - j)], b learned; near distances have buckets of their own, far ones share.

    Of n buckets on a side, distance d < n/2 has its own; d beyond has n/2 + ⌊n/2 · ln(2d/n) / ln(2·max_distance/n)⌋,
    n - 1 at most.
    T5 has one table a stack: the first layer owns it, the others have {kind: ref, path: blocks.0.mixer.position}.
    Its scores are not scaled: the attention's `scale` is 1. Causal places use all buckets for the past.
    """

    buckets: int = 32
    max_distance: int = 128

    def build(self, slot: Slot) -> nn.Module:
        exact = self.buckets // (2 if slot.causal else 4)
        if exact < 1 or self.max_distance <= exact:
            raise BuildError(
                f"{self.buckets} buckets up to a distance of {self.max_distance}",
                where=slot.path,
                remedy=f"give at least {2 if slot.causal else 4} buckets, and a max_distance beyond {max(exact, 1)}",
            )
        return T5BucketsModule(self, slot)


class T5BucketsModule(PositionModule):
    hooks: ClassVar[frozenset[str]] = frozenset({"score"})
    tabled: ClassVar[bool] = True

    def __init__(self, spec: T5Buckets, slot: Slot):
        super().__init__()
        self.causal, self.buckets, self.max_distance = slot.causal, spec.buckets, spec.max_distance
        self.table = Lookup(spec.buckets, slot.heads, slot=slot, role="position")

    def bucket(self, distance: Tensor) -> Tensor:
        """k_pos - q_pos, any shape -> bucket, int64."""
        if self.causal:
            count, side, back = self.buckets, torch.zeros_like(distance), (-distance).clamp_min(0)
        else:
            count = self.buckets // 2
            side, back = (distance > 0).long() * count, distance.abs()
        exact = count // 2
        ratio = torch.log(back.clamp_min(1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (count - exact)).long()).clamp_max(count - 1)
        return side + torch.where(back < exact, back, far)

    def score(self, q: Tensor, k: Tensor, at: Coords, ctx: Context, project: Callable[..., Any]) -> Score:
        return Score((Toeplitz(self.table.matrix().t(), self.bucket, reach=self.max_distance),))


@register(
    "position", "deberta", oracle="transformers deberta_v2", source="He et al. 2021, eq. 2-4; DeBERTaV3, section 2"
)
class Deberta(Spec):
    """(q·k + q·K[δ] + k·Q[δ]) / sqrt(D·(1 + terms)), δ the bucket of i - j: content, and content against position.

    K and Q are one table of distances through the mixer's own key and query maps: disentangled attention. One table a
    model: the first layer owns it, the others have a ref to it. buckets: log buckets on each side, 0 for plain
    distances. max_distance: where both end. terms: which are there, content to position (q·K) or position to content
    (k·Q). norm: of the table's rows; dropout: on them, anew in every layer.
    """

    buckets: int = 256
    max_distance: int = 512
    terms: tuple[Literal["c2p", "p2c"], ...] = ("c2p", "p2c")
    norm: NormPart | None = LayerNorm(eps=1e-7)
    dropout: Chance = 0.0

    def build(self, slot: Slot) -> nn.Module:
        if not self.terms or len(set(self.terms)) != len(self.terms):
            raise BuildError(
                f"terms {self.terms} of deberta", where=slot.path, remedy="give c2p, p2c or both, once each"
            )
        refuse_cross(slot, self.kind)
        return DebertaModule(self, slot)


class DebertaModule(PositionModule):
    hooks: ClassVar[frozenset[str]] = frozenset({"score"})
    scales: ClassVar[bool] = True

    def __init__(self, spec: Deberta, slot: Slot):
        super().__init__()
        self.terms, self.buckets, self.max_distance = spec.terms, spec.buckets, spec.max_distance
        self.relative = "c2p" in spec.terms  # type: ignore[misc]
        self.span = spec.buckets or spec.max_distance
        self.table = Lookup(2 * self.span, slot.dim, slot=slot, role="position")
        self.norm = None if spec.norm is None else slot.build(spec.norm, "norm")
        self.drop = spec.dropout

    def bucket(self, distance: Tensor) -> Tensor:
        """k_pos - q_pos, any shape -> row of the table, int64."""
        back = -distance
        if self.buckets:
            mid = self.buckets // 2
            size = torch.where(back.abs() < mid, mid - 1, back.abs())
            log = torch.log(size / mid) / torch.log(torch.full((), (self.max_distance - 1) / mid, device=size.device))
            far = (torch.ceil(log * (mid - 1)) + mid).long() * back.sign()
            back = torch.where(size <= mid, back, far)
        return (back + self.span).clamp(0, 2 * self.span - 1)

    def score(self, q: Tensor, k: Tensor, at: Coords, ctx: Context, project: Callable[..., Any]) -> Score:
        _, T, H, D = q.shape
        rows = self.table.matrix()
        rows = rows if self.norm is None else self.norm(rows)
        rows = F.dropout(rows, self.drop) if self.drop and self.training else rows
        reach = self.max_distance  # from which on, either way, the bucket does not change
        if at.in_step and (at.aligned or at.q is at.k):
            reach = min(reach, max(T - 1, 1))
        bucket = self.bucket(torch.arange(-reach, reach + 1, device=q.device))

        def term(name: str) -> RelativeLogits:
            known, by_key = (q, False) if name == "c2p" else (k.repeat_interleave(H // k.shape[2], 2), True)
            vectors = project(rows, "query" if by_key else "key")[bucket]  # (2·reach+1,H|G,D)
            vectors = vectors.repeat_interleave(H // vectors.shape[1], 1)
            values = known.transpose(1, 2) @ vectors.permute(1, 2, 0)
            return RelativeLogits(values, reach, by_key=by_key)

        terms = tuple(term(name) for name in self.terms)
        return Score(terms, scale=(D * (1 + len(terms))) ** -0.5)


@register(
    "position",
    "relative_bias_2d",
    oracle="transformers swin",
    source="Liu et al. 2021 (Swin), eq. 4",
    axes=2,
    causal=False,
)
class RelativeBias2d(Spec):
    """q·k + b[head, row distance, column distance], b learned. height, width: of the grid (the window's)."""

    height: int | None = None
    width: int | None = None

    def build(self, slot: Slot) -> nn.Module:
        return RelativeBias2dModule(*grid_size(self.height, self.width, self.kind, slot), slot)


class RelativeBias2dModule(PositionModule):
    hooks: ClassVar[frozenset[str]] = frozenset({"score"})
    axes: ClassVar[int] = 2

    def __init__(self, height: int, width: int, slot: Slot):
        super().__init__()
        self.height, self.width, self.path = height, width, slot.path
        self.table = Lookup((2 * height - 1) * (2 * width - 1), slot.heads, slot=slot, role="position")

    def bucket(self, rows: Tensor, columns: Tensor) -> Tensor:
        """k_pos - q_pos on both axes -> row of the table."""
        return (self.height - 1 - rows) * (2 * self.width - 1) + self.width - 1 - columns

    def score(self, q: Tensor, k: Tensor, at: Coords, ctx: Context, project: Callable[..., Any]) -> Score:
        check_grid((self.height, self.width), ctx, self.path)
        return Score((Toeplitz(self.table.matrix().t(), self.bucket, axes=(0, 1)),))


@register(
    "position",
    "axial",
    oracle="transformers sam",
    source="Li et al. 2022 (MViTv2), eq. 4-5; Kirillov et al. 2023 (SAM)",
    axes=2,
    causal=False,
)
class Axial(Spec):
    """q·k·scale + q·R[row distance] + q·C[column distance], R and C learned: decomposed, with q unscaled.

    height, width: of the grid (the window's, where the mixer is in one).
    """

    height: int | None = None
    width: int | None = None

    def build(self, slot: Slot) -> nn.Module:
        return AxialModule(*grid_size(self.height, self.width, self.kind, slot), slot)


class AxialModule(PositionModule):
    hooks: ClassVar[frozenset[str]] = frozenset({"score"})
    axes: ClassVar[int] = 2
    gridded: ClassVar[bool] = True

    def __init__(self, height: int, width: int, slot: Slot):
        super().__init__()
        head_dim = head_width(slot, "axial")
        self.sizes, self.path = (height, width), slot.path
        self.rows = Lookup(2 * height - 1, head_dim, slot=slot, role="position")
        self.columns = Lookup(2 * width - 1, head_dim, slot=slot, role="position")

    def score(self, q: Tensor, k: Tensor, at: Coords, ctx: Context, project: Callable[..., Any]) -> Score:
        check_grid(self.sizes, ctx, self.path)
        tables, grid = (self.rows.matrix(), self.columns.matrix()), ctx.needs_grid(self.path)

        def along(axis: int) -> RelativeLogits:
            """Rows of a table are distances from the key to the query."""
            values = torch.einsum("bthd,rd->bhtr", q, tables[axis].flip(0))
            return RelativeLogits(values, self.sizes[axis] - 1, axis, inside_scale=False, places=grid[axis])

        return Score((along(0), along(1)))


def grid_size(height: int | None, width: int | None, kind: str, slot: Slot) -> tuple[int, int]:
    """The grid that a part was given, else its place's. Raises BuildError when neither says."""
    refuse_cross(slot, kind)
    if slot.causal:
        raise BuildError(
            f"position {kind!r} reads rows and columns, and a causal place has a line of tokens",
            where=slot.path,
            remedy="use it in an encoder of images; for text, t5_buckets",
        )
    refuse_text(slot, f"position {kind!r}")
    found = slot.grid or (None, None)
    size = height or found[0], width or found[1]
    if size[0] is None or size[1] is None:
        raise BuildError(
            f"position {kind!r} needs the size of its grid",
            where=slot.path,
            remedy="give height and width, or put it in a window",
        )
    return size[0], size[1]


def check_grid(size: tuple[int, int], ctx: Context, path: str) -> None:
    """Raises DataError for tokens on a grid larger than the tables."""
    height, width = ctx.needs_grid(path)
    if height > size[0] or width > size[1]:
        raise DataError(
            f"a grid of {height} x {width} tokens, and position tables for {size[0]} x {size[1]}",
            where=path,
            remedy="give smaller images, or build the model with larger tables",
        )
