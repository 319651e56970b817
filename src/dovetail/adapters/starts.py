"""How A and B of a low-rank adapter start, and what that takes off the weight beneath them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from dovetail.adapters.base import PeftConfig, Site
from dovetail.adapters.low_rank import LowRank
from dovetail.errors import BuildError, ConfigError
from dovetail.parts.storage.base import Storage, Stored
from dovetail.parts.storage.nf4 import Nf4
from dovetail.parts.weights import Linear, Rng
from dovetail.spec import Spec, register
from dovetail.spec.categories import StoragePart
from dovetail.spec.ranges import Count

OVERSAMPLE = 8  # random directions beyond the rank: Halko et al. 2011, section 4.2, advise 5 or 10


class LoraStart(Spec):
    """Base of the starts. A (rank, in) and B (rows, rank) are fp32, one pair for each segment of a place."""

    anchored: ClassVar[bool] = False  # whether the product that they start with is taken off the weight
    tables: ClassVar[bool] = False  # whether a lookup table may start so: there A is zero and B drawn

    def begin(self, module: LowRank, site: Site, rng: Rng) -> None:
        """Gives every pair its start. Raises BuildError for a place that it cannot take."""
        for i, ((a, b), scale) in enumerate(zip(module.pairs(), module.scales, strict=True)):
            start, stop = module.segments[i]
            self.draw(a, b, lambda start=start, stop=stop: _dense(site)[start:stop], scale, rng(f"a{i}"))

    def draw(self, a: Tensor, b: Tensor, weight: Callable[[], Tensor], scale: float, rng: torch.Generator) -> None:
        """Fills a and b (b is zero before). weight: gives the segment's rows, (rows, in) fp32."""
        raise TypeError(f"{self.kind} does not say how it starts")

    def to_peft(self) -> dict[str, Any]:
        """init_lora_weights and what goes with it. Raises ConfigError for what PEFT has no words for."""
        raise TypeError(f"{self.kind} does not say what PEFT calls it")


@register(
    "lora_init",
    "uniform",
    default=True,
    oracle="peft init_lora_weights=True",
    source="He et al. 2015 with a = sqrt(5), as Hu et al. 2021's code draws A",
)
class Uniform(LoraStart):
    """A from U(-1/sqrt(in), 1/sqrt(in)), B = 0."""

    tables: ClassVar[bool] = True

    def draw(self, a: Tensor, b: Tensor, weight: Callable[[], Tensor], scale: float, rng: torch.Generator) -> None:
        bound = a.shape[1] ** -0.5
        a.uniform_(-bound, bound, generator=rng)

    def to_peft(self) -> dict[str, Any]:
        return {"init_lora_weights": True}


@register("lora_init", "gaussian", oracle="peft init_lora_weights='gaussian'", source="Hu et al. 2021, section 4.1")
class Gaussian(LoraStart):
    """A from N(0, 1/rank²), B = 0."""

    tables: ClassVar[bool] = True

    def draw(self, a: Tensor, b: Tensor, weight: Callable[[], Tensor], scale: float, rng: torch.Generator) -> None:
        a.normal_(std=1 / a.shape[0], generator=rng)

    def to_peft(self) -> dict[str, Any]:
        return {"init_lora_weights": "gaussian"}


