"""The closest pair of a set by divide and conquer, one level of all blocks at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.geometry.batch import Pair, padded, take

_NEIGHBOURS = 8  # in a strip of width 2d with points d apart on each side, at most 7 follow within d; one for rounding


def closest_pair(points: Tensor, count: Tensor | None = None) -> Pair:
    """The two points of a set that are nearest to each other, and their distance. (..., N, 2) -> `Pair`.

    Repeated points are at distance 0. Error of the distance at most 4·2^-53 relative; of pairs equally near, any one.
    O(N log N), also in the worst case. Raises DataError for wrong shapes, rows of fewer than two points and
    coordinates out of range. Source: Shamos and Hoey 1975; Bentley 1980. Blocks of the order by x are halved on the way
    down by stable partitions of the order by y, so that one sort by y serves all levels.
    """
    given = padded(points, count, "point set", least=2)
    lead, N = given.count.shape, given.points.shape[-2]
    p, n = given.points.detach().reshape(-1, N, 2), given.count.reshape(-1)
    R, S = p.shape[0], 1 << (N - 1).bit_length()
    real = torch.arange(N, device=p.device) < n[:, None]
    by_x = torch.where(real, p[..., 0], torch.inf).argsort(dim=-1, stable=True)
    place = torch.nn.functional.pad(by_x, (0, S - N))  # rank by x -> place in the input; the last ranks are padding
    p = take(p, place)
    real = (torch.arange(S, device=p.device) < n[:, None]).expand(R, S)
    by_y = torch.where(real, p[..., 1], torch.inf).argsort(dim=-1, stable=True)

    halves: list[Tensor] = []  # for each size of block from S down to 2: which half each point goes to, in order of y
    order, s = by_y, S
    while s > 1:
        right = (order % s >= s // 2).view(R, -1, s)
        halves.append(right)
        order = torch.empty_like(order).scatter(1, _places(right), order)
        s //= 2

    nearest = torch.full((R, S), torch.inf, dtype=p.dtype, device=p.device)  # of each block
    best = torch.full((R,), torch.inf, dtype=p.dtype, device=p.device)
    pair = torch.zeros(R, 2, dtype=torch.int64, device=p.device)
    for right in reversed(halves):  # blocks of s = 2, 4, ..., S; `order` is that by y within each block
        s = right.shape[-1]
        nearest = nearest.view(R, -1, 2).amin(-1)
        order = order.gather(1, _places(right))
        here = take(p, order).view(R, -1, s, 2)
        split = p[..., 0].view(R, -1, s)[..., s // 2 : s // 2 + 1]
        strip = real.gather(1, order).view(R, -1, s) & ((here[..., 0] - split).abs() <= nearest[..., None])
        row, block, _ = strip.nonzero(as_tuple=True)
        block = row * nearest.shape[1] + block
        x, y = here[strip].unbind(-1)
        rank = order.view(strip.shape)[strip]
        flat = nearest.reshape(-1)
        for k in range(1, min(_NEIGHBOURS, s - 1) + 1):
            apart = torch.hypot(x[k:] - x[:-k], y[k:] - y[:-k])
            apart = torch.where(block[k:] == block[:-k], apart, torch.inf)
            flat = flat.scatter_reduce(0, block[:-k], apart, "amin")
            better = (apart < best[row[:-k]]).nonzero()[:, 0]
            if better.numel():
                best = best.scatter_reduce(0, row[better], apart[better], "amin")
                hit = better[apart[better] == best[row[better]]]
                pair[row[hit]] = torch.stack([rank[hit], rank[hit + k]], -1)
        nearest = flat.view(nearest.shape)
    index = place.gather(1, pair)
    return Pair(best.reshape(lead), take(p, pair).reshape(*lead, 2, 2), index.reshape(*lead, 2))


def _places(right: Tensor) -> Tensor:
    """(R, S) where a stable partition of each block (R, S/s, s) into its two equal halves puts every point."""
    R, blocks, s = right.shape
    ones = right.cumsum(-1)
    zeros = torch.arange(1, s + 1, device=right.device) - ones
    start = torch.arange(blocks, device=right.device)[:, None] * s
    return (start + torch.where(right, s // 2 + ones, zeros) - 1).reshape(R, -1)
