"""DoRA: LoRA turns the direction of a weight's rows, and their lengths are learnt apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.adapters.base import PeftConfig, Site
from dovetail.adapters.lora import Lora
from dovetail.adapters.low_rank import LowRank, LowRankTable
from dovetail.parts.adaptable import Run
from dovetail.parts.weights import Lookup, Rng
from dovetail.spec import register


@register(
    "adapter",
    "dora",
    oracle="peft LoraConfig(use_dora=True)",
    source="Liu et al. 2024 (DoRA), eq. 5 and 6; the norm without gradient: section 4.3",
)
class Dora(Lora):
    """m ⊙ (W + scale · B A) / ‖W + scale · B A‖, m one length for each output, ‖·‖ the norms of the rows.

    m starts as the norms, so that the start is the model as it was. Norms are of the weight at the place itself,
    whatever other adapters stand there, in fp32, and are constants to the gradient. On a lookup table W (count, dim)
    the lengths are those of its `dim` columns. dropout is on the input of A only. m learns at A's rate.
    """

    peft_type: ClassVar[str | None] = "LORA"

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        return bool(config.get("use_dora"))

    @classmethod
    def peft_fields(cls, config: PeftConfig) -> dict[str, Any]:
        config.take("use_dora")
        return super().peft_fields(config)

    def to_peft(self, model: Any, name: str) -> dict[str, Any]:
        return super().to_peft(model, name) | {"use_dora": True}

    def adapter(self, site: Site) -> LowRank:
        cls = ScaledTable if isinstance(site.place, Lookup) else Scaled
        return cls(self, site)


class Scaled(LowRank):
    """LowRank's parameters, and m0, m1, ... (rows of the segment,): the lengths of its rows."""

    def __init__(self, spec: Dora, site: Site):
        super().__init__(spec, site)
        self.place: tuple[Any] = (site.place,)  # in a tuple: what stands around a place does not own it
        for i, (start, stop) in enumerate(self.segments):
            self.register_parameter(f"m{i}", nn.Parameter(torch.empty(self.out(site.place, start, stop))))

    @torch.no_grad()
    def begin(self, spec: Any, site: Site, rng: Rng) -> None:
        super().begin(spec, site, rng)
        for m, norm in zip(self.ms, self.norms(), strict=True):
            m.copy_(norm)

    @property
    def ms(self) -> list[Tensor]:
        return [self.get_parameter(f"m{i}") for i in range(len(self.segments))]

    def peft_leaves(self, i: int, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return super().peft_leaves(i, a, b) | {"lora_magnitude_vector": self.ms[i]}

    def lr_scale(self, name: str) -> float:
        return self.ratio if name.startswith("b") else 1.0

    @torch.no_grad()
    def norms(self) -> list[Tensor]:
        """‖W + scale · B A‖ of every segment's rows, fp32."""
        weight = self.directions()
        pieces = [weight[start:stop] for start, stop in self.segments]
        return [(w + p.to(w.dtype)).norm(dim=1).float() for w, p in zip(pieces, self.products(), strict=True)]

    def directions(self) -> Tensor:
        """The weight whose rows have lengths, without adapters, at least in fp32."""
        (place,) = self.place
        return _wide(place.dense())

    def factors(self) -> list[Tensor]:
        """m / ‖W + scale · B A‖ of every segment; exactly 1 at the start, and for rows that are zero, which have no length."""
        pairs = [(m, norm, norm == 0) for m, norm in zip(self.ms, self.norms(), strict=True)]
        return [(m / norm.masked_fill(zero, 1.0)).masked_fill(zero, 1.0) for m, norm, zero in pairs]

    def forward(self, run: Run, x: Tensor) -> Tensor:
        y = run(x)
        (place,) = self.place
        turned = y if place.bias is None else y - place.bias  # the bias is not scaled
        found = []
        for (start, stop), c, delta in zip(self.segments, self.factors(), self.delta(x), strict=True):
            # What is added is zero, not nearly zero, where nothing was learnt.
            found.append((c - 1).to(y.dtype) * turned[..., start:stop] + c.to(y.dtype) * delta)
        return self.add(y, found)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        (place,) = self.place
        factors, changes = self.factors(), []
        for (start, stop), c, product in zip(self.segments, factors, self.products(), strict=True):
            c = c.to(weight.dtype)[:, None]
            changes.append(((c - 1) * weight[start:stop] + c * product.to(weight.dtype)).mT)
        if bias is not None and bias is not place.bias:  # another adapter changed it, within the scale
            own = torch.zeros_like(bias) if place.bias is None else place.bias
            spans = zip(self.segments, factors, strict=True)
            bias = self.add(bias, [(c - 1).to(bias.dtype) * (bias - own)[a:b] for (a, b), c in spans])
        return self.add(weight.mT, changes).mT, bias


class ScaledTable(Scaled, LowRankTable):
    """On a lookup table: m0 (dim,), the lengths of its columns."""

    def directions(self) -> Tensor:
        (place,) = self.place
        return _wide(place.weight).mT

    @torch.no_grad()
    def norms(self) -> list[Tensor]:
        weight = self.directions()
        return [(weight + self.products()[0].to(weight.dtype)).norm(dim=1).float()]

    def forward(self, run: Run, x: Tensor) -> Tensor:
        y = run(x)
        c = self.factors()[0].to(y.dtype)
        h = F.embedding(x, self.a.T.to(y.dtype))
        return y + ((c - 1) * y + c * F.linear(h, self.bs[0].to(y.dtype)) * self.scales[0])

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        c = self.factors()[0].to(weight.dtype)
        return c * (weight + self.products()[0].T.to(weight.dtype)), bias


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
