"""Sliding extrema, peaks and gaps against brute force, scipy.ndimage and torch's pooling."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import max_pool1d, max_pool2d, pad

from dovetail.errors import DataError
from dovetail.stats import (
    SlidingMax,
    SlidingMin,
    largest_gap,
    peaks,
    sliding_argmax,
    sliding_argmin,
    sliding_max,
    sliding_min,
)

few = st.integers(-2, 2).map(float)  # many ties
numbers = st.one_of(few, st.floats(-1e6, 1e6), st.sampled_from([math.inf, -math.inf]))
lists = st.lists(numbers, min_size=1, max_size=30)
windows = st.integers(1, 40)


def spans(length: int, window: int, align: str) -> list[range]:
    before = window - 1 if align == "causal" else window // 2
    return [range(max(0, t - before), min(length, t - before + window)) for t in range(length)]


@settings(max_examples=150, deadline=None)
@given(lists, windows, st.sampled_from(["causal", "centred"]))
def test_values_and_first_places_are_those_of_brute_force(values: list[float], window: int, align: str) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    seen = spans(len(values), window, align)
    largest = [max(span, key=lambda i: (values[i], -i)) for span in seen]
    smallest = [min(span, key=lambda i: (values[i], i)) for span in seen]
    assert sliding_argmax(x, window, align=align).tolist() == largest  # type: ignore[arg-type]
    assert sliding_argmin(x, window, align=align).tolist() == smallest  # type: ignore[arg-type]
    assert sliding_max(x, window, align=align).tolist() == [values[i] for i in largest]  # type: ignore[arg-type]
    assert sliding_min(x, window, align=align).tolist() == [values[i] for i in smallest]  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(lists, windows)
def test_the_stream_gives_what_the_tensor_gives_and_keeps_at_most_a_window(values: list[float], window: int) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    for kind, batched, place in ((SlidingMax, sliding_max, sliding_argmax), (SlidingMin, sliding_min, sliding_argmin)):
        stream, out, places = kind(window), [], []
        for value in values:
            out.append(stream.push(value))
            places.append(stream.place)
            assert len(stream._queue) <= window
        assert out == batched(x, window).tolist()
        assert places == place(x, window).tolist()
        assert kind(window).extend(values) == out


def test_the_queue_compares_each_number_a_constant_number_of_times() -> None:
    compared = 0

    class Counted(float):
        def __lt__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return float(self) < float(other)  # type: ignore[arg-type]

        def __rmul__(self, other: float) -> Counted:
            return Counted(other * float(self))

    n = 3000
    for window in (2, 50, 3000):
        compared = 0
        SlidingMax(window).extend(Counted(v) for v in torch.randn(n).tolist())
        assert n - 1 <= compared <= 2 * n


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("ties", [False, True])
def test_gradients_are_those_of_max_pool_ties_too(window: int, ties: bool) -> None:
    x = torch.randn(3, 4, 17, dtype=torch.float64)
    x = (x.round() if ties else x).requires_grad_()
    ours = sliding_max(x, window)
    theirs = max_pool1d(pad(x, (window - 1, 0), value=-math.inf), window, stride=1)
    assert torch.equal(ours, theirs)
    g = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, g)[0] for y in (ours, theirs)), rtol=0, atol=1e-14)
    least = sliding_min(x, window)
    torch.testing.assert_close(least, -max_pool1d(pad(-x, (window - 1, 0), value=-math.inf), window, stride=1))


@pytest.mark.parametrize("window", [(1, 3), (3, 3), (5, 3)])
def test_two_dimensions_are_those_of_max_pool2d_values_places_and_gradients(window: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 9, 12, dtype=torch.float64).mul(2).round().requires_grad_()  # ties
    h, w = window
    wide = pad(x, (w // 2, w // 2, h // 2, h // 2), value=-math.inf)
    theirs, at = max_pool2d(wide, window, stride=1, return_indices=True)
    ours = sliding_max(x, window, align="centred")
    assert torch.equal(ours, theirs)
    row, column = at // wide.shape[-1] - h // 2, at % wide.shape[-1] - w // 2
    assert torch.equal(sliding_argmax(x, window, align="centred"), row * 12 + column)
    g = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, g)[0] for y in (ours, theirs)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("window", [(4, 2), (3, 6), (20, 30)])
def test_even_windows_lie_where_scipy_puts_them(window: tuple[int, int]) -> None:
    x = torch.randn(11, 14, dtype=torch.float64)
    for ours, theirs, border in (
        (sliding_max, ndimage.maximum_filter, -math.inf),
        (sliding_min, ndimage.minimum_filter, math.inf),
    ):
        want = theirs(x.numpy(), size=window, mode="constant", cval=border)
        assert torch.equal(ours(x, window, align="centred"), torch.from_numpy(want))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float32])
def test_every_number_type_keeps_its_type_and_its_limits(dtype: torch.dtype) -> None:
    x = torch.randint(0, 5, (2, 13)).to(dtype)
    low = -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min
    x[0, :4] = low
    out = sliding_max(x, 3)
    assert out.dtype == dtype
    assert torch.equal(out[:, 2:], x.unfold(-1, 3, 1).amax(-1))
    assert torch.equal(x.gather(-1, sliding_argmax(x, 3)), out)
    assert sliding_argmax(x, 3)[0, :4].tolist() == [0, 0, 0, 1]  # padding is no entry, even where it is as low
    assert torch.equal(sliding_min(x, 3)[:, 2:], x.unfold(-1, 3, 1).amin(-1))


def test_nan_is_seen_by_the_windows_that_have_it_and_no_other() -> None:
    x = torch.tensor([1.0, 5.0, math.nan, 0.0, 2.0, 3.0, 1.0])
    for out, place in ((sliding_max(x, 3), sliding_argmax(x, 3)), (sliding_min(x, 3), sliding_argmin(x, 3))):
        assert out.isnan().tolist() == [False, False, True, True, True, False, False]
        assert place[2:5].tolist() == [2, 2, 2]
    with pytest.raises(DataError, match="NaN"):
        SlidingMax(3).extend(x.tolist())
    with pytest.raises(DataError, match="NaN"):
        peaks(x, 3)


def test_gradcheck_and_second_order() -> None:
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: sliding_max(t, 3, align="centred"), x)
    assert torch.autograd.gradgradcheck(lambda t: sliding_min(t, (2, 3)) ** 2, x)


def test_empty_batches_pass_and_impossible_windows_are_refused() -> None:
    assert sliding_max(torch.empty(0, 4), 2).shape == (0, 4)
    for x, window in (
        (torch.ones(3), 0),
        (torch.ones(3), (2, 2)),
        (torch.ones(2, 0), 1),
        (torch.ones(3, dtype=torch.bool), 1),
    ):
        with pytest.raises(DataError):
            sliding_max(x, window)
    with pytest.raises(DataError, match="align"):
        sliding_max(torch.ones(3), 2, align="left")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="nothing came"):
        _ = SlidingMax(2).place


@settings(max_examples=100, deadline=None)
@given(lists, st.integers(0, 6).map(lambda n: 2 * n + 1), few)
def test_peaks_are_the_first_largest_of_their_surroundings(values: list[float], window: int, threshold: float) -> None:
    half = window // 2

    def is_peak(t: int) -> bool:
        before, after = values[max(0, t - half) : t], values[t + 1 : t + half + 1]
        return values[t] >= threshold and all(v < values[t] for v in before) and all(v <= values[t] for v in after)

    found = peaks(torch.tensor([values] * 2), window, threshold)
    want = peaks(torch.tensor(values), window, threshold)
    assert torch.equal(found, want.expand(2, -1))
    x = torch.tensor(values).tolist()  # in float32, as the tensor
    values[:] = x
    assert want.tolist() == [is_peak(t) for t in range(len(values))]
    at = want.nonzero().flatten()
    assert bool((at.diff() > half).all())
    with pytest.raises(DataError, match="middle"):
        peaks(torch.ones(4), window + 1)


def brute_gap(row: list[float]) -> tuple[float, float, float]:
    ordered = sorted(row)
    pairs = list(pairwise(ordered))
    low, high = max(pairs, key=lambda p: p[1] - p[0])  # the first of equal ones
    return high - low, low, high


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.lists(st.floats(-1e300, 1e300), min_size=2, max_size=40),
        st.lists(st.integers(-5, 5).map(float), min_size=2, max_size=20),
        st.tuples(st.floats(-1e3, 1e3), st.floats(1e-9, 1e3), st.integers(2, 60)).map(
            lambda p: [p[0] + p[1] * i for i in range(p[2])]  # equal gaps, but for rounding
        ),
    ),
    st.randoms(use_true_random=False),
)
def test_the_largest_gap_is_that_of_the_sorted_numbers(values: list[float], random: object) -> None:
    random.shuffle(values)  # type: ignore[attr-defined]
    gap = largest_gap(torch.tensor(values, dtype=torch.float64))
    width, low, high = brute_gap(values)
    assert (float(gap.width), float(gap.low), float(gap.high)) == (width, low, high)
    assert low <= float(gap.threshold) <= high


def test_gaps_of_a_batch_are_those_of_its_rows_and_split_two_groups() -> None:
    x = torch.cat([torch.rand(3, 5, 400), 3 + torch.rand(3, 5, 100)], -1)
    x = x[..., torch.randperm(500)]
    gap = largest_gap(x)
    for i in range(3):
        for j in range(5):
            assert (float(gap.width[i, j]), float(gap.low[i, j]), float(gap.high[i, j])) == brute_gap(x[i, j].tolist())
    assert bool(((x > gap.threshold[..., None]).sum(-1) == 100).all())
    assert largest_gap(torch.tensor([2, 9, 4])).threshold == 6.5
    same = largest_gap(torch.full((4,), 7.0))
    assert [float(v) for v in same] == [0.0, 7.0, 7.0, 7.0]


@pytest.mark.parametrize(
    "x", [torch.ones(1), torch.tensor(1.0), torch.tensor([1.0, math.nan]), torch.tensor([0.0, math.inf])]
)
def test_what_has_no_gap_is_refused(x: Tensor) -> None:
    with pytest.raises(DataError):
        largest_gap(x)
