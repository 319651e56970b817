"""LoRA adapters that are computed rather than trained: their factors, put on a model under a name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.adapters.base import Segment, places, shortest, sites
from dovetail.adapters.lora import Lora
from dovetail.adapters.many import active, adapt, trainable, use

Pair = tuple[Tensor, Tensor]  # A (rank, in), B (out, rank)


@dataclass(frozen=True)
class Factors:
    """B A for the rows of one segment of the place at `path`: a (rank, in), b (out, rank)."""

    path: str
    segment: Segment
    a: Tensor
    b: Tensor

    @property
    def key(self) -> tuple[str, int, int]:
        return self.path, self.segment.start, self.segment.stop

    @property
    def name(self) -> str:
        return label(self.segment)

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def label(segment: Segment) -> str:
    """A name that means this segment alone: the published layout's where it has one."""
    return segment.stored or segment.names[-1]


@torch.no_grad()
def put(model: Any, name: str, found: Sequence[Factors]) -> Lora:
    """A frozen LoRA of scale 1 with these factors on the model; returns its spec.

    What was active and what was trainable stay so, and the new one is not in use. Raises SpecError for a name taken.
    """
    ranks = {f.name: f.rank for f in found}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    every = [label(s) for site in places(model) for s in site.segments]
    spec = Lora(
        rank=usual,
        targets=tuple(shortest(list(ranks), every)),
        ranks={n: rank for n, rank in ranks.items() if rank != usual},
    )
    given = {f.key: f for f in found}
    used, learning = active(model), trainable(model)
    adapt(model, spec, name=name)
    for site in sites(model, spec.targets):
        module: Any = site.place.attached()[name]
        for segment, (a, b) in zip(site.segments, module.pairs(), strict=True):
            factors = given.pop((site.path, segment.start, segment.stop))
            a.copy_(factors.a)
            b.copy_(factors.b)
        module.requires_grad_(False)
    assert not given, "every factor has its place"
    for parameter in learning.values():
        parameter.requires_grad_(True)
    use(model, *used)
    return spec


def joined(pairs: Sequence[Pair]) -> Pair:
    """One pair whose product is the sum of all products: ranks one after another."""
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)


def norm(pairs: Sequence[Pair]) -> float:
    """Frobenius norm of Σ B A, by the triangular factors alone, in fp64: nothing of (out, in) is made."""
    a, b = joined(pairs)
    return torch.linalg.matrix_norm(_triangular(b) @ _triangular(a.mT).mT).item()


def best(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD U, σ, Vᵀ of Σ B A by way of its factors, in fp64: as many σ as the ranks together, or the smaller side."""
    a, b = joined(pairs)
    (qb, rb), (qa, ra) = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().mT)
    u, s, vh = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
    return qb @ u, s, vh @ qa.mT


def terms(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD U, σ, Vᵀ of x (out, in) by the eigenvectors of its smaller Gram matrix, in fp64.

    Some three times as fast as the SVD of x in fp32, and nearer. σ is ‖uᵢᵀ x‖, so that all terms together give x
    however close two σ lie; those below 1e-8 of the largest are right in their sum, not one by one.
    """
    tall = x.shape[0] > x.shape[1]
    y = (x.mT if tall else x).double()
    u = torch.linalg.eigh(y @ y.mT)[1].flip(1)
    rows = u.mT @ y
    s = rows.norm(dim=1)
    vh = rows / s.clamp_min(torch.finfo(s.dtype).tiny)[:, None]
    return (vh.mT, s, u.mT) if tall else (u, s, vh)


def balanced(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> Pair:
    """The first `rank` terms as A = √σ Vᵀ and B = U √σ, fp32: equal norms, as training on would have them."""
    root = s[:rank].sqrt()
    return (root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float()


def left_out(s: Tensor, rank: int) -> float:
    """Relative Frobenius error of the first `rank` terms of an SVD (Eckart and Young 1936); 0 for nothing at all."""
    squares = s.square()
    total = squares.sum().item()
    return (squares[rank:].sum().item() / total) ** 0.5 if total else 0.0


def _triangular(x: Tensor) -> Tensor:
    return torch.linalg.qr(x.double(), mode="r")[1]
