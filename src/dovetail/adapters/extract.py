"""A full fine-tune turned into a LoRA: the singular vectors of what training changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.adapters.base import Segment, Site, sites
from dovetail.adapters.factors import Factors, balanced, label, put, terms
from dovetail.adapters.many import active, adapters, use
from dovetail.errors import BuildError, UserError
from dovetail.models.resolve import resolved
from dovetail.parts.weights import Linear
from dovetail.spec import Spec, diff


@dataclass(frozen=True)
class Extracted:
    """One segment. norm: ‖ΔW‖. change: ‖ΔW‖ / ‖W‖. rank: kept, 0 where nothing changed. error: ‖ΔW − B A‖ / ‖ΔW‖ of
    the factors as they are stored. energy: share of ‖ΔW‖² in the terms kept. Norms are Frobenius norms."""

    segment: str
    norm: float
    change: float
    rank: int
    error: float
    energy: float


@dataclass(frozen=True)
class Uncovered:
    """What the tune changed and the adapter leaves as it was. rows: of the weight. change: relative, over those rows."""

    name: str
    rows: int
    change: float


@dataclass(frozen=True)
class Account:
    """What an extraction kept and what it left. settings: (path, base, tuned) where the specs differ besides."""

    segments: tuple[Extracted, ...]
    uncovered: tuple[Uncovered, ...]
    settings: tuple[tuple[str, str, str], ...]
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def layers(self) -> dict[str, float]:
        """Relative error of each layer that changed, its segments taken as one: √(Σ ‖ΔW − B A‖² / Σ ‖ΔW‖²)."""
        groups: dict[str, list[Extracted]] = {}
        for s in self.segments:
            if s.rank:
                groups.setdefault(_layer(s.segment), []).append(s)
        return {
            name: (sum((s.error * s.norm) ** 2 for s in found) / sum(s.norm**2 for s in found)) ** 0.5
            for name, found in groups.items()
        }


@torch.no_grad()
def extract(
    base: Any,
    tuned: Any,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: tuple[str, ...] | None = None,
    name: str = "extracted",
) -> tuple[Any, Account]:
    """(`base` with a LoRA on it that does what `tuned` does, as far as its rank goes, active; the account).

    ΔW = W_tuned − W_base of every segment that `targets` mean (every linear map but the head unless given; tables may
    be named), fused maps apart, is cut to its largest singular terms (Eckart and Young 1936: no matrix of that rank is
    nearer): `rank` of them, or as few as hold the share `energy` of ‖ΔW‖². A weight kept in codes counts as it is
    dequantised. Norms, biases, and whatever `targets` leave out are no part of it: the account names those that differ.

    Raises UserError for rank and energy that are not one of the two, or when no segment differs; BuildError for models
    whose weights differ in name or shape, or that have adapters on them.
    """
    _check(rank, energy)
    _check_models(base, tuned)
    made, lines = [], []
    found = sites(base, targets)
    for site in found:
        before = _matrix(site.place)
        after = _matrix(tuned.get_submodule(site.path)).to(before.device)
        for segment in site.segments:
            old, new = _rows(site.place, before, segment), _rows(site.place, after, segment)
            factors, line = _segment(site.path, segment, old, new, rank, energy)
            lines.append(line)
            if factors is not None:
                made.append(factors)
    if not made:
        raise UserError(
            "the two models do not differ in what is to be extracted",
            where=", ".join(targets) if targets else "every linear map but the head",
            remedy="name the weights that differ: targets",
        )
    left = tuple(_uncovered(base, tuned, found))
    put(base, name, made)
    use(base, *active(base), name)
    settings = tuple((path, str(a), str(b)) for path, a, b in diff(_behaviour(base.spec), _behaviour(tuned.spec)))
    parameters = sum(f.a.numel() + f.b.numel() for f in made)
    return base, Account(tuple(lines), left, settings, parameters)


def _segment(
    path: str, segment: Segment, old: Tensor, new: Tensor, rank: int | None, energy: float | None
) -> tuple[Factors | None, Extracted]:
    """(the factors of new − old, its line); no factors where nothing changed."""
    delta = new.float() - old.float()
    size = torch.linalg.matrix_norm(delta).item()
    if size == 0.0:
        return None, Extracted(label(segment), norm=0.0, change=0.0, rank=0, error=0.0, energy=1.0)
    if not math.isfinite(size):
        raise BuildError(f"{label(segment)} holds NaN or infinity in one of the two models")
    u, s, vh = terms(delta)
    shares = s.square().cumsum(0)
    shares /= shares[-1].item()
    keep = min(rank or len(s), len(s)) if energy is None else 1 + int((shares < energy).sum())
    a, b = balanced(u, s, vh, keep)
    factors = Factors(path, segment, a, b)
    return factors, Extracted(
        factors.name,
        norm=size,
        change=size / (torch.linalg.matrix_norm(old.float()).item() or float("inf")),
        rank=keep,
        error=torch.linalg.matrix_norm(delta - b @ a).item() / size,
        energy=shares[keep - 1].item(),
    )


def _uncovered(base: Any, tuned: Any, covered: list[Site]) -> Iterator[Uncovered]:
    """Every weight with rows that differ and that no segment holds."""
    spans = {f"{site.path}.weight": site.segments for site in covered}
    other = _weights(tuned)
    for name, (shape, get) in _weights(base).items():
        segments = spans.get(name, ())
        free = torch.ones(shape[0] if shape else 1, dtype=torch.bool)
        for segment in segments:
            free[segment.start : segment.stop] = False
        if not free.any():
            continue
        old, new = get().float().cpu(), other[name][1]().float().cpu()
        old, new = (t.reshape(len(free), -1)[free] for t in (old, new))
        size = (new - old).norm().item()
        if size:
            yield Uncovered(name, int(free.sum()), size / (old.norm().item() or float("inf")))


def _check(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise UserError("rank and energy: give one of the two", remedy="rank=16, or energy=0.9")
    if rank is not None and rank < 1:
        raise UserError(f"rank {rank}", remedy="give 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy {energy}", remedy="give a share of the squared norm, above 0 and at most 1")


def _check_models(base: Any, tuned: Any) -> None:
    for role, model in (("base", base), ("tuned", tuned)):
        if adapters(model):
            raise BuildError(
                f"the {role} model has adapters: {', '.join(adapters(model))}",
                remedy="merge_and_forget, or remove them",
            )
    old, new = _weights(base), _weights(tuned)
    different = sorted(old.keys() ^ new.keys())
    if different:
        raise BuildError(
            f"{different[0]} is in the {'base' if different[0] in old else 'tuned'} model alone"
            + (f", and {len(different) - 1} more differ" if len(different) > 1 else ""),
            remedy="give a tune of this very base",
        )
    for name, (shape, _) in old.items():
        if shape != new[name][0]:
            raise BuildError(
                f"{name} is {shape} in the base and {new[name][0]} in the tuned model",
                remedy="give a tune of this very base; after a change of vocabulary, give the base the same change first",
            )


def _weights(model: Any) -> Mapping[str, tuple[tuple[int, ...], Callable[[], Tensor]]]:
    """Name -> (shape, how to get it) of every weight; those kept in codes are dequantised when asked for."""
    found: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {
        name: (tuple(p.shape), lambda p=p: p.detach()) for name, p in model.named_parameters()
    }
    for path, module in model.named_modules():
        if isinstance(module, Linear) and module.stored is not None:
            found[f"{path}.weight"] = (tuple(module.stored.shape), module.stored.dense)
    return found


def _matrix(place: Any) -> Tensor:
    """W without adapters."""
    return (place.dense() if isinstance(place, Linear) else place.weight).detach()


def _rows(place: Any, weight: Tensor, segment: Segment) -> Tensor:
    """The segment's (out, in). A table W (count, dim) is adapted as Wᵀ."""
    return weight[segment.start : segment.stop] if isinstance(place, Linear) else weight.mT


def _behaviour(spec: Any) -> Spec:
    """The spec with sizes written out, less how it starts."""
    filled = resolved(spec)
    return filled.replace(init=type(spec).model_fields["init"].default) if "init" in type(spec).model_fields else filled


def _layer(name: str) -> str:
    """The dotted name up to its last number: the layer."""
    steps = name.split(".")
    last = max((i for i, step in enumerate(steps) if step.isdigit()), default=len(steps) - 1)
    return ".".join(steps[: last + 1])
