"""LoRA: a weight plus a product of two thin matrices."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.adapters.base import AdapterSpec, PeftConfig, Segment, Site, matches, places, rng, shortest, sites
from dovetail.errors import ConfigError, SpecError
from dovetail.parts.adaptable import Adapter, Run
from dovetail.parts.weights import Drops, Linear, Lookup, Rng
from dovetail.spec import register
from dovetail.spec.ranges import Chance, Count, Positive


@register(
    "adapter",
    "lora",
    default=True,
    oracle="peft LoraConfig",
    source="Hu et al. 2021, eq. 3; alpha/sqrt(r): Kalajdzievski 2023, theorem 3.2; lr_ratio: Hayou et al. 2024 (LoRA+)",
)
class Lora(AdapterSpec):
    """W + scale · B A, A (rank, in) and B (out, rank), scale = alpha/rank, or alpha/sqrt(rank) (rsLoRA).

    B starts at zero, so that the start is the model as it was. targets: as in adapters.base.sites; every linear map
    but the head unless given. ranks, alphas: pattern -> value for places that differ. dropout: on the input of A only.
    lr_ratio: how much faster B learns than A (LoRA+; 16 is the paper's advice).
    """

    rank: Count = 16
    alpha: Positive | None = None
    scaling: Literal["rank", "sqrt"] = "rank"
    dropout: Chance = 0.0
    targets: tuple[str, ...] | None = None
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    lr_ratio: Positive = 1.0
    peft_type: ClassVar[str | None] = "LORA"

    def attach(self, model: Any, name: str, seed: int) -> None:
        found = sites(model, self.targets)
        self.check_patterns(found)
        for site in found:
            site.place.attach(name, self.adapter(site, rng(seed, site.path, name)))

    @classmethod
    def from_peft(cls, config: PeftConfig) -> AdapterSpec:
        config.refuse("bias", "none")
        for key in (
            "modules_to_save",
            "layers_to_transform",
            "exclude_modules",
            "target_parameters",
            "trainable_token_indices",
        ):
            config.refuse(key)
        config.take("fan_in_fan_out")  # how Conv1D lies; our weights always lie (out, in)
        config.take("qalora_group_size")  # of a method that use_qalora would ask for
        config.take("init_lora_weights")  # how it started; the tensors say where it is
        return cls(**cls.peft_fields(config))

    @classmethod
    def peft_fields(cls, config: PeftConfig) -> dict[str, Any]:
        return {
            "rank": config.take("r", 8),
            "alpha": float(config.take("lora_alpha", 8)),
            "dropout": float(config.take("lora_dropout", 0.0)),
            "scaling": "sqrt" if config.take("use_rslora") else "rank",
            "targets": config.targets(),
            "ranks": config.take("rank_pattern", {}),
            "alphas": {k: float(v) for k, v in config.take("alpha_pattern", {}).items()},
        }

    def to_peft(self, model: Any, name: str) -> dict[str, Any]:
        found = [s for site in sites(model, self.targets) for s in site.segments]
        if any(s.stored is None for s in found):
            raise ConfigError(
                f"{found[0].names[0]} has no name in the published layout", remedy='save it with format="dovetail"'
            )
        stored = {str(s.stored): s for s in found}
        ranks = {n: self.rank_of(s) for n, s in stored.items() if self.rank_of(s) != self.rank}
        alphas = {n: _said(self.alphas, s, self.alpha or self.rank_of(s)) for n, s in stored.items()}
        alpha = self.alpha or self.rank
        every = [str(s.stored) for site in places(model) for s in site.segments if s.stored]
        return {
            "r": self.rank,
            "lora_alpha": alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.scaling == "sqrt",
            "target_modules": shortest(list(stored), every),
            "rank_pattern": ranks,
            "alpha_pattern": {n: a for n, a in alphas.items() if a != alpha},
            "bias": "none",
            "init_lora_weights": True,
        }

    def peft_tensors(self, model: Any, name: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for site in sites(model, self.targets):
            module: Any = site.place.attached()[name]
            for segment, (a, b) in zip(site.segments, module.pairs(), strict=True):
                for leaf, tensor in module.peft_leaves(a, b).items():
                    found[f"{segment.stored}.{leaf}"] = tensor
        return found

    def adapter(self, site: Site, rng: Rng) -> Adapter:
        """The module for one place."""
        cls = LowRankTable if isinstance(site.place, Lookup) else LowRank
        return cls(self, site, rng)

    def rank_of(self, segment: Segment) -> int:
        return _said(self.ranks, segment, self.rank)

    def scale_of(self, segment: Segment) -> float:
        rank = self.rank_of(segment)
        alpha = _said(self.alphas, segment, float(rank if self.alpha is None else self.alpha))
        return alpha / (rank if self.scaling == "rank" else math.sqrt(rank))

    def check_patterns(self, found: list[Site]) -> None:
        """Raises SpecError for a pattern of ranks or alphas that meets none of the places."""
        names = [n for site in found for s in site.segments for n in s.names]
        for field in ("ranks", "alphas"):
            for pattern in getattr(self, field):
                if not any(matches(pattern, n) for n in names):
                    raise SpecError(
                        f"the pattern {pattern!r} meets none of the targets",
                        where=field,
                        remedy="write the end of a target's name, * for any part of a step",
                    )


class LowRank(Adapter, Drops):
    """a (Σ ranks, in): the A of every segment, one under the other; b0, b1, ... (rows of the segment, its rank)."""

    def __init__(self, spec: Lora, site: Site, rng: Rng):
        super().__init__()
        width, device = self.widths(site.place)
        self.drop, self.ratio = spec.dropout, spec.lr_ratio
        self.segments = [(s.start, s.stop) for s in site.segments]
        self.ranks = [spec.rank_of(s) for s in site.segments]
        self.scales = [spec.scale_of(s) for s in site.segments]
        self.a = nn.Parameter(torch.empty(sum(self.ranks), width))
        for i, ((start, stop), rank) in enumerate(zip(self.segments, self.ranks, strict=True)):
            self.register_parameter(f"b{i}", nn.Parameter(torch.zeros(self.out(site.place, start, stop), rank)))
        with torch.no_grad():
            for i, piece in enumerate(self.a.split(self.ranks)):
                self.start(piece, rng(f"a{i}"))
        self.to(device)

    def start(self, a: Tensor, generator: torch.Generator) -> None:
        """Kaiming-uniform with a = sqrt(5), as everybody draws A: U(-1/sqrt(in), 1/sqrt(in))."""
        bound = a.shape[1] ** -0.5
        a.uniform_(-bound, bound, generator=generator)

    def widths(self, place: Any) -> tuple[int, torch.device]:
        assert isinstance(place, Linear)
        return place.in_features, next(iter([*place.parameters(), *place.buffers()])).device

    def out(self, place: Any, start: int, stop: int) -> int:
        return stop - start

    @property
    def bs(self) -> list[Tensor]:
        return [getattr(self, f"b{i}") for i in range(len(self.segments))]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(A, B) of every segment: views of the parameters."""
        return list(zip(self.a.split(self.ranks), self.bs, strict=True))

    def peft_leaves(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"lora_A.weight": a, "lora_B.weight": b}

    def forward(self, run: Run, x: Tensor) -> Tensor:
        return self.add(run(x), self.delta(x))

    def delta(self, x: Tensor) -> list[Tensor]:
        """scale · B A x of every segment, (..., rows)."""
        h = F.linear(self.dropout(x), self.a.to(x.dtype))
        return [
            F.linear(part, b.to(x.dtype)) * scale
            for part, b, scale in zip(h.split(self.ranks, -1), self.bs, self.scales, strict=True)
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
        """scale · B A of every segment (rows, in), in fp32."""
        return [scale * (b @ a) for (a, b), scale in zip(self.pairs(), self.scales, strict=True)]

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return self.add(wide.mT, [p.mT.to(wide.dtype) for p in self.products()]).mT.to(weight.dtype), bias

    def lr_scale(self, name: str) -> float:
        return 1.0 if name == "a" else self.ratio


class LowRankTable(LowRank):
    """On a lookup table W (count, dim): W + scale · (B A)ᵀ, a (rank, count), b0 (dim, rank). Never all of A: rows of it."""

    def widths(self, place: Any) -> tuple[int, torch.device]:
        return place.num_embeddings, place.weight.device

    def start(self, a: Tensor, generator: torch.Generator) -> None:
        a.normal_(generator=generator)

    def __init__(self, spec: Lora, site: Site, rng: Rng):
        super().__init__(spec, site, rng)
        with torch.no_grad():  # PEFT's way round for tables: A is zero, B is drawn
            self.bs[0].normal_(generator=rng("b0"))
            self.a.zero_()

    def out(self, place: Any, start: int, stop: int) -> int:
        return place.embedding_dim

    def peft_leaves(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"lora_embedding_A": a, "lora_embedding_B": b}

    def forward(self, run: Run, x: Tensor) -> Tensor:
        y = run(x)
        h = F.embedding(x, self.a.T.to(y.dtype))
        return y + F.linear(h, self.bs[0].to(y.dtype)) * self.scales[0]

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return (wide + self.products()[0].T.to(wide.dtype)).to(weight.dtype), bias


def _said(table: dict[str, Any], segment: Segment, default: Any) -> Any:
    """The value of the first pattern that meets the segment."""
    for pattern, value in table.items():
        if any(matches(pattern, name) for name in segment.names):
            return value
    return default
