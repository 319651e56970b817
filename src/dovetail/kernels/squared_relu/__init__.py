"""relu² attention: weights relu(score)² / count, without a softmax, so that keys do not compete.

q (B,H,T,D), k (B,G,S,D), v (B,G,S,Dv) -> (B,H,T,Dv), as in `kernels.attention`. A key that a query does not see has
weight 0, and disjoint sets of keys add up.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dovetail.kernels import pointwise, twins
from dovetail.kernels.attention import BoundMask, Score
from dovetail.kernels.plan import Plan
from dovetail.kernels.squared_relu import reference


def squared_relu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    count: int,
    mask: BoundMask | None = None,
    score: Score | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """relu(scale·qk + terms)² v / count under `mask` (Hua et al. 2022, section 3.1).

    Raises BuildError for a score that is more than added terms.
    """

    if twins.asked() and not dropout and (score is None or score.scale is None):
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return reference.attend(q, k, v, mask, score, factor, count)

    def weigh(s: Tensor) -> Tensor:
        return F.relu(s * count**-0.5).square()

    return pointwise.attend(q, k, v, mask, score, scale, weigh, dropout)


def plan() -> Plan:
    """The path for every call, and why."""
    if twins.asked():
        return Plan("reference", twins.WHY)
    return Plan("bands", "relu² is not a softmax: plain products in bands of queries, made again in the backward")


__all__ = ["plan", "reference", "squared_relu"]
