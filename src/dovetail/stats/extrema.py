"""Sliding extrema, at a cost that the window's size does not enter, and the peaks that they find."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from dovetail.errors import DataError

Align = Literal["causal", "centred"]


def sliding_max(x: Tensor, window: int | tuple[int, ...], *, align: Align = "causal") -> Tensor:
    """The largest of every window: x (..., T) -> (..., T), or (..., H, W) with a window (h, w); any number type.

    align: "causal": entry t sees t−w+1 to t; "centred": t − w // 2 to t + (w−1) // 2. At the borders windows are cut
    off. Gradients go to the first of equal entries, in reading order, as in torch's max_pool. A NaN makes NaN of every
    window that sees it. Three comparisons an entry and dimension, by prefix and suffix maxima within blocks of w (van
    Herk 1992; Gil and Werman 1993). Raises DataError for a window below 1, more windows than dimensions, nothing to
    look at, or complex or boolean entries.
    """
    return _extreme(x, window, align, largest=True)[0]


def sliding_min(x: Tensor, window: int | tuple[int, ...], *, align: Align = "causal") -> Tensor:
    """The smallest of every window; the rest is as in `sliding_max`."""
    return _extreme(x, window, align, largest=False)[0]


def sliding_argmax(x: Tensor, window: int | tuple[int, ...], *, align: Align = "causal") -> Tensor:
    """Where the first largest entry of every window is: int64, of the shape of x; with several dimensions of a window,
    as a place in them flattened (row · W + column). The rest is as in `sliding_max`."""
    return _extreme(x, window, align, largest=True)[1]


def sliding_argmin(x: Tensor, window: int | tuple[int, ...], *, align: Align = "causal") -> Tensor:
    """Where the first smallest entry of every window is; the rest is as in `sliding_argmax`."""
    return _extreme(x, window, align, largest=False)[1]


def _extreme(x: Tensor, window: int | tuple[int, ...], align: Align, largest: bool) -> tuple[Tensor, Tensor]:
    """(values, places) over the last dimensions, one dimension after the other from the last."""
    windows = (window,) if isinstance(window, int) else tuple(window)
    if not windows or len(windows) > x.ndim or min(windows) < 1:
        raise DataError(
            f"a window of {window} over entries of shape {tuple(x.shape)}", where="window",
            remedy="give one size >= 1 for each of the last dimensions that it slides along",
        )  # fmt: skip
    if align not in ("causal", "centred"):
        raise DataError(f"align is {align!r}", where="align", remedy='say "causal" or "centred"')
    if x.dtype == torch.bool or x.is_complex():
        raise DataError(f"entries of type {x.dtype} have no order here", where="x", remedy="give numbers")
    sizes = x.shape[-len(windows) :]
    if 0 in sizes:
        raise DataError(f"nothing to look at: shape {tuple(x.shape)}", where="x", remedy="give at least one entry")
    with torch.no_grad():
        values = x
        places = torch.arange(math.prod(sizes), device=x.device).view(sizes).expand_as(x)
        for axis, size in zip(range(-1, -len(windows) - 1, -1), reversed(windows), strict=True):
            before = size - 1 if align == "causal" else size // 2
            index = _first(values.movedim(axis, -1), size, before, largest).movedim(-1, axis)
            values, places = values.gather(axis, index), places.gather(axis, index)
    flat = x.flatten(-len(windows)).gather(-1, places.flatten(-len(windows)))  # what gradients go through
    return flat.view_as(places), places.contiguous()


def _first(x: Tensor, window: int, before: int, largest: bool) -> Tensor:
    """Place of the first best entry of t − before to t − before + window − 1, (..., T) for x (..., T)."""
    length = x.shape[-1]
    after = min(window - 1 - before, length - 1)  # what is beyond all there is need not be looked at
    before = min(before, length - 1)
    window = before + after + 1
    worst = (-math.inf if largest else math.inf) if x.is_floating_point() else _limit(x.dtype, largest)
    blocks = -(-(length + window - 1) // window)
    x = pad(x, (before, blocks * window - length - before), value=worst).unflatten(-1, (blocks, window))
    start = torch.arange(blocks, device=x.device)[:, None] * window
    best = torch.cummax if largest else torch.cummin
    # The first of equal entries: cummax names the last one, so running backwards it is right, and forwards a
    # running maximum is named again where it rises only.
    suffix, place = best(x.flip(-1), -1)
    suffix, suffix_place = suffix.flip(-1), start + window - 1 - place.flip(-1)
    prefix = best(x, -1).values
    old, new = prefix[..., :-1], prefix[..., 1:]
    rises = (new > old if largest else new < old) | (new.isnan() & ~old.isnan())
    steps = torch.arange(1, window, device=x.device) * rises
    prefix_place = start + pad(steps, (1, 0)).cummax(-1).values
    suffix, prefix, suffix_place, prefix_place = (
        t.flatten(-2) for t in (suffix, prefix, suffix_place, prefix_place.expand_as(prefix))
    )
    left, right = slice(0, length), slice(window - 1, window - 1 + length)
    a, b = suffix[..., left], prefix[..., right]
    take = (a >= b if largest else a <= b) | a.isnan()
    place = torch.where(take, suffix_place[..., left], prefix_place[..., right])
    first = (torch.arange(length, device=x.device) - before).clamp_min(0)  # padding may equal the worst entry there is
    return (place - before).maximum(first)


def _limit(dtype: torch.dtype, largest: bool) -> int:
    return torch.iinfo(dtype).min if largest else torch.iinfo(dtype).max


class SlidingMax:
    """The largest of the last `window` numbers of a stream: a queue in which values fall, O(1) a number on average.

    A number that is smaller than a newer one is never the largest again and leaves. Memory: at most `window`
    numbers. Raises DataError for a window below 1. Source: the ascending minima algorithm, Harter 2001; Lemire 2006.
    """

    sign = 1.0

    def __init__(self, window: int):
        if window < 1:
            raise DataError(f"a window of {window}", where="window", remedy="give 1 or more")
        self.window, self.seen = window, 0
        self._queue: deque[tuple[int, float]] = deque()

    def push(self, value: float) -> float:
        """Takes a number in; returns the extreme of the last `window`. Raises DataError for NaN, which has no place."""
        if math.isnan(value):
            raise DataError(
                f"number {self.seen} of the stream is NaN", remedy="leave it out, or use the form on tensors"
            )
        while self._queue and self.sign * self._queue[-1][1] < self.sign * value:
            self._queue.pop()
        self._queue.append((self.seen, value))
        self.seen += 1
        if self._queue[0][0] <= self.seen - 1 - self.window:
            self._queue.popleft()
        return self._queue[0][1]

    def extend(self, values: Iterable[float]) -> list[float]:
        """`push` for each."""
        return [self.push(value) for value in values]

    @property
    def place(self) -> int:
        """Number in the stream, from 0, of the first extreme of the last window. Raises DataError before the first
        number."""
        if not self._queue:
            raise DataError("nothing came yet", remedy="call push first")
        return self._queue[0][0]


class SlidingMin(SlidingMax):
    """The smallest of the last `window` numbers of a stream; the rest is as in `SlidingMax`."""

    sign = -1.0


def peaks(x: Tensor, window: int, threshold: float = -math.inf) -> Tensor:
    """Where x is the largest of the window around it and at least the threshold: (..., T) -> (..., T) bool.

    window: odd; peaks are more than window // 2 apart. Of equal entries within a window the first is a peak, so a
    plateau has one. Raises DataError for an even window, and for NaN. Source: the local maximum as suppression, of
    scores in time as Zhou et al. 2019 (section 3, peaks of a keypoint map).
    """
    if window % 2 == 0:
        raise DataError(f"a window of {window} has no middle", where="window", remedy="give an odd number")
    if bool(x.isnan().any()):
        raise DataError("NaN among the scores", where="x", remedy="look at what made them")
    places = sliding_argmax(x, window, align="centred")
    return (places == torch.arange(x.shape[-1], device=x.device)) & (x >= threshold)
