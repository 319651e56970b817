"""The largest gap between neighbours in order, without sorting, and the threshold that it suggests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dovetail.errors import DataError


class Gap(NamedTuple):
    """width = high − low, of the neighbours low and high; threshold: half way. Each (...), float64."""

    width: Tensor
    low: Tensor
    high: Tensor
    threshold: Tensor


@torch.no_grad()
def largest_gap(x: Tensor) -> Gap:
    """The widest empty interval between numbers, in linear time: x (..., N), N >= 2, in any order; each row its own.

    N numbers over a range R leave a gap of R / (N−1) at least, which no bucket of a smaller width holds: so only the
    smallest and the largest of each of 2N buckets matter. (N buckets would do, but for rounding where all gaps are
    equal.) Of equal gaps the lowest. Exact: the difference of two of the numbers, in float64; no gradient. Where all
    are equal the width is 0. As a cut-off on scores it is that which the fewest small changes move. Raises DataError
    for fewer than two numbers, or what float64 cannot hold: NaN, infinity, a range beyond 1.8e308. Source: Gonzalez
    1975; Preparata and Shamos 1985, section 6.4.
    """
    if x.ndim == 0 or x.shape[-1] < 2 or x.is_complex():
        raise DataError(f"no gap in entries of shape {tuple(x.shape)}", where="x", remedy="give two numbers or more")
    x = x.double()
    least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    spread = most - least
    if not bool(spread.isfinite().all()):
        raise DataError("NaN, infinity or a range beyond float64", where="x", remedy="give finite numbers")
    buckets = 2 * x.shape[-1]
    share = (x - least) / torch.where(spread > 0, spread, 1)
    bucket = (share * buckets).long().clamp_max(buckets - 1)
    shape = (*x.shape[:-1], buckets)
    low = x.new_full(shape, torch.inf).scatter_reduce(-1, bucket, x, "amin")
    high = x.new_full(shape, -torch.inf).scatter_reduce(-1, bucket, x, "amax").cummax(-1).values
    gaps = low[..., 1:] - high[..., :-1]  # to the largest of all before; +inf before an empty bucket, which counts not
    width, place = gaps.masked_fill(gaps == torch.inf, -1).max(-1, keepdim=True)
    below, above = high.gather(-1, place), low.gather(-1, place + 1)
    same = spread == 0
    below, above, width = (
        torch.where(same, other, t) for t, other in ((below, least), (above, least), (width, spread))
    )
    middle = below + width / 2
    return Gap(*(t.squeeze(-1) for t in (width, below, above, middle)))
