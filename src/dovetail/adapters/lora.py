"""LoRA: a weight plus a product of two thin matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from dovetail.adapters.base import AdapterSpec, PeftConfig, Segment, Site, matches, places, rng, shortest, sites
from dovetail.adapters.low_rank import LowRank, LowRankTable, Pair
from dovetail.adapters.starts import LoraStart, Uniform, peft_start, put_back
from dovetail.errors import ConfigError, SpecError
from dovetail.hub.names import pieces
from dovetail.parts.adaptable import adaptables
from dovetail.parts.weights import Lookup
from dovetail.spec import register
from dovetail.spec.categories import LoraInitPart
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

    B starts at zero, so that the start is the model as it was; `start` says what else they may start with.
    targets: as in adapters.base.sites; every linear map but the head unless given. ranks, alphas: pattern -> value for
    places that differ. dropout: on the input of A only, where its map is called. lr_ratio: how much faster B learns than
    A (LoRA+; 16 is the paper's advice).
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
    tuned: ClassVar[float] = 1e-2

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
            "ranks": config.by_module("rank_pattern"),
            "alphas": {k: float(v) for k, v in config.by_module("alpha_pattern").items()},
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


def _said(table: dict[str, Any], segment: Segment, default: Any) -> Any:
    """The value of the first pattern that meets the segment."""
    for pattern, value in table.items():
        if any(matches(pattern, name) for name in segment.names):
            return value
    return default
