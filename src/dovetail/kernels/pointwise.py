"""Attention whose weights are a function of each score by itself, in bands of queries made again in the backward.

Memory O(band · S). The products are in the dtype of q, and a band of a plain causal call does not multiply with the
keys after it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dovetail.errors import BuildError
from dovetail.kernels.attention import BoundMask, Coords, Score

BAND = 256  # queries, at least
_SCORES = {"cuda": 2**27, "cpu": 2**23}  # of a band


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BoundMask | None,
    score: Score | None,
    scale: float | None,
    weigh: Callable[[Tensor], Tensor],
    dropout: float = 0.0,
) -> Tensor:
    """(B,H,T,Dv) from q (B,H,T,D), k (B,G,S,D), v (B,G,S,Dv): weigh(scale·qk + terms) v, 0 for keys that are not seen.

    weigh: of scores in fp32 or better. scale: 1/√D unless given. Raises BuildError for a score that is more than added
    terms.
    """
    if score is not None and (score.value_terms is not None or score.cap is not None):
        raise BuildError(
            "value terms or a soft cap in an attention that is no softmax",
            remedy="use a position that only adds to the score (t5_buckets, alibi), or a softmax",
        )
    if score is not None and score.scale is not None:
        scale = score.scale
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    T, groups = q.shape[2], q.shape[1] // k.shape[1]
    k, v = (t if groups == 1 else t.repeat_interleave(groups, dim=1) for t in (k, v))
    if T <= BAND:
        return _band(q, k, v, mask, score, factor, weigh, dropout)
    triangle = mask is not None and mask.causal and score is None
    most = _SCORES.get(q.device.type, 2**23) // (q.shape[0] * q.shape[1] * k.shape[2])
    band = max(BAND, min(T // 8, most))  # eight bands leave out nearly half of a triangle
    out = []
    for a in range(0, T, band):
        b = min(a + band, T)
        keys = b if triangle else k.shape[2]
        rows = None if mask is None else _cut(mask, a, b, keys)
        part = None if score is None else score.rows(a, b)
        given = (q[:, :, a:b], k[:, :, :keys], v[:, :, :keys])
        out.append(checkpoint(_band, *given, rows, part, factor, weigh, dropout, use_reentrant=False))
    return torch.cat(out, dim=2)


def _cut(mask: BoundMask, a: int, b: int, keys: int) -> BoundMask:
    """The mask of queries a..b against the first `keys` keys."""
    return BoundMask(mask.rule, Coords(mask.at.q.slice(a, b), mask.at.k.slice(0, keys)))


def _band(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BoundMask | None,
    score: Score | None,
    scale: float,
    weigh: Callable[[Tensor], Tensor],
    dropout: float,
) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    s = torch.matmul(q, k.transpose(-1, -2)).to(wide) * scale
    if score is not None and len(score.terms):
        assert mask is not None, "score terms need the coordinates that a mask carries"
        bias = score.bias(mask.at, scale)
        s = s if bias is None else s + bias
    p = weigh(s)
    if mask is not None and not mask.full:
        p = p.masked_fill(~mask.dense(), 0.0)
    p = F.dropout(p, dropout) if dropout else p
    return torch.matmul(p.to(v.dtype), v)
