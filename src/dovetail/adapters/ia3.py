"""(IA)³: learned vectors that stretch or shrink keys, values and the hidden of the feed-forward."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dovetail.adapters.base import AdapterSpec, PeftConfig, Segment, Site, matches, places, shortest, sites
from dovetail.errors import ConfigError, SpecError
from dovetail.parts.adaptable import Adapter, Run
from dovetail.parts.weights import Linear
from dovetail.spec import register


@register("adapter", "ia3", oracle="peft IA3Config", source="Liu et al. 2022 (T-Few), section 3.3")
class Ia3(AdapterSpec):
    """softmax(q (l_k ⊙ k)ᵀ) (l_v ⊙ v) and W_down (l_ff ⊙ hidden): one vector a map, all ones at the start.

    targets: as in adapters.base.sites; the vector multiplies what the map gives, l ⊙ (W x + b), l (out,).
    feedforward: those among the targets whose *input* it multiplies, W (l ⊙ x) + b, l (in,). Parameters: `v0`, `v1`,
    ... of the segments of a place, in their order.
    """

    targets: tuple[str, ...] = ("*:key", "*:value", "feedforward.down")
    feedforward: tuple[str, ...] = ("feedforward.down",)
    peft_type: ClassVar[str | None] = "IA3"
    tuned: ClassVar[float] = 1e-1

    def attach(self, model: Any, name: str, seed: int) -> None:
        found = sites(model, self.targets, tables=False)
        for pattern in self.feedforward:
            if not any(matches(pattern, n) for site in found for s in site.segments for n in s.names):
                raise SpecError(f"{pattern!r} is none of the targets", where="feedforward", remedy="name it there too")
        for site in found:
            site.place.attach(name, Scaling(site, [self.scales_input(s) for s in site.segments]))

    def scales_input(self, segment: Segment) -> bool:
        return any(matches(pattern, n) for pattern in self.feedforward for n in segment.names)

    @classmethod
    def from_peft(cls, config: PeftConfig) -> AdapterSpec:
        for key in ("modules_to_save", "exclude_modules"):
            config.refuse(key)
        config.take("fan_in_fan_out")  # how Conv1D lies; our weights always lie (out, in)
        config.take("init_ia3_weights")  # how it started; the tensors say where it is
        inputs = config.take("feedforward_modules", [])
        if isinstance(inputs, str):
            raise ConfigError(
                f"feedforward_modules is the pattern {inputs!r}",
                where=config.where,
                remedy="write it as a list of names",
            )
        targets = config.targets()
        if targets is None:
            raise ConfigError("target_modules is missing", where=config.where)
        return cls(targets=targets, feedforward=tuple(inputs))

    def to_peft(self, model: Any, name: str) -> dict[str, Any]:
        found = [s for site in sites(model, self.targets, tables=False) for s in site.segments]
        if any(s.stored is None for s in found):
            unnamed = next(s for s in found if s.stored is None)
            raise ConfigError(
                f"{unnamed.names[0]} has no name in the published layout", remedy='save it with format="dovetail"'
            )
        every = [str(s.stored) for site in places(model) for s in site.segments if s.stored]
        stored, inputs = [str(s.stored) for s in found], [str(s.stored) for s in found if self.scales_input(s)]
        targets, feedforward = shortest(stored, every), shortest(inputs, every) if inputs else []
        if not set(feedforward) <= set(targets):  # PEFT asks for the same names on both lists
            targets, feedforward = stored, inputs
        return {"target_modules": targets, "feedforward_modules": feedforward, "init_ia3_weights": True}

    def peft_tensors(self, model: Any, name: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for site in sites(model, self.targets, tables=False):
            module: Any = site.place.attached()[name]
            for segment, vector, at_input in zip(site.segments, module.vectors, module.inputs, strict=True):
                found[f"{segment.stored}.ia3_l"] = vector[None] if at_input else vector[:, None]
        return found


class Vectors(Adapter):
    """A vector for every segment of a linear map: v0, v1, ... start at `fill`, which changes nothing."""

    v0: nn.Parameter

    def __init__(self, site: Site, widths: list[int], fill: float):
        super().__init__()
        place: Any = site.place
        self.fill, self.segments, self.rows = fill, [(s.start, s.stop) for s in site.segments], place.out_features
        device = next(iter([*place.parameters(), *place.buffers()])).device
        for i, width in enumerate(widths):
            self.register_parameter(f"v{i}", nn.Parameter(torch.full((width,), fill, device=device)))

    @property
    def vectors(self) -> list[Tensor]:
        return [getattr(self, f"v{i}") for i in range(len(self.segments))]

    def spread(self, vectors: list[Tensor | None]) -> Tensor:
        """(out,): each segment's vector on its rows, `fill` on all others."""
        pieces, at = [], 0
        for (start, stop), vector in zip(self.segments, vectors, strict=True):
            if vector is not None:
                pieces += [self.v0.new_full((start - at,), self.fill), vector]
                at = stop
        return torch.cat([*pieces, self.v0.new_full((self.rows - at,), self.fill)])


class Scaling(Vectors):
    """l ⊙ (W x + b) on the rows of some segments, W (l ⊙ x) + b on those of others."""

    def __init__(self, site: Site, inputs: list[bool]):
        place = site.place
        assert isinstance(place, Linear)
        widths = [place.in_features if i else s.stop - s.start for s, i in zip(site.segments, inputs, strict=True)]
        super().__init__(site, widths, 1.0)
        self.inputs = inputs

    def forward(self, run: Run, x: Tensor) -> Tensor:
        y = self.on_inputs(run, x) if any(self.inputs) else run(x)
        return y if all(self.inputs) else y * self.output_factor().to(y.dtype)

    def on_inputs(self, run: Run, x: Tensor) -> Tensor:
        """One run where all rows read the same scaled input, else one for each segment that has its own."""
        if len(self.inputs) == 1 and self.segments[0] == (0, self.rows):
            return run(x * self.v0.to(x.dtype))
        y, pieces, at = run(x), [], 0
        for (start, stop), vector, at_input in zip(self.segments, self.vectors, self.inputs, strict=True):
            if at_input:
                pieces += [y[..., at:start], run(x * vector.to(x.dtype))[..., start:stop]]
                at = stop
        return torch.cat([*pieces, y[..., at:]], -1)

    def output_factor(self) -> Tensor:
        """(out,), ones where an input is scaled instead."""
        return self.spread([None if i else v for v, i in zip(self.vectors, self.inputs, strict=True)])

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = self.output_factor().to(weight.dtype)
        pieces, at = [], 0
        for (start, stop), vector, at_input in zip(self.segments, self.vectors, self.inputs, strict=True):
            if at_input:
                pieces += [weight[at:start], weight[start:stop] * vector.to(weight.dtype)]
                at = stop
        if bias is not None and not all(self.inputs):
            bias = bias.to(weight.dtype) * factor
        return torch.cat([*pieces, weight[at:]]) * factor[:, None], bias
