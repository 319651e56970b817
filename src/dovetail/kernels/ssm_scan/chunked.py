"""Chunks of a linear recurrence: the states of one in log₂ rounds, and one chunk after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 64  # tokens: six rounds


def states(decay: Tensor, drive: Tensor, start: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + drive_t for every t, (B,T,...). decay (B or 1,T,...), drive (B,T,...), start (B,...).

    Round r adds what came in up to 2^r tokens ago (Hillis and Steele 1986).
    """
    h = torch.cat([drive[:, :1] + decay[:, :1] * start[:, None], drive[:, 1:]], 1)
    reach = 1
    while reach < drive.shape[1]:
        h = torch.cat([h[:, :reach], h[:, reach:] + decay[:, reach:] * h[:, :-reach]], 1)
        decay = torch.cat([decay[:, :reach], decay[:, reach:] * decay[:, :-reach]], 1)
        reach *= 2
    return h


def run(piece: Callable[..., tuple[Tensor, Tensor]], start: Tensor, given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`piece(state, *chunk of each of given (B,T,...))` -> (y, state) over chunks along T: all y, and the last state."""
    T = given[0].shape[1]
    if T <= CHUNK:
        return piece(start, *given)
    again = torch.is_grad_enabled()
    out = []
    for t in range(0, T, CHUNK):
        cut = [g[:, t : t + CHUNK] for g in given]
        y, start = (
            checkpoint(piece, start, *cut, use_reentrant=False, preserve_rng_state=False)
            if again
            else piece(start, *cut)
        )  # type: ignore[misc]
        out.append(y)
    return torch.cat(out, 1), start


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `kernels.ssm_scan.selective_scan`."""
    given = [x, dt, b, c] if first is None else [x, dt, b, c, first]

    def piece(start: Tensor, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, *first: Tensor) -> tuple[Tensor, Tensor]:
        decay = torch.exp(dt[..., None] * a)
        if first:
            decay = decay.masked_fill(first[0][..., None, None], 0.0)
        h = states(decay, (dt * x)[..., None] * b[:, :, None], start)
        return torch.einsum("btdn,btn->btd", h, c), h[:, -1]

    return run(piece, start, given)
