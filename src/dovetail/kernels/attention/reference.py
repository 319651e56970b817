"""The plain twins: softmax attention as the formula says, in fp32 or better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dovetail.kernels.attention.coords import BoundMask
from dovetail.kernels.attention.score import Score, soft_cap


@dataclass(frozen=True)
class Region:
    """A set of keys with a mask and a score of its own. Regions of one call must be disjoint.

    q may differ by region too (ReRoPE rotates it differently for near and far keys): None means the
    caller's q. k (B,G,S,D), v (B,G,S,Dv).
    """

    k: Tensor
    v: Tensor
    mask: BoundMask | None = None
    score: Score | None = None
    q: Tensor | None = None


def scores(q: Tensor, k: Tensor, mask: BoundMask | None, score: Score | None, scale: float) -> Tensor:
    """Masked scores (B,H,T,S) in fp32 (fp64 if given so), -inf where a key is hidden."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    s = torch.matmul(q.to(wide), k.to(wide).transpose(-1, -2)) * scale
    if score is not None:
        if len(score.terms):
            assert mask is not None, "score terms need the coordinates that a mask carries"
            bias = score.bias(mask.at, scale)
            s = s if bias is None else s + bias
        s = soft_cap(s, score.cap)
    if mask is not None and not mask.full:
        s = s.masked_fill(~mask.dense(), float("-inf"))
    return s


def softmax_lse(s: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and natural-log normaliser over the last axis; an empty row gives zeros and -inf."""
    top = s.amax(-1, keepdim=True).detach()
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    p = e / torch.where(total > 0, total, torch.ones_like(total))
    lse = torch.where(total > 0, top + torch.log(total.clamp_min(torch.finfo(s.dtype).tiny)), float("-inf"))
    return p, lse.squeeze(-1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BoundMask | None, score: Score | None, scale: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Out (B,H,T,Dv) in q's dtype and lse (B,H,T) in fp32 or better. Memory O(T·S)."""
    p, lse = softmax_lse(scores(q, k, mask, score, scale))
    p = F.dropout(p, dropout) if dropout else p
    out = torch.matmul(p, v.to(p.dtype).repeat_interleave(q.shape[1] // v.shape[1], dim=1))
    if score is not None and score.value_terms is not None:
        out = out + score.value_terms(p, 0, q.shape[2])
    return out.to(q.dtype), lse


def attend_tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BoundMask | None,
    score: Score | None,
    scale: float,
    dropout: float = 0.0,
    tile: int = 256,
) -> Tensor:
    """`attend` over bands of queries, each recomputed in the backward: memory O(tile·S), any score."""
    T = q.shape[2]
    if tile >= T:
        return attend(q, k, v, mask, score, scale, dropout)[0]
    out = []
    for start in range(0, T, tile):
        stop = min(start + tile, T)

        def band(q: Tensor, k: Tensor, v: Tensor, start: int = start, stop: int = stop) -> Tensor:
            rows = None if mask is None else mask.rows(start, stop)
            part = None if score is None else score.rows(start, stop)
            return attend(q, k, v, rows, part, scale, dropout)[0]

        out.append(checkpoint(band, q[:, :, start:stop], k, v, use_reentrant=False))
    return torch.cat(out, dim=2)


def attend_regions(regions: Sequence[Region], q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of all regions: concatenate the scores. The definition; memory O(T·S)."""
    parts = [scores(q if r.q is None else r.q, r.k, r.mask, r.score, scale) for r in regions]
    p, lse = softmax_lse(torch.cat(parts, dim=-1))
    out = None
    for r, share in zip(regions, p.split([s.shape[-1] for s in parts], dim=-1), strict=True):
        part = torch.matmul(share, r.v.to(share.dtype).repeat_interleave(q.shape[1] // r.v.shape[1], dim=1))
        out = part if out is None else out + part
    assert out is not None
    return out.to(q.dtype), lse
