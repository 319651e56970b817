"""The delta rule, gated or not: a matrix that learns to answer keys with values, one step of gradient descent a token.

S_t = α_t S_{t-1} + β_t k_t (v_t - α_t S_{t-1}ᵀ k_t)ᵀ, o_t = scale · S_tᵀ q_t, with S (D,Dv) for each head.
Shapes: q, k (B,H,T,D), v (B,H,T,Dv), β and log α (B,H,T). |k_t| <= 1 and β_t <= 2 keep S bounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.kernels.chunks import without_autocast
from dovetail.kernels.delta_rule import chunked, reference
from dovetail.kernels.delta_rule.plan import plan


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    start: Tensor | None = None,
    reset: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(o (B,H,T,Dv) in q's dtype, S_T (B,H,D,Dv) in fp32 or better) (Yang et al. 2024, eq. 1; gated: 2025, eq. 10).

    log_decay: log α <= 0; α = 1 unless given. start: S_0, zero unless given. reset (B,T): True where S is zero before
    the token, as at the first of a packed document. scale: 1/√D unless given. A token with β = 0 and α = 1 is skipped.
    On CUDA products are made in q's dtype, and added up in fp32.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    path = plan(q.shape[2], device=q.device.type, dtype=q.dtype, width=q.shape[3]).path
    if path == "triton":
        from dovetail.kernels.delta_rule import triton

        return triton.delta_rule(q, k, v, beta, log_decay, start, reset, factor)
    begin = q.new_zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=wide) if start is None else start.to(wide)
    log_decay = None if log_decay is None else log_decay.to(wide)
    run = reference.delta_rule if path == "step" else chunked.delta_rule
    with without_autocast(q):
        out, end = run(q.to(wide) * factor, k.to(wide), v.to(wide), beta.to(wide), log_decay, begin, reset)
    return out.to(q.dtype), end


__all__ = ["delta_rule", "plan", "reference"]