@register(
    "lora_init",
    "orthogonal",
    oracle="peft init_lora_weights='orthogonal'",
    source="datta0.github.io/posts/rethink-lora-init, 'Orthogonal initialisation'",
)
class Orthogonal(LoraStart):
    """B = Y E / 10, A = (X O / 10)ᵀ: X, Y Gaussian, O and E the odd and even rows of one orthogonal matrix.

    Neither is zero and B A is, up to rounding, because E Oᵀ = 0. The rank must be even.
    """

    def draw(self, a: Tensor, b: Tensor, weight: Callable[[], Tensor], scale: float, rng: torch.Generator) -> None:
        rank = a.shape[0]
        if rank % 2:
            raise BuildError(f"the orthogonal start halves the rank, and {rank} is odd", remedy="choose an even rank")
        q = torch.linalg.qr(torch.randn(rank, rank, generator=rng))[0]
        a.copy_((torch.randn(a.shape[1], rank // 2, generator=rng) @ q[0::2] / 10).mT)
        b.copy_(torch.randn(b.shape[0], rank // 2, generator=rng) @ q[1::2] / 10)

    def to_peft(self) -> dict[str, Any]:
        return {"init_lora_weights": "orthogonal"}


@register(
    "lora_init",
    "pissa",
    oracle="peft init_lora_weights='pissa'",
    source="Meng et al. 2024 (PiSSA), eq. 2-4; fast SVD: Halko et al. 2011, algorithms 4.4 and 5.1",
)
class Pissa(LoraStart):
    """B A starts as the principal part of W: U √(S/scale), √(S/scale) Vᵀ of its first singular triplets.

    What trains is W − scale · B₀A₀ + scale · B A. The residual W − scale · B₀A₀ is never written down: B₀ and A₀ stay
    beside B and A, so that W keeps its bits, the start is exactly the model as it was, and other adapters (or none) see
    the weight itself. It is saved in PEFT's layout as a plain LoRA of twice the rank, [B, −B₀] [A; A₀].
    niter: power iterations of a randomised SVD, faster than the exact one (None) where the rank is small.
    """

    niter: Count | None = None
    anchored: ClassVar[bool] = True

    def begin(self, module: LowRank, site: Site, rng: Rng) -> None:
        module.to(module.device)  # where the weight is
        super().begin(module, site, rng)

    def draw(self, a: Tensor, b: Tensor, weight: Callable[[], Tensor], scale: float, rng: torch.Generator) -> None:
        w = weight()
        _fits(a.shape[0], w)
        u, s, vh = _fast_svd(w, a.shape[0], self.niter, rng) if self.niter else _svd(w)
        _split(a, b, u, s / scale, vh)

    def to_peft(self) -> dict[str, Any]:
        return {"init_lora_weights": True}  # the anchors go along, so that the base is the weight as published


@register(
    "lora_init",
    "loftq",
    oracle="formula: Li et al. 2023, algorithm 1, in fp64 over the storage's own quantiser",
    source="Li et al. 2023 (LoftQ), algorithm 1",
)
class Loftq(LoraStart):
    """The weight becomes Q, kept as `storage` says, and B A starts as the nearest of its rank to W − Q.

    `iterations` times: Q = quantised W − scale · B A, then scale · B A = the first singular triplets of W − Q.
    The original waits in host memory until the adapter is removed. Other adapters stand on Q, too.
    Raises BuildError for a place whose weight is quantised already or is meant in part.
    """

    storage: StoragePart = Nf4(double=False)
    iterations: Count = 1

    def begin(self, module: LowRank, site: Site, rng: Rng) -> None:
        place = site.place
        if not isinstance(place, Linear) or place.stored is not None:
            what = "is no linear map" if not isinstance(place, Linear) else "is quantised already"
            raise BuildError(f"{site.path} {what}: LoftQ quantises a linear map's weight itself", where="start")
        if not site.whole:
            raise BuildError(
                f"{site.path} is one weight of several maps, of which only some are targets",
                where="start",
                remedy="LoftQ quantises whole weights: name all of its maps as targets",
            )
        if len(place.attached()) > 1:
            raise BuildError(
                f"{site.path} has an adapter already, whose weight LoftQ would change",
                where="start",
                remedy="put the LoftQ adapter on first",
            )
        module.to(module.device)
        w = _dense(site)
        _fits(max(module.ranks), w)
        stored = self._store(w, place)
        low = _nearest(module, w - stored.dense(torch.float32))
        for _ in range(self.iterations - 1):
            stored = self._store(w - low, place)
            low = _nearest(module, w - stored.dense(torch.float32))
        original: Any = place.weight
        module.beneath = (stored, original)
        if not original.is_meta:
            original.data = original.data.cpu()
        place.stored, place.weight = stored, None  # type: ignore[assignment]

    def _store(self, weight: Tensor, place: Linear) -> Stored:
        assert isinstance(self.storage, Storage)
        return self.storage.store(weight).to(place.dtype)

    def to_peft(self) -> dict[str, Any]:
        raise ConfigError(
            "PEFT's layout keeps no quantised base, which this adapter was trained on",
            where="start",
            remedy='save it with format="dovetail", or merge it',
        )


def put_back(module: LowRank, place: Any) -> None:
    """The weight that a start took away stands again, its bits as they were, unless something was merged over it."""
    if module.beneath is None or place.stored is not module.beneath[0]:
        return
    if len(place.attached()) > 1:
        raise BuildError("other adapters stand on the weight that LoftQ quantised", remedy="remove those first")
    stored, original = module.beneath
    if not original.is_meta:
        original.data = original.data.to(next(stored.buffers()).device, stored.dtype)
    place.stored, place.weight, module.beneath = None, original, None


def peft_start(config: PeftConfig) -> LoraStart:
    """The start that PEFT's config says. Raises ConfigError for one that changes the base in ways not known here."""
    said = config.take("init_lora_weights", True)
    known = {"gaussian": Gaussian(), "orthogonal": Orthogonal(), "eva": Uniform(), "pissa": Pissa()}
    if isinstance(said, bool):
        return Uniform()
    if not isinstance(said, str) or said not in known:
        raise ConfigError(
            f"init_lora_weights={said!r}: these tensors belong to a base weight that was changed, and not here",
            where=config.where,
            remedy="save it from peft with path_initial_model_for_weight_conversion, or merge it there",
        )
    return known[said]


def _dense(site: Site) -> Tensor:
    """The weight of a place, (out, in) fp32, without adapters. Raises BuildError for a lookup table."""
    if not isinstance(site.place, Linear):
        raise BuildError(f"{site.path} is a lookup table: this start needs a linear map", where="start")
    return site.place.dense().detach().float()


def _fits(rank: int, weight: Tensor) -> None:
    if rank > min(weight.shape):
        raise BuildError(
            f"rank {rank} of a weight {tuple(weight.shape)}, which has {min(weight.shape)} singular values",
            where="start",
            remedy="lower the rank",
        )


def _svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(weight, full_matrices=False)


def _fast_svd(weight: Tensor, rank: int, niter: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """About the first `rank` triplets: a random start, `niter` power iterations, orthonormal after each product."""
    width = min(rank + OVERSAMPLE, *weight.shape)
    draw = torch.randn(weight.shape[1], width, generator=rng).to(weight.device)
    q = torch.linalg.qr(weight @ draw)[0]
    for _ in range(niter):
        q = torch.linalg.qr(weight @ torch.linalg.qr(weight.mT @ q)[0])[0]
    u, s, vh = torch.linalg.svd(q.mT @ weight, full_matrices=False)
    return q @ u, s, vh


def _split(a: Tensor, b: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> None:
    """b a = the first triplets of u s vh, their weight shared evenly."""
    rank = a.shape[0]
    root = s[:rank].sqrt()
    a.copy_(root[:, None] * vh[:rank])
    b.copy_(u[:, :rank] * root)


def _nearest(module: LowRank, residual: Tensor) -> Tensor:
    """Every pair of the module as near to its rows of `residual` as its rank allows; their scaled products, (out, in)."""
    low = torch.zeros_like(residual)
    for (a, b), (start, stop), scale in zip(module.pairs(), module.segments, module.scales, strict=True):
        u, s, vh = _svd(residual[start:stop])
        _split(a, b, u, s / scale, vh)
        low[start:stop] = scale * (b @ a)
    return low
