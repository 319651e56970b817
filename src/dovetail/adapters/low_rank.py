"""The module of low-rank adapters: two thin matrices beside a weight, one pair for each map that is fused in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.adapters.base import Site
from dovetail.errors import BuildError
from dovetail.parts.adaptable import Adapter, Run
from dovetail.parts.storage.base import Stored
from dovetail.parts.weights import Drops, Linear, Rng

Pair = tuple[Tensor, Tensor]  # A (rank, in), B (rows, rank)


class LowRank(Adapter, Drops):
    """a (Σ ranks, in): the A of every segment, one under the other; b0, b1, ... (rows of the segment, its rank).

    Buffers, where the start is taken off the weight again: start_a, start_b0, ..., what a and b0, ... started with.
    beneath: (what stands in the place of the weight, the weight) where the start replaced it.
    """

    anchored: bool = False
    beneath: tuple[Stored, nn.Parameter] | None = None

    def __init__(self, spec: Any, site: Site):
        super().__init__()
        width, device = self.widths(site.place)
        # A map that its part reads as a matrix has no input to drop from.
        self.drop, self.ratio = 0.0 if getattr(site.place, "read_whole", False) else spec.dropout, spec.lr_ratio
        self.segments = [(s.start, s.stop) for s in site.segments]
        self.ranks = [spec.rank_of(s) for s in site.segments]
        self.scales = [spec.scale_of(s) for s in site.segments]
        self.a = nn.Parameter(torch.empty(sum(self.ranks), width))
        for i, ((start, stop), rank) in enumerate(zip(self.segments, self.ranks, strict=True)):
            self.register_parameter(f"b{i}", nn.Parameter(torch.zeros(self.out(site.place, start, stop), rank)))
        self.device = device

    @torch.no_grad()
    def begin(self, spec: Any, site: Site, rng: Rng) -> None:
        """The start of its parameters, once it stands in its place. Raises BuildError for a start not possible there."""
        spec.begins.begin(self, site, rng)
        if spec.begins.anchored:
            self.anchored = True
            self.register_buffer("start_a", self.a.detach().clone())
            for i, b in enumerate(self.bs):
                self.register_buffer(f"start_b{i}", b.detach().clone())
        self.to(self.device)

    def widths(self, place: Any) -> tuple[int, torch.device]:
        assert isinstance(place, Linear)
        return place.in_features, next(iter([*place.parameters(), *place.buffers()])).device

    def out(self, place: Any, start: int, stop: int) -> int:
        return stop - start

    @property
    def bs(self) -> list[Tensor]:
        return [getattr(self, f"b{i}") for i in range(len(self.segments))]

    def pairs(self) -> list[Pair]:
        """(A, B) of every segment: views of the parameters."""
        return list(zip(self.a.split(self.ranks), self.bs, strict=True))

    def anchors(self) -> list[Pair]:
        """(A, B) of every segment as they started, where that is taken off the weight."""
        bs = [getattr(self, f"start_b{i}") for i in range(len(self.segments))]
        return list(zip(self.get_buffer("start_a").split(self.ranks), bs, strict=True))

    def changes(self) -> list[Pair]:
        """(A, B) of every segment whose scaled product is all that is added to the weight as it was."""
        if not self.anchored:
            return self.pairs()
        both = zip(self.pairs(), self.anchors(), strict=True)
        return [(torch.cat([a, a0]), torch.cat([b, -b0], 1)) for (a, b), (a0, b0) in both]

    def peft_leaves(self, i: int, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """Leaf -> tensor of segment i, whose pair is (a, b)."""
        return {"lora_A.weight": a, "lora_B.weight": b}

    def forward(self, run: Run, x: Tensor) -> Tensor:
        if self.anchored:  # both products apart and their difference first: exactly zero at the start
            return self.add(run(x), self.delta(x))
        return self._onto(run(x), self.dropout(x), self.a, self.bs)

    def _onto(self, y: Tensor, x: Tensor, a: Tensor, bs: list[Tensor]) -> Tensor:
        """y + scale · B A x, all segments at once: B is their block diagonal, so that y is read and written once."""
        h = F.linear(x, a.to(x.dtype))
        blocks, at, done = [], 0, 0
        for (start, stop), piece, scale in zip(self.segments, bs, self.scales, strict=True):
            rank = piece.shape[1]
            above = [piece.new_zeros(start - done, a.shape[0])] if done < start else []
            blocks += [*above, F.pad(piece * scale, (at, a.shape[0] - at - rank))]
            at, done = at + rank, stop
        if done < y.shape[-1]:
            blocks.append(a.new_zeros(y.shape[-1] - done, a.shape[0]))
        b = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
        rows = h.flatten(0, -2)
        return torch.addmm(y.reshape(rows.shape[0], -1), rows, b.to(x.dtype).T).view(y.shape)

    def delta(self, x: Tensor) -> list[Tensor]:
        """scale · B A x of every segment, (..., rows); less scale · B₀ A₀ x where they are anchored."""
        deltas = self._thin(self.dropout(x), self.a, self.bs)
        if self.anchored:
            off = self._thin(x, self.get_buffer("start_a"), [b for _, b in self.anchors()])
            deltas = [d - o for d, o in zip(deltas, off, strict=True)]
        return deltas

    def _thin(self, x: Tensor, a: Tensor, bs: list[Tensor]) -> list[Tensor]:
        h = F.linear(x, a.to(x.dtype))
        return [
            F.linear(part, b.to(x.dtype)) * scale
            for part, b, scale in zip(h.split(self.ranks, -1), bs, self.scales, strict=True)
        ]

    def add(self, y: Tensor, deltas: list[Tensor]) -> Tensor:
        """y with every segment's part added to its rows."""
        if len(deltas) == 1 and deltas[0].shape[-1] == y.shape[-1]:
            return y + deltas[0]
        pieces, at = [], 0
        for (start, stop), part in zip(self.segments, deltas, strict=True):
            if at < start:
                pieces.append(y[..., at:start])
            pieces.append(y[..., start:stop] + part)
            at = stop
        return torch.cat([*pieces, y[..., at:]] if at < y.shape[-1] else pieces, -1)

    def products(self) -> list[Tensor]:
        """scale · B A of every segment (rows, in), in fp32; less scale · B₀ A₀ where they are anchored."""
        found = [scale * (b @ a) for (a, b), scale in zip(self.pairs(), self.scales, strict=True)]
        if self.anchored:
            off = zip(found, self.anchors(), self.scales, strict=True)
            found = [product - scale * (b @ a) for product, (a, b), scale in off]
        return found

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.add(weight.mT, [p.mT.to(weight.dtype) for p in self.products()]).mT, bias

    def lr_scale(self, name: str) -> float:
        return 1.0 if name == "a" else self.ratio


class LowRankTable(LowRank):
    """On a lookup table W (count, dim): W + scale · (B A)ᵀ, a (rank, count), b0 (dim, rank). Never all of A: rows of it."""

    def widths(self, place: Any) -> tuple[int, torch.device]:
        return place.num_embeddings, place.weight.device

    @torch.no_grad()
    def begin(self, spec: Any, site: Site, rng: Rng) -> None:
        if not spec.begins.tables:
            raise BuildError(
                f"{site.path} is a lookup table: the {spec.begins.kind} start needs linear maps", where="start"
            )
        self.bs[0].normal_(generator=rng("b0"))  # PEFT's way round for tables: A is zero, B is drawn
        self.a.zero_()
        self.to(self.device)

    def out(self, place: Any, start: int, stop: int) -> int:
        return place.embedding_dim

    def peft_leaves(self, i: int, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"lora_embedding_A": a, "lora_embedding_B": b}

    def forward(self, run: Run, x: Tensor) -> Tensor:
        y = run(x)
        h = F.embedding(x, self.a.T.to(y.dtype))
        return y + F.linear(h, self.bs[0].to(y.dtype)) * self.scales[0]

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.products()[0].T.to(weight.dtype), bias
