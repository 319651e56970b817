"""Gated linear attention: a matrix of keys times values whose rows fade, each at a rate that the token says.

S_t = diag(α_t) S_{t-1} + k_t v_tᵀ, o_t = scale · S_tᵀ q_t, with S (D,Dv) for each head.
Shapes: q, k, log α (B,H,T,D), v (B,H,T,Dv).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.kernels import twins
from dovetail.kernels.chunks import without_autocast
from dovetail.kernels.gated_linear import chunked, reference
from dovetail.kernels.installed import TRITON
from dovetail.kernels.plan import Plan

WIDEST = 256  # of keys and of values, of which a GPU's tiles hold a whole row


def gated_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    start: Tensor | None = None,
    reset: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(o (B,H,T,Dv) in q's dtype, S_T (B,H,D,Dv) in fp32 or better) (Yang et al. 2024, eq. 3).

    log_decay: log α <= 0. start: S_0, zero unless given. reset (B,T): True where S is zero before the token, as at the
    first of a packed document. scale: 1/√D unless given. A token with k = 0 and α = 1 is skipped.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    mixed = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    path = plan(q.shape[2], q.device.type, mixed, max(q.shape[3], v.shape[3])).path
    if path == "triton":
        from dovetail.kernels.gated_linear import triton

        out, end = triton.gated_linear(q.to(mixed), k.to(mixed), v.to(mixed), log_decay, start, reset, factor)
        return out.to(q.dtype), end
    wide = torch.promote_types(q.dtype, torch.float32)
    begin = q.new_zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=wide) if start is None else start.to(wide)
    run = reference.gated_linear if path == "step" else chunked.gated_linear
    with without_autocast(q):
        out, end = run(q.to(wide) * factor, k.to(wide), v.to(wide), log_decay.to(wide), begin, reset)
    return out.to(q.dtype), end


def plan(queries: int, device: str = "cpu", dtype: torch.dtype = torch.float32, width: int = 0) -> Plan:
    """The path for `queries` tokens a row, and why. width: of the wider of keys and values; 0 where no more than usual."""
    if twins.asked():
        return Plan("step", twins.WHY)
    if queries == 1:
        return Plan("step", "one token: one update of the state")
    if device == "cuda" and dtype.itemsize <= 4 and width <= WIDEST and TRITON:
        return Plan("triton", "decays by channel on CUDA: one walk for the states, then all chunks at once")
    return Plan("chunked", "decays by channel over a row: products between halves inside chunks, the state across")


__all__ = ["gated_linear", "plan", "reference"]
