"""BitFit: the biases alone."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dovetail.adapters.base import AdapterSpec, Site, sites
from dovetail.adapters.ia3 import Vectors
from dovetail.errors import SpecError
from dovetail.parts.adaptable import Adapter, Run, adaptables
from dovetail.parts.norm import LayerNormModule
from dovetail.spec import register


@register(
    "adapter",
    "bitfit",
    oracle="formula: W x + (b + delta); torch.nn.Linear and LayerNorm trained with requires_grad on their biases",
    source="Ben Zaken et al. 2022, section 3.1",
)
class BitFit(AdapterSpec):
    """W x + b becomes W x + (b + δ), δ (out,) in fp32, zero at the start: the gradient of δ is the gradient of b.

    What trained is kept apart from the model and comes off again; weight decay pulls δ to zero, so b to where it was.
    targets: as in adapters.base.sites; unless given, every linear map with a bias but the head. The paper's smaller
    choice (section 3.2) is ("*:query", "feedforward.up"). norms: also the biases of every LayerNorm, as the paper
    does. add: gives a bias to linear maps that have none (LLaMA's), but those whose part multiplies by the matrix itself
    and would not see it (HiPPO's recurrence, Transformer-XL's distances). Biases inside recurrences stay as they are.
    """

    targets: tuple[str, ...] | None = None
    norms: bool = True
    add: bool = False
    mergeable: ClassVar[bool] = True
    tuned: ClassVar[float] = 1e-1

    def attach(self, model: Any, name: str, seed: int) -> None:
        found = self.maps(model)
        for site in found:
            site.place.attach(name, Shift(site, [s.stop - s.start for s in site.segments], 0.0))
        for place in self.norms_of(model):
            place.attach(name, NormShift(place.bias))

    def maps(self, model: Any) -> list[Site]:
        """The linear maps. Raises SpecError where they have no bias and none is to be added, or none would be seen."""
        found = sites(model, self.targets, tables=False)
        blind = [site.path for site in found if site.place.read_whole]  # type: ignore[attr-defined]
        if blind and self.targets is not None:
            raise SpecError(
                f"{blind[0]} is read as a matrix alone, and a bias there would change nothing",
                where="targets",
                remedy="leave it out",
            )
        found = [site for site in found if site.path not in blind]
        bare = [site.path for site in found if getattr(site.place, "bias", None) is None]
        nothing = len(bare) == len(found) and not self.norms_of(model)
        if bare and not self.add and (self.targets is not None or nothing):
            raise SpecError(
                f"{bare[0]} has no bias to train" + (f", nor have {len(bare) - 1} others" if len(bare) > 1 else ""),
                where="targets",
                remedy="say add: true to give such maps a bias, or choose another kind of adapter",
            )
        return [site for site in found if self.add or site.path not in bare]

    def norms_of(self, model: Any) -> list[LayerNormModule]:
        norms = [place for _, place in adaptables(model) if isinstance(place, LayerNormModule)] if self.norms else []
        return [norm for norm in norms if norm.bias is not None]


class Shift(Vectors):
    """δ on the rows of every segment: v0, v1, ... in their order."""

    def forward(self, run: Run, x: Tensor) -> Tensor:
        y = run(x)
        return y + self.spread(list(self.vectors)).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, shifted(bias, self.spread(list(self.vectors)))


class NormShift(Adapter):
    """δ (dim,) on what a norm gives."""

    def __init__(self, bias: Tensor):
        super().__init__()
        self.v0 = nn.Parameter(torch.zeros(bias.shape, device=bias.device))

    def forward(self, run: Run, x: Tensor) -> Tensor:
        y = run(x)
        return y + self.v0.to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, shifted(bias, self.v0)


def shifted(bias: Tensor | None, by: Tensor) -> Tensor:
    """bias + by, in fp32 or wider."""
    return by if bias is None else bias.to(torch.promote_types(bias.dtype, torch.float32)) + by
