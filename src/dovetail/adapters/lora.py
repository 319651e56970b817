"""LoRA: a weight plus a product of two thin matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.adapters.base import AdapterSpec, PeftConfig, Segment, Site, matches, places, rng, shortest, sites
from dovetail.adapters.starts import Gaussian, LoraStart, Uniform, peft_start, put_back
from dovetail.errors import BuildError, ConfigError, SpecError
from dovetail.hub.names import pieces
from dovetail.parts.adaptable import Adapter, Run, adaptables
from dovetail.parts.storage.base import Stored
from dovetail.parts.weights import Drops, Linear, Lookup, Rng
from dovetail.spec import register
from dovetail.spec.categories import LoraInitPart
from dovetail.spec.ranges import Chance, Count, Positive

Pair = tuple[Tensor, Tensor]  # A (rank, in), B (rows, rank)


@register(
    "adapter",
    "lora",
    default=True,
    oracle="peft LoraConfig",
    source="Hu et al. 2021, eq. 3; alpha/sqrt(r): Kalajdzievski 2023, theorem 3.2; lr_ratio: Hayou et al. 2024 (LoRA+)",
)
class Lora(AdapterSpec):
    """W + scale · B A, A (rank, in) and B (out, rank), scale = alpha/rank, or alpha/sqrt(rank) (rsLoRA).

    B starts at zero, so that the start is the model as it was; `start` says what else they may start with.
    targets: as in adapters.base.sites; every linear map but the head unless given. ranks, alphas: pattern -> value for
    places that differ. dropout: on the input of A only. lr_ratio: how much faster B learns than A (LoRA+; 16 is the
    paper's advice).
    """

    rank: Count = 16
    alpha: Positive | None = None
    scaling: Literal["rank", "sqrt"] = "rank"
    dropout: Chance = 0.0
    targets: tuple[str, ...] | None = None
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    lr_ratio: Positive = 1.0
    start: LoraInitPart = Uniform()
    peft_type: ClassVar[str | None] = "LORA"

    def attach(self, model: Any, name: str, seed: int) -> None:
        found = sites(model, self.targets)
        self.check_patterns(found)
        for site in found:
            module = self.adapter(site)
            site.place.attach(name, module)
            module.begin(self, site, rng(seed, site.path, name))

    def detach(self, model: Any, name: str) -> None:
        for _, place in adaptables(model):
            module = place.attached().get(name)
            if isinstance(module, LowRank):
                put_back(module, place)
        super().detach(model, name)

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        return not config.get("use_dora")

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
            "start": peft_start(config),
        }

    def to_peft(self, model: Any, name: str) -> dict[str, Any]:
        found = [s for site in sites(model, self.targets) for s in site.segments]
        if any(s.stored is None for s in found):
            raise ConfigError(
                f"{found[0].names[0]} has no name in the published layout", remedy='save it with format="dovetail"'
            )
        stored = {str(s.stored): s for s in found}
        pairs = 2 if self.begins.anchored else 1  # of A and B at each place, the anchors among them
        grown = pairs if self.scaling == "rank" else math.sqrt(pairs)  # keeps alpha/rank, or alpha/sqrt(rank)
        rank, alpha = pairs * self.rank, grown * (self.alpha or self.rank)
        ranks = {n: pairs * self.rank_of(s) for n, s in stored.items()}
        alphas = {n: grown * self.alpha_of(s) for n, s in stored.items()}
        every = [str(s.stored) for site in places(model) for s in site.segments if s.stored]
        return {
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.scaling == "sqrt",
            "target_modules": shortest(list(stored), every),
            "rank_pattern": {n: r for n, r in ranks.items() if r != rank},
            "alpha_pattern": {n: a for n, a in alphas.items() if a != alpha},
            "bias": "none",
        } | self.begins.to_peft()

    def peft_tensors(self, model: Any, name: str) -> dict[str, Tensor]:
        return self._leaves(model, name, lambda module: module.pairs())

    def peft_state(self, model: Any, name: str) -> dict[str, Tensor]:
        return self._leaves(model, name, lambda module: module.changes())

    def _leaves(self, model: Any, name: str, pairs: Callable[[LowRank], list[Pair]]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for site in sites(model, self.targets):
            if isinstance(site.place, Lookup) and pieces(model)[1]:
                raise ConfigError(
                    "PEFT leaves the tied head out of an adapter on the embedding; here one table is both",
                    where=site.path,
                    remedy='untie the head first (surgery.untie), or keep it in format="dovetail"',
                )
            module: Any = site.place.attached()[name]
            for i, (segment, (a, b)) in enumerate(zip(site.segments, pairs(module), strict=True)):
                for leaf, tensor in module.peft_leaves(i, a, b).items():
                    found[f"{segment.stored}.{leaf}"] = tensor
        return found

    def adapter(self, site: Site) -> LowRank:
        """The module for one place, its start still to come."""
        cls = LowRankTable if isinstance(site.place, Lookup) else LowRank
        return cls(self, site)

    @property
    def begins(self) -> LoraStart:
        assert isinstance(self.start, LoraStart)
        return self.start

    def rank_of(self, segment: Segment) -> int:
        return _said(self.ranks, segment, self.rank)

    def alpha_of(self, segment: Segment) -> float:
        return _said(self.alphas, segment, float(self.rank_of(segment) if self.alpha is None else self.alpha))

    def scale_of(self, segment: Segment) -> float:
        rank = self.rank_of(segment)
        return self.alpha_of(segment) / (rank if self.scaling == "rank" else math.sqrt(rank))

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
    """a (Σ ranks, in): the A of every segment, one under the other; b0, b1, ... (rows of the segment, its rank).

    Buffers, where the start is taken off the weight again: start_a, start_b0, ..., what a and b0, ... started with.
    beneath: (what stands in the place of the weight, the weight) where the start replaced it.
    """

    anchored: bool = False
    beneath: tuple[Stored, nn.Parameter] | None = None

    def __init__(self, spec: Any, site: Site):
        super().__init__()
        width, device = self.widths(site.place)
        self.drop, self.ratio = spec.dropout, spec.lr_ratio
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
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return self.add(wide.mT, [p.mT.to(wide.dtype) for p in self.products()]).mT.to(weight.dtype), bias

    def lr_scale(self, name: str) -> float:
        return 1.0 if name == "a" else self.ratio


class LowRankTable(LowRank):
    """On a lookup table W (count, dim): W + scale · (B A)ᵀ, a (rank, count), b0 (dim, rank). Never all of A: rows of it."""

    def widths(self, place: Any) -> tuple[int, torch.device]:
        return place.num_embeddings, place.weight.device

    @torch.no_grad()
    def begin(self, spec: Any, site: Site, rng: Rng) -> None:
        if not isinstance(spec.begins, (Uniform, Gaussian)):
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
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return (wide + self.products()[0].T.to(wide.dtype)).to(weight.dtype), bias


def _said(table: dict[str, Any], segment: Segment, default: Any) -> Any:
    """The value of the first pattern that meets the segment."""
    for pattern, value in table.items():
        if any(matches(pattern, name) for name in segment.names):
            return value
    return default
