"""attend: the one softmax. Every attention in the library ends here.

q (B,H,T,D), k (B,G,S,D), v (B,G,S,Dv) -> (B,H,T,Dv); H is a multiple of G (query head h reads
key/value head h // (H/G)). A query that sees no key gives zero, never NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dovetail.kernels import twins
from dovetail.kernels.attention import bands, flex, reference, regions, sdpa, triton
from dovetail.kernels.attention.coords import Ahead, Both, BoundMask, Coords, Rule, Side, Span
from dovetail.kernels.attention.plan import plan
from dovetail.kernels.attention.reference import Region
from dovetail.kernels.attention.regions import merge
from dovetail.kernels.attention.score import Content, Distance, RelativeLogits, Score, Term, Toeplitz


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: BoundMask | None = None,
    score: Score | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(cap(scale·qk + terms)) v under `mask`, by the path that `plan` names (Vaswani et al. 2017, eq. 1)."""
    scale = _scale(q, score, scale)
    chosen = plan(
        device=q.device.type,
        dtype=q.dtype,
        queries=q.shape[2],
        width=max(q.shape[-1], v.shape[-1]),
        mask=mask,
        score=score,
        dropout=dropout,
    )
    if chosen.path == "reference":
        return reference.attend(q, k, v, mask, score, scale, dropout)[0]
    if chosen.path == "sdpa":
        return sdpa.attend(q, k, v, mask, score, scale, dropout)
    if chosen.path == "bands":
        return bands.attend(q, k, v, mask, scale)
    if chosen.path == "flex":
        assert mask is not None
        return flex.attend(q, k, v, mask, scale)
    if chosen.path == "triton":
        return triton.attend(q, k, v, mask, score, scale)
    if chosen.path == "split keys":
        return triton.decode(q, k, v, mask, score, scale)
    return reference.attend_tiled(q, k, v, mask, score, scale, dropout)


def attend_regions(parts: Sequence[Region], q: Tensor, *, scale: float | None = None) -> Tensor:
    """One softmax over disjoint regions, each with keys, values, mask (and q) of its own; exact gradients. Raises BuildError for value terms."""
    if twins.asked():
        return reference.attend_regions(parts, q, _scale(q, None, scale))[0]
    return regions.attend_regions(parts, q, _scale(q, None, scale))


def attend_lse(
    q: Tensor, k: Tensor, v: Tensor, *, mask: BoundMask | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse): lse is fp32, natural log, (B,H,T), -inf for an empty row. No gradient: for decoding and merging."""
    out, lse = reference.attend(q.detach(), k.detach(), v.detach(), mask, None, _scale(q, None, scale))
    return out, lse


def _scale(q: Tensor, score: Score | None, scale: float | None) -> float:
    if score is not None and score.scale is not None:
        return score.scale
    return q.shape[-1] ** -0.5 if scale is None else scale


__all__ = [
    "Ahead", "Both", "BoundMask", "Content", "Coords", "Distance", "Region", "RelativeLogits", "Rule", "Score", "Side", "Span", "Term", "Toeplitz", "attend", "attend_lse",
    "attend_regions", "merge", "plan", "reference",
]  # fmt: skip
