"""Linear attention: Σ_j (q_i·k_j) v_j without a softmax, so that keys and values add up to one matrix a head.

q (B,H,T,D), k (B,G,T,D), v (B,G,T,E): features of queries and keys, whose width is the caller's. A per-head decay over
tokens makes it a retention. Katharopoulos et al. 2020, eq. 8-12 and 18-20; Sun et al. 2023, eq. 5-7.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from dovetail.kernels import twins
from dovetail.kernels.chunks import without_autocast
from dovetail.kernels.linear_attention import chunked, operator, recurrent, reference
from dovetail.kernels.linear_attention.plan import plan
from dovetail.kernels.linear_attention.stabiliser import LOW, document_max, running_max


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    segments: Tensor | None = None,
    decay: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(out (B,H,T,E) in the widest of the inputs' types, state (B,G,D,E) in fp32 or better, or None).

    segments (B|1,T): documents, negative for padding; tokens see their own document alone. Where causal, their numbers
    rise along a row. decay (B|1,G|1,T): logarithm, <= 0, of what is left of the past at each token (below -40 it counts as
    that); padding does not decay. start: the state before the first token, which goes on in a row's first document. Only
    causal calls decay and have a state, the one after the last token, of its document. decay has no gradient.
    """
    if _fused(q, k, v, causal, segments, start):
        return operator.causal(q, k, v, decay, _rows(q, segments), start)
    with without_autocast(q):
        out, end = _plain(q, k, v, causal, segments, decay, start)
    return out.to(_widest(q, k, v)), end


def normalised(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    segments: Tensor | None = None,
    decay: Tensor | None = None,
    start: Tensor | None = None,
    least: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    """`linear_attention` by the sum of its weights; the last column of the state (B,G,D,E+1) is that of the keys."""
    if _fused(q, k, v, causal, segments, start):
        return operator.causal(q, k, v, decay, _rows(q, segments), start, least)
    wide = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)
    with without_autocast(q):
        out, end = _plain(q, k, wide, causal, segments, decay, start)
    return divided(out[..., :-1], out[..., -1:], least).to(_widest(q, k, v)), end


def divided(numerator: Tensor, denominator: Tensor, least: float = 1e-6) -> Tensor:
    """numerator / denominator, of which less than `least` counts as that: a query that no key answers gives zero."""
    return numerator / denominator.clamp_min(least)


def _fused(q: Tensor, k: Tensor, v: Tensor, causal: bool, segments: Tensor | None, start: Tensor | None) -> bool:
    chosen = plan(
        q.shape[2],
        causal=causal,
        segments=segments is not None,
        state=start is not None,
        device=q.device.type,
        widest=max(q.shape[3], v.shape[3]),
        dtype=_widest(q, k, v),
    )
    return chosen.path == "triton"


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    segments: Tensor | None,
    decay: Tensor | None,
    start: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`linear_attention` in plain torch, all of it in fp32 or better."""
    if twins.asked() and start is None:
        return reference.linear_attention(q, k, v, causal=causal, segments=segments, decay=decay), None
    rows = _rows(q, segments)
    if not causal:
        assert decay is None and start is None, "only causal calls decay, and have a state"
        if segments is None:
            return chunked.bidirectional(q, k, v, rows), None
        segments = segments.expand(q.shape[0], -1)
        order = segments.argsort(dim=1, stable=True)  # documents of a grid's tokens may be interleaved
        rows = chunked.Rows.of(segments.gather(1, order))
        out = chunked.bidirectional(_take(q, order), _take(k, order), _take(v, order), rows)
        return _take(out, order.argsort(1)), None
    if q.shape[2] == 1 and start is not None:
        return recurrent.linear_attention(q, k, v, decay, rows.real, start)
    wide = torch.promote_types(q.dtype, torch.float32)
    if start is None:
        start = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=wide, device=q.device)
    return chunked.causal(q, k, v, decay, rows, start)


def _rows(q: Tensor, segments: Tensor | None) -> chunked.Rows:
    return chunked.Rows.of(None if segments is None else segments.expand(q.shape[0], -1))


def _widest(*tensors: Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (t.dtype for t in tensors))


def _take(x: Tensor, order: Tensor) -> Tensor:
    """x (B,H,T,D) with token order[b, t] at t."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


__all__ = ["LOW", "divided", "document_max", "linear_attention", "normalised", "plan", "reference", "running_max"]
