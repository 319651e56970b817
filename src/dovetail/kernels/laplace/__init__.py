"""Laplace attention: each weight the share of a normal law below its score, bounded where relu² is not.

q (B,H,T,D), k (B,G,S,D), v (B,G,S,Dv) -> (B,H,T,Dv), as in `kernels.attention`. A key that a query does not see has
weight 0, and disjoint sets of keys add up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dovetail.kernels import pointwise, twins
from dovetail.kernels.attention import BoundMask, Score
from dovetail.kernels.laplace import reference
from dovetail.kernels.plan import Plan

MEAN, DEVIATION = math.sqrt(0.5), math.sqrt(0.25 / math.pi)  # with which it is nearest to relu² around √½


def laplace(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: BoundMask | None = None,
    score: Score | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """½ (1 + erf((scale·qk + terms - μ) / (σ√2))) v under `mask`, μ = √½, σ = 1/(2√π) (Ma et al. 2022, eq. 14).

    Raises BuildError for a score that is more than added terms.
    """
    if twins.asked() and not dropout and (score is None or score.scale is None):
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return reference.attend(q, k, v, mask, score, factor)
    return pointwise.attend(q, k, v, mask, score, scale, weights, dropout)


def weights(s: Tensor) -> Tensor:
    """Of scores in fp32 or better."""
    return 0.5 * torch.erfc((MEAN - s) / (DEVIATION * math.sqrt(2)))


def plan() -> Plan:
    """The path for every call, and why."""
    if twins.asked():
        return Plan("reference", twins.WHY)
    return Plan("bands", "laplace is not a softmax: plain products in bands of queries, made again in the backward")


__all__ = ["laplace", "plan", "reference"]
