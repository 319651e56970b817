"""What lies where in a product, and by what it is turned."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Heads(NamedTuple):
    """How the product's outputs lie: `queries` heads of `width`, `keys` of them, and as many of values of `value_width`."""

    queries: int
    keys: int
    width: int
    value_width: int


class Turning(NamedTuple):
    """cos and sin (B|1,T,1,dim/2), dim <= width: what the first dim entries of a head are turned by. layout: "half" pairs
    entry i with i + dim/2, "interleaved" pairs 2i with 2i + 1."""

    cos: Tensor
    sin: Tensor
    layout: str = "half"
