"""The Poisson process: its draws, its fit, its tests and its logs, against scipy and against simulation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import Tensor

from dovetail.errors import DataError
from dovetail.stats import (
    Piecewise,
    PoissonProcess,
    arrival_counts,
    counts_test,
    dispersion_test,
    read_arrivals,
    read_numbers,
    times_test,
    waiting_times,
)
from dovetail.stats.tails import chi_square_cdf, chi_square_quantile, chi_square_tail, kolmogorov_tail, poisson_tail


def wave(t: Tensor) -> Tensor:
    return 20 * (1 + torch.sin(t / 3))


PROCESSES = {
    "constant": PoissonProcess(20.0),
    "pieces": PoissonProcess(Piecewise((0, 10, 25, 60), (5.0, 40.0, 0.5))),
    "wave": PoissonProcess(wave, bound=40.0),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_counts_of_disjoint_spans_are_poisson_and_do_not_know_of_each_other(name: str) -> None:
    process, edges = PROCESSES[name], torch.tensor([0.0, 3, 12, 31, 50])
    table = torch.stack(
        [arrival_counts(t[t < 50], edges) for t in (process.arrivals(60, seed) for seed in range(400))]
    ).double()
    mean = process.mean(edges).diff()
    error = (mean / 400).sqrt()
    assert bool(((table.mean(0) - mean).abs() < 4 * error).all())
    assert bool((table.var(0) / mean - 1).abs().max() < 4 * math.sqrt(2 / 399))
    assert bool((torch.corrcoef(table.T) - torch.eye(4)).abs().max() < 4 / math.sqrt(400))
    for column, m in zip(table.T, mean.tolist(), strict=True):
        assert counts_test(column.long(), m).p > 1e-3


@pytest.mark.parametrize("name", PROCESSES)
def test_times_given_their_number_are_uniform_in_the_mean(name: str) -> None:
    process = PROCESSES[name]
    ps = [times_test(process.arrivals(60, seed), 60, process).p for seed in range(1000, 1200)]
    assert stats.kstest(ps, "uniform").pvalue > 1e-3  # p-values are uniform where the hypothesis holds
    gone = [times_test(process.arrivals(60, seed), 60).p for seed in range(1000, 1010)]
    assert (max(gone) < 0.05) == (name != "constant")  # against a constant rate


def test_waiting_times_of_a_constant_rate_are_exponential() -> None:
    gaps = waiting_times(PROCESSES["constant"].arrivals(500, 3))
    assert stats.kstest(gaps.numpy(), "expon", args=(0, 1 / 20)).pvalue > 1e-3


def test_arrivals_are_those_of_the_seed_rise_and_stay_within() -> None:
    for process in PROCESSES.values():
        a, b = process.arrivals(60, 7), process.arrivals(60, 7)
        assert torch.equal(a, b)
        assert not torch.equal(a, process.arrivals(60, 8))
        assert a.dtype == torch.float64
        assert bool((a.diff() > 0).all())
        assert float(a[0]) > 0
        assert float(a[-1]) < 60
    assert len(PoissonProcess(0.0).arrivals(10, 0)) == 0
    assert not len(PoissonProcess(Piecewise((0, 1), (0.0,))).arrivals(10, 0))


@pytest.mark.parametrize("name", PROCESSES)
def test_means_are_integrals_and_likelihoods_those_of_the_formula(name: str) -> None:
    process = PROCESSES[name]
    rate = process.rate if callable(process.rate) else (lambda t: torch.full_like(t, 20.0))
    at = torch.tensor([0.0, 0.7, 10.0, 10.5, 24.9, 44.0, 60.0], dtype=torch.float64)

    def one(t: float) -> float:
        return float(rate(torch.tensor([t], dtype=torch.float64))[0])

    want = [
        integrate.quad(one, 0, t, points=[p for p in (10, 25) if p < t] or None, epsabs=1e-11)[0] for t in at.tolist()
    ]
    torch.testing.assert_close(process.mean(at), torch.tensor(want, dtype=torch.float64), rtol=1e-11, atol=1e-10)
    times = process.arrivals(60, 1)
    likelihood = sum(math.log(one(t)) for t in times.tolist()) - want[-1]
    assert process.log_likelihood(times, 60) == pytest.approx(likelihood, rel=1e-11)
    n = torch.tensor([3, 250, 4, 300, 60, 2])
    log_p = stats.poisson.logpmf(n.numpy(), process.mean(at).diff().numpy())
    torch.testing.assert_close(process.count_log_probability(n, at), torch.from_numpy(log_p), rtol=1e-10, atol=1e-10)


def test_processes_refuse_rates_that_are_none() -> None:
    for make in (
        lambda: PoissonProcess(-1.0),
        lambda: PoissonProcess(math.nan),
        lambda: PoissonProcess(wave),
        lambda: PoissonProcess(3.0, bound=4.0),
        lambda: PoissonProcess(wave, bound=30.0).arrivals(60, 0),
        lambda: PoissonProcess(lambda t: t - 5, bound=100.0).arrivals(60, 0),
        lambda: PoissonProcess(lambda t: torch.ones(1), bound=100.0).arrivals(60, 0),
        lambda: PoissonProcess(1e9).arrivals(60, 0),
        lambda: PoissonProcess(1.0).arrivals(-1, 0),
        lambda: Piecewise((0, 1, 1), (1.0, 2.0)),
        lambda: Piecewise((0, 1), (-2.0,)),
        lambda: Piecewise((0, 1), (2.0, 3.0)),
        lambda: PoissonProcess(1.0).mean(torch.tensor([-1.0])),
        lambda: arrival_counts(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 5.0])),
        lambda: arrival_counts(torch.tensor([1.0]), torch.tensor([5.0, 0.0])),
        lambda: PoissonProcess.fit(torch.ones(3)),
        lambda: PoissonProcess.fit(torch.ones(3), 1.0),
        lambda: PoissonProcess.fit(torch.ones(3), 2.0, confidence=1.0),
        lambda: PoissonProcess.fit(torch.ones(3), 2.0, edges=torch.tensor([0.0, 2.0])),
    ):
        with pytest.raises(DataError):
            make()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5000), st.floats(0.1, 1e4), st.floats(0.5, 0.999))
def test_intervals_are_garwoods(n: int, duration: float, confidence: float) -> None:
    times = torch.rand(n, dtype=torch.float64) * duration * 0.999
    fit = PoissonProcess.fit(times, duration, confidence=confidence)
    miss = (1 - confidence) / 2
    low = stats.chi2.ppf(miss, 2 * n) / 2 / duration if n else 0.0
    high = stats.chi2.ppf(1 - miss, 2 * n + 2) / 2 / duration
    assert float(fit.low) == pytest.approx(low, rel=1e-9)
    assert float(fit.high) == pytest.approx(high, rel=1e-9)
    assert fit.process.rate == pytest.approx(n / duration)
    assert fit.counts.tolist() == [n]
    # Garwood's equations themselves: the tails at the ends are what is missed.
    assert float(poisson_tail(n, high * duration)) == pytest.approx(
        1 - stats.poisson.cdf(n - 1, high * duration), rel=1e-9
    )
    assert 1 - float(poisson_tail(n + 1, float(fit.high) * duration)) == pytest.approx(miss, rel=1e-6)


def test_intervals_cover_the_rate_as_often_as_they_say() -> None:
    process, level = PoissonProcess(2.0), 0.9
    drawn = [process.arrivals(6, s) for s in range(400)]
    fits = {len(t): PoissonProcess.fit(t, 6, confidence=level) for t in drawn}  # one for each count
    covered = sum(bool(fits[len(t)].low <= 2 <= fits[len(t)].high) for t in drawn) / 400
    exact = sum(
        stats.poisson.pmf(n, 12) for n in range(30)
        if (stats.chi2.ppf(0.05, 2 * n) / 12 if n else 0) <= 2 <= stats.chi2.ppf(0.95, 2 * n + 2) / 12
    )  # fmt: skip
    assert exact >= level
    assert covered == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 400))


def test_without_a_duration_the_watch_is_from_the_first_arrival_to_the_last() -> None:
    process, covered = PoissonProcess(3.0), 0
    for seed in range(300):
        times = process.arrivals(20, seed)[:12] + 1e9  # watched until the 12th came
        fit = PoissonProcess.fit(times[torch.randperm(12)], confidence=0.8)
        span = float(times[-1] - times[0])
        assert float(fit.low) == pytest.approx(stats.gamma.ppf(0.1, 11) / span, rel=1e-9)
        assert float(fit.rates) == pytest.approx(11 / span)
        covered += float(fit.low) <= 3 <= float(fit.high)
    assert covered / 300 == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / 300))


def test_a_rate_in_pieces_is_found_again_with_an_interval_for_each() -> None:
    process, edges = PROCESSES["pieces"], torch.tensor([0.0, 10, 25, 60])
    fit = PoissonProcess.fit(process.arrivals(60, 5), edges=edges, confidence=0.999)
    truth = torch.tensor([5.0, 40.0, 0.5], dtype=torch.float64)
    assert bool(((fit.low <= truth) & (truth <= fit.high)).all())
    assert isinstance(fit.process.rate, Piecewise)
    assert fit.process.arrivals(60, 1).shape[0] == pytest.approx(int(fit.counts.sum()), abs=5 * math.sqrt(700))


@pytest.mark.parametrize("degrees", [1e-3, 1.0, 2.0, 7.0, 100.0, 5e5])
def test_tails_are_those_of_scipy(degrees: float) -> None:
    p = torch.tensor([1e-12, 1e-4, 0.3, 0.5, 0.9, 1 - 1e-10], dtype=torch.float64)
    x = chi_square_quantile(p, degrees)
    want = torch.from_numpy(stats.chi2.ppf(p.numpy(), degrees))
    keep = want > 1e-290
    torch.testing.assert_close(x[keep], want[keep], rtol=1e-6 if degrees < 1 else 1e-8, atol=0)
    at = torch.tensor([0.1, 1.0, 3.0, 90.0, 5e5, 5.02e5], dtype=torch.float64)
    torch.testing.assert_close(
        chi_square_cdf(at, degrees), torch.from_numpy(stats.chi2.cdf(at.numpy(), degrees)), rtol=1e-8, atol=1e-300
    )
    torch.testing.assert_close(
        chi_square_tail(at, degrees), torch.from_numpy(stats.chi2.sf(at.numpy(), degrees)), rtol=1e-8, atol=1e-300
    )
    with pytest.raises(DataError):
        chi_square_quantile(1.0, degrees)


@pytest.mark.parametrize(
    ("n", "off"), [(1, 1e-11), (2, 1e-11), (5, 1e-11), (30, 1e-11), (140, 1e-11), (1000, 1e-6), (50_000, 1e-5)]
)
def test_kolmogorov_is_that_of_scipy_which_is_exact_up_to_140(n: int, off: float) -> None:
    for x in (0.3, 0.5, 0.8, 1.0, 1.36, 1.8, 2.5):
        d = x / math.sqrt(n)
        assert kolmogorov_tail(d, n) == pytest.approx(float(stats.kstwo.sf(d, n)), abs=off)


def test_the_statistics_are_those_of_scipy() -> None:
    times = PROCESSES["constant"].arrivals(30, 2)
    ours, theirs = times_test(times, 30), stats.kstest(times.numpy() / 30, "uniform")
    assert ours.statistic == pytest.approx(theirs.statistic, rel=1e-12)
    assert ours.p == pytest.approx(theirs.pvalue, abs=2e-5)
    inner = ((times - times[0]) / (times[-1] - times[0]))[1:-1]
    assert times_test(times).statistic == pytest.approx(stats.kstest(inner.numpy(), "uniform").statistic, rel=1e-12)

    n = arrival_counts(times, torch.linspace(0, 30, 31))
    ours, theirs = dispersion_test(n), stats.chisquare(n.numpy())
    assert ours.statistic == pytest.approx(theirs.statistic, rel=1e-12)
    assert ours.p == pytest.approx(2 * min(theirs.pvalue, 1 - theirs.pvalue), rel=1e-9)
    assert ours.degrees == 29


def test_counts_are_joined_into_classes_as_expected_and_agree_with_scipy() -> None:
    n = torch.tensor([0] * 14 + [1] * 25 + [2] * 28 + [3] * 17 + [4] * 10 + [5] * 4 + [7] * 2)
    mean = float(n.double().mean())
    expected = [*(100 * stats.poisson.pmf(range(5), mean)), 100 * stats.poisson.sf(4, mean)]  # the last: 5 and more
    seen = [14, 25, 28, 17, 10, 6]
    ours, theirs = counts_test(n), stats.chisquare(seen, expected, ddof=1)
    assert ours.degrees == 4
    assert ours.statistic == pytest.approx(theirs.statistic, rel=1e-9)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9)


def test_bunches_and_combs_are_told_from_a_poisson_process() -> None:
    edges = torch.linspace(0, 200, 101)
    rng = torch.Generator().manual_seed(0)
    parents = PoissonProcess(1.0).arrivals(199, 0)
    bunched = (parents[:, None] + 0.2 * torch.rand(len(parents), 10, generator=rng)).flatten()
    comb = torch.arange(0.05, 200, 0.1) + 0.01 * torch.rand(2000, generator=rng)
    for times, above in ((bunched, True), (comb, False)):
        n = arrival_counts(times, edges)
        found = dispersion_test(n)
        assert found.p < 1e-6
        assert found.degrees is not None
        assert (found.statistic / found.degrees > 1) == above
        assert counts_test(n).p < 1e-6
    ps = [dispersion_test(arrival_counts(PoissonProcess(10.0).arrivals(200, s), edges)).p for s in range(200)]
    assert stats.kstest(ps, "uniform").pvalue > 1e-3


def test_tests_refuse_what_says_nothing() -> None:
    for make in (
        lambda: dispersion_test(torch.tensor([3])),
        lambda: dispersion_test(torch.zeros(5)),
        lambda: dispersion_test(torch.tensor([1.5, 2.0])),
        lambda: counts_test(torch.tensor([3, 4, 5])),
        lambda: counts_test(torch.tensor([3, 4, 5]), -1.0),
        lambda: times_test(torch.empty(0), 5.0),
        lambda: times_test(torch.tensor([1.0, 2.0])),
        lambda: times_test(torch.tensor([1.0, 2.0, 3.0]), None, PoissonProcess(1.0)),
        lambda: times_test(torch.tensor([1.0, 2.0, 3.0]), 5.0, PoissonProcess(0.0)),
        lambda: times_test(torch.tensor([1.0, 2.0, 3.0]), 3.0),
        lambda: waiting_times(torch.tensor([1.0, math.nan])),
    ):
        with pytest.raises(DataError):
            make()


def test_logs_are_read_however_they_are_written(tmp_path: Path) -> None:
    times = PROCESSES["constant"].arrivals(5, 0)
    plain, lines, dates = tmp_path / "t.txt", tmp_path / "t.jsonl", tmp_path / "d.txt"
    plain.write_text("".join(f"{t!r}\n" for t in reversed(times.tolist())))
    lines.write_text("".join(json.dumps({"id": i, "at": t}) + "\n" for i, t in enumerate(times.tolist())))
    dates.write_text("2026-11-22T09:30:00.25Z\n2026-11-22T10:30:00+01:00\n2026-11-22 09:30:01\n")
    assert torch.equal(read_arrivals(plain), times)
    assert torch.equal(read_numbers(plain), times.flip(0))
    assert torch.equal(read_arrivals(lines, "at"), times)
    assert (read_arrivals(dates) - 1795339800).tolist() == [0.0, 0.25, 1.0]


@pytest.mark.parametrize(
    ("text", "field", "said"),
    [
        ("1\nx\n", None, "line 2"),
        ("1\n\n2\n", None, "line 2"),
        ("1\nnan\n", None, "line 2"),
        ("", None, "nothing"),
        ("1\n2026-11-22T09:30:00Z\n", None, "numbers and dates"),
        ("2026-13-22T09:30:00Z\n", None, "line 1"),
        ('{"a": 1}\n', "t", "no field"),
        ('{"t": true}\n', "t", "line 1"),
        ('{"t": 1}\nnot json\n', "t", "line 2"),
        ("[1]\n", "t", "no field"),
    ],
)
def test_a_log_that_cannot_be_read_says_where(tmp_path: Path, text: str, field: str | None, said: str) -> None:
    path = tmp_path / "log"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        read_arrivals(path, field)


def test_a_log_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        read_arrivals(tmp_path / "none")
    (tmp_path / "b").write_bytes(b"\xff\xfe1")
    with pytest.raises(DataError, match="UTF-8"):
        read_numbers(tmp_path / "b")
