"""Shaw et al.: vectors for clipped distances, added to keys and to values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.kernels.attention import Coords, RelativeLogits, Score
from dovetail.parts.context import Context
from dovetail.parts.position.base import PositionModule, head_width, refuse_cross
from dovetail.parts.weights import Lookup
from dovetail.spec import Slot, Spec, register
from dovetail.spec.ranges import Count


@register(
    "position",
    "shaw",
    oracle="transformers wav2vec2_bert (keys); formula: the vectors added to keys and values of each pair, in fp64",
    source="Shaw et al. 2018, eq. 3 and 4",
    endless=True,
)
class Shaw(Spec):
    """softmax(q·(k + a_K[d]) · scale) (v + a_V[d]), d = j - i clipped to [-clip, clip].

    Two learned tables of vectors a layer, (2·clip + 1) rows of a head's width, shared by its heads; causal places have
    no rows for the future. terms: "key", "value" or both.
    """

    clip: Count = 16
    terms: tuple[Literal["key", "value"], ...] = ("key", "value")

    def build(self, slot: Slot) -> nn.Module:
        if not self.terms or len(set(self.terms)) != len(self.terms):
            raise BuildError(
                f"terms {self.terms} of shaw", where=slot.path, remedy="give key, value or both, once each"
            )
        refuse_cross(slot, self.kind)
        return ShawModule(self, slot)


class ShawModule(PositionModule):
    hooks: ClassVar[frozenset[str]] = frozenset({"score"})

    def __init__(self, spec: Shaw, slot: Slot):
        super().__init__()
        width = head_width(slot, spec.kind)
        self.clip, self.ahead = spec.clip, 0 if slot.causal else spec.clip
        rows = self.clip + self.ahead + 1
        self.keys = Lookup(rows, width, slot=slot, role="position") if "key" in spec.terms else None
        self.relative = "key" in spec.terms  # type: ignore[misc]
        self.adds_values = "value" in spec.terms  # type: ignore[misc]
        wide = slot.value_dim or width
        self.values = Lookup(rows, wide, slot=slot, role="position") if self.adds_values else None

    def score(self, q: Tensor, k: Tensor, at: Coords, ctx: Context, project: Callable[..., Any]) -> Score:
        keys, values = (None if table is None else table.matrix() for table in (self.keys, self.values))
        terms = () if keys is None else (RelativeLogits(q.transpose(1, 2) @ keys.T, self.clip),)
        if values is None:
            return Score(terms)
        # (B|1,1,T,S): the row of each pair
        index = ctx.once(
            ("shaw", self.clip, self.ahead, id(at)),
            lambda: at.distance().clamp(-self.clip, self.ahead)[:, None] + self.clip,
        )

        def value_term(p: Tensor, start: int, stop: int) -> Tensor:
            rows = index[:, :, start:stop].expand_as(p)
            share = p.new_zeros(*p.shape[:3], values.shape[0]).scatter_add(-1, rows, p)
            return share @ values.to(p.dtype)

        return Score(terms, value_terms=value_term)
