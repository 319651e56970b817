"""Several LoRA adapters on one model combined into a new one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dovetail.adapters.base import Segment, sites
from dovetail.adapters.factors import Factors, Pair, balanced, best, joined, label, left_out, norm, put, terms
from dovetail.adapters.lora import Lora
from dovetail.adapters.many import adapters
from dovetail.errors import BuildError, UserError, did_you_mean
from dovetail.parts.weights import generator

Sign = Literal["total", "frequency"]


@dataclass(frozen=True)
class Rule:
    """How task vectors become one: what each loses first, and whether entries vote for a sign."""

    prune: Literal["magnitude", "random"] | None = None
    elect: bool = False


RULES = {
    "linear": Rule(),
    "ties": Rule("magnitude", elect=True),
    "dare_linear": Rule("random"),
    "dare_ties": Rule("random", elect=True),
    "magnitude_prune": Rule("magnitude"),
}
METHODS = ("cat", "svd", *RULES, *(f"{name}_svd" for name in RULES if name != "linear"))


@dataclass(frozen=True)
class Combined:
    """What became of one segment. rank: of the new adapter there.

    truncated: relative Frobenius error of the SVD, against what it was taken of (0 without one). from_sum: relative
    Frobenius distance from Σ weight · ΔW, which `cat` reaches, `svd` approximates, and the others mean to leave.
    """

    segment: str
    rank: int
    truncated: float
    from_sum: float


@dataclass(frozen=True)
class Share:
    """One adapter at one segment: ΔW = scale · B A, wanted `weight` times."""

    adapter: str
    weight: float
    scale: float
    a: Tensor
    b: Tensor

    @property
    def pair(self) -> Pair:
        """weight · ΔW."""
        return self.a, self.b * (self.weight * self.scale)


@torch.no_grad()
def combine(
    model: Any,
    weights: Mapping[str, float],
    *,
    method: str = "svd",
    into: str,
    rank: int | None = None,
    density: float | None = None,
    sign: Sign | None = None,
    seed: int | None = None,
) -> list[Combined]:
    """A new LoRA adapter `into` from the LoRA adapters that `weights` names; what it did, segment by segment.

    The new one is frozen and not in use: `use(model, into)`. Where an adapter has no part in a segment it is left out.
    With ΔW = scale · B A of each:

    - "cat": Σ weight · ΔW exactly; ranks add up.
    - "svd": Σ weight · ΔW, cut to `rank` (the largest of theirs unless given) by its SVD, the nearest of that rank.
    - "linear": A = Σ ±√|weight · scale| A, B = Σ √|weight · scale| B (± the sign of weight · scale). PEFT's
      definition, and *not* Σ weight · ΔW: the product of two sums has cross terms. Ranks must be equal.
    - "ties" (Yadav et al. 2023, algorithm 1): the largest `density` of entries stay, every entry votes a sign (`sign`:
      by "total" mass, the default, or "frequency"), those that agree are averaged.
    - "dare_linear", "dare_ties" (Yu et al. 2023, section 3.1): entries stay at random, with probability `density`, and
      are divided by it; then summed, or as in ties from the vote on. Masks depend on `seed`, place and adapter only.
    - "magnitude_prune": the largest `density` of entries stay; then summed.

    These four act on A and on B apart, weighted as in "linear"; with `_svd` at the end of the name they act on ΔW, and
    the result is cut to `rank`. All are as PEFT's add_weighted_adapter has them, but that the new scale is 1.
    Raises UserError for names, methods or options that do not fit, BuildError for adapters that are not plain LoRA.
    """
    _check(method, weights, {"rank": rank, "density": density, "sign": sign, "seed": seed})
    name = method.removesuffix("_svd")
    rule = RULES[{"cat": "linear", "svd": "linear"}.get(name, name)]
    made, report = [], []
    for (path, segment), parts in _segments(model, weights).items():
        here = f"{path}.{segment.start}"

        def mixed(tensors: Sequence[Tensor], by: Sequence[float], what: str, parts=parts, here=here) -> Tensor:
            rngs = [
                generator(seed or 0, f"{here}.{p.adapter}.{what}", t.device)
                for p, t in zip(parts, tensors, strict=True)
            ]
            return mix(tensors, by, rule, density or 1.0, sign or "total", rngs)

        cut = 0.0
        if method == "cat":
            a, b = joined([p.pair for p in parts])
        elif method.endswith("svd"):
            deltas = [p.b @ p.a * p.scale for p in parts] if method != "svd" else []
            dense = mixed(deltas, [p.weight for p in parts], "delta") if deltas else None
            u, s, vh = best([p.pair for p in parts]) if dense is None else terms(dense)
            keep = min(rank or max(p.a.shape[0] for p in parts), min(parts[0].b.shape[0], parts[0].a.shape[1]))
            a, b = balanced(u, s, vh, min(keep, len(s)))
            cut = left_out(s, keep)
        else:
            _check_ranks(method, label(segment), parts)
            whole = [p.weight * p.scale for p in parts]
            a = mixed([p.a for p in parts], [math.copysign(abs(w) ** 0.5, w) for w in whole], "a")
            b = mixed([p.b for p in parts], [abs(w) ** 0.5 for w in whole], "b")
        made.append(Factors(path, segment, a, b))
        wanted = [p.pair for p in parts]
        size, off = norm(wanted), norm([*wanted, (a, -b)])
        distance = off / size if size else (0.0 if off == 0.0 else math.inf)
        report.append(Combined(label(segment), a.shape[0], cut, distance))
    put(model, into, made)
    return report


def mix(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    rule: Rule,
    density: float,
    sign: Sign,
    rngs: Sequence[torch.Generator],
) -> Tensor:
    """One tensor from several of one shape by `rule`; the vote is on the entries before they are weighted."""
    if rule.prune == "magnitude":
        tensors = [largest(t, density) for t in tensors]
    elif rule.prune == "random":
        tensors = [dropped(t, density, rng) for t, rng in zip(tensors, rngs, strict=True)]
    stack = torch.stack(list(tensors))
    weighted = stack * torch.tensor(weights, dtype=stack.dtype, device=stack.device).view(-1, *[1] * (stack.dim() - 1))
    if not rule.elect:
        return weighted.sum(0)
    votes = (stack if sign == "total" else stack.sign()).sum(0)
    agree = stack.sign() == torch.where(votes >= 0, 1, -1)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def largest(x: Tensor, density: float) -> Tensor:
    """The floor(density · count) entries of largest magnitude, and zeros."""
    kept = x.abs().flatten().topk(int(density * x.numel())).indices
    return torch.zeros_like(x).flatten().scatter(0, kept, x.flatten()[kept]).view_as(x)


def dropped(x: Tensor, density: float, rng: torch.Generator) -> Tensor:
    """Entries at random with probability `density`, divided by it, and zeros: the same expectation."""
    return x * torch.bernoulli(torch.full_like(x, density), generator=rng) / density


def _segments(model: Any, weights: Mapping[str, float]) -> dict[tuple[str, Segment], list[Share]]:
    """(path, segment) -> the adapters that have a part in it, in the order of the first that stands there."""
    held = adapters(model)
    found: dict[tuple[str, Segment], list[Share]] = {}
    for name, weight in weights.items():
        if name not in held:
            raise UserError(
                f"no adapter {name!r} on this model", remedy=did_you_mean(name, held) if held else "adapt it first"
            )
        spec = held[name]
        if type(spec) is not Lora:
            raise BuildError(f"{name!r} is a {spec.kind} adapter", remedy="combine plain lora adapters")
        for site in sites(model, spec.targets):
            module: Any = site.place.attached()[name]
            for segment, (a, b), scale in zip(site.segments, module.changes(), module.scales, strict=True):
                found.setdefault((site.path, segment), []).append(Share(name, float(weight), scale, a, b))
    return found


def _check(method: str, weights: Mapping[str, float], options: dict[str, Any]) -> None:
    """Raises UserError for what cannot be, and for options that this method would not read."""
    if method not in METHODS:
        raise UserError(f"no method {method!r}", remedy=did_you_mean(method, METHODS))
    if not weights:
        raise UserError("nothing to combine", remedy="give {name: weight, ...}")
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise UserError(f"the weight {weight} of {name!r} is no number to multiply by")
    rule = RULES.get(method.removesuffix("_svd"), Rule())
    reads = {
        "rank": method.endswith("svd"),
        "density": rule.prune is not None,
        "sign": rule.elect,
        "seed": rule.prune == "random",
    }
    for option, value in options.items():
        if value is not None and not reads[option]:
            raise UserError(f"{method} does not read {option}", where=f"{option}={value!r}", remedy="leave it out")
        if value is None and reads[option] and option in ("density", "seed"):
            raise UserError(f"{method} needs {option}", remedy=f"give {option}=...")
    density, sign, rank = options["density"], options["sign"], options["rank"]
    if density is not None and not 0 < density <= 1:
        raise UserError(f"density {density}", remedy="give a share of the entries, above 0 and at most 1")
    if sign not in (None, "total", "frequency"):
        raise UserError(f"sign {sign!r}", remedy='use "total" or "frequency"')
    if rank is not None and rank < 1:
        raise UserError(f"rank {rank}", remedy="give 1 or more")


def _check_ranks(method: str, segment: str, parts: Sequence[Share]) -> None:
    ranks = {p.adapter: p.a.shape[0] for p in parts}
    if len(set(ranks.values())) > 1:
        said = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
        raise UserError(
            f"{method} adds A to A and B to B, and the ranks differ: {said}",
            where=segment,
            remedy='use "cat", "svd", or a method that ends in _svd',
        )
