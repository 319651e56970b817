"""Linear recurrences whose state is kept apart entry by entry: h_t = a_t ⊙ h_{t-1} + b_t.

Within a chunk all states stand in memory at once and are found in log₂ of its length rounds; across chunks only the last
state is handed on, and a backward makes each chunk again: memory O(chunk) beside one state a chunk. Decays are at most
1 in size, and no product is ever divided by another, so that nothing overflows however fast a state forgets.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from dovetail.kernels import twins
from dovetail.kernels.ssm_scan import chunked, reference
from dovetail.kernels.ssm_scan.plan import plan


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(y (B,T,D), last state (B,D,N)): h_t = exp(dt_t a) h_{t-1} + dt_t b_t x_t, y_t = c_t · h_t, for D channels of N.

    x, dt (B,T,D); a (D,N), negative; b, c (B,T,N); start (B,D,N). first (B,T): true where a document begins, which the
    state before does not reach. A place with dt = 0 changes nothing and is passed by: padding. Computed in the widest
    dtype given (Gu and Dao 2023, algorithm 2, with b discretised by Euler's rule as in the released code).
    """
    wide = reduce(torch.promote_types, (t.dtype for t in (dt, a, b, c, start)), x.dtype)
    if twins.asked():
        x, dt, a, b, c, start = (t.to(wide) for t in (x, dt, a, b, c, start))
        return reference.selective_scan(x, dt, a, b, c, start, first)
    if plan(x.shape[1], a.shape[1], device=x.device.type, dtype=wide).path == "triton":
        from dovetail.kernels.ssm_scan import triton

        y, end = triton.selective_scan(x, dt, a, b, c, start, first)
        return y.to(wide), end.to(wide)
    return chunked.selective_scan(x, dt, a, b, c, start, first)


def diagonal_scan(
    x: Tensor, decay: Tensor, weight: Tensor, start: Tensor, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(y (B,T,D), last state (B,D,N)): h_t = decay h_{t-1} + x_t, y_t = 2 Re Σ_n weight_n h_tn: one law for all times.

    x (B,T,D); decay, weight (D,N) and start (B,D,N) complex. real (B,T): false for padding, which is passed by.
    """

    if twins.asked():
        return reference.diagonal_scan(x, decay, weight, start, real)

    def piece(start: Tensor, x: Tensor, *real: Tensor) -> tuple[Tensor, Tensor]:
        law = decay.expand(1, x.shape[1], *decay.shape)
        if real:
            law = torch.where(real[0][..., None, None], law, torch.ones_like(law))
            x = x.masked_fill(~real[0][..., None], 0.0)
        drive = x[..., None].to(start.dtype).expand(*x.shape, start.shape[-1])
        h = chunked.states(law, drive, start)
        return 2 * (h * weight).real.sum(-1), h[:, -1]

    return chunked.run(piece, start, [x] if real is None else [x, real])


__all__ = ["chunked", "diagonal_scan", "plan", "reference", "selective_scan"]
