"""Running means, step sizes, Robbins-Monro and its kin, calibration, the KL controller: against formulas and peers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from torch import Tensor

from dovetail.errors import DataError, RunError
from dovetail.stats import (
    AdaptiveKL,
    Geometric,
    Power,
    RunningMean,
    calibrate_temperature,
    calibrate_temperature_online,
    constant,
    dvoretzky_conditions,
    harmonic,
    iterates,
    kiefer_wolfowitz,
    kiefer_wolfowitz_conditions,
    robbins_monro,
    robbins_monro_conditions,
    sgd,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-1000, 1000), st.integers(0, 50)), min_size=1, max_size=30))
def test_the_running_mean_is_the_weighted_mean_in_exact_arithmetic(pairs: list[tuple[int, int]]) -> None:
    plain, weighted, summed = RunningMean(), RunningMean(), RunningMean()
    for value, weight in pairs:
        plain.update(value)
        weighted.update(float(value), float(weight))
        summed.update_sum(torch.tensor(value * weight), torch.tensor(weight))
    mean = float(Fraction(sum(v for v, _ in pairs), len(pairs)))
    assert float(plain.mean) == pytest.approx(mean, rel=1e-13, abs=1e-11)
    total = sum(w for _, w in pairs)
    mean = float(Fraction(sum(v * w for v, w in pairs), total)) if total else math.nan
    for running in (weighted, summed):
        assert float(running.mean) == pytest.approx(mean, rel=1e-13, abs=1e-11, nan_ok=True)
        assert float(running.weight) == total


def test_a_mean_far_from_zero_does_not_lose_its_digits() -> None:
    running = RunningMean()
    values = torch.rand(5_000, dtype=torch.float64) + 1e9
    for value in values:
        running.update(value)
    exact = float(sum(map(Fraction, values.tolist()), Fraction(0)) / len(values))
    assert float(running.mean) == pytest.approx(exact, rel=1e-14)


def test_a_constant_step_is_an_exponential_moving_average() -> None:
    x = torch.randn(40, 3)
    running, want = RunningMean(constant(0.1)), x[0].clone()
    running.update(x[0])
    for row in x[1:]:
        want.lerp_(row, 0.1)
        torch.testing.assert_close(running.update(row), want)
    assert running.updates == 40


def test_halves_are_kept_in_float32_and_gradients_are_dropped() -> None:
    running = RunningMean()
    for _ in range(1000):
        running.update(torch.full((2,), 1.0078125, dtype=torch.bfloat16, requires_grad=True))
    assert running.mean.dtype == torch.float32
    assert not running.mean.requires_grad
    assert running.mean.tolist() == [1.0078125, 1.0078125]


def test_means_refuse_what_has_no_meaning() -> None:
    with pytest.raises(DataError, match="nothing came"):
        _ = RunningMean().mean
    running = RunningMean()
    running.update(torch.ones(2))
    with pytest.raises(DataError, match="shape"):
        running.update(torch.ones(3))
    with pytest.raises(DataError, match="weight beside"):
        RunningMean(constant(0.1)).update(1.0, 2.0)
    with pytest.raises(DataError, match="sum beside"):
        RunningMean(constant(0.1)).update_sum(1.0, 2)


@pytest.mark.parametrize(
    ("steps", "diverges", "squares"),
    [
        (harmonic(3.0, 10), True, True),
        (Power(1, 0.75), True, True),
        (Power(1, 0.5), True, False),
        (Power(1, 0.51), True, True),
        (Power(1, 1.01), False, True),
        (constant(0.1), True, False),
        (constant(0.0), False, True),
        (Geometric(1, 0.99), False, True),
        (Geometric(1, 1.0), True, False),
        (Power(1, -1), True, False),
        (lambda n: 1 / n, None, None),
    ],
)
def test_robbins_monro_conditions(steps: object, diverges: bool | None, squares: bool | None) -> None:
    verdict = robbins_monro_conditions(steps)  # type: ignore[arg-type]
    assert [c.holds for c in verdict.conditions] == [diverges, squares]
    assert verdict.holds is (None if diverges is None else diverges and squares)
    assert ("unknown" in str(verdict)) == (diverges is None)
    if isinstance(steps, (Power, Geometric)):  # sums over a far stretch go the way that is claimed
        far = sum(steps(n) for n in range(10_000, 20_000)), sum(steps(n) for n in range(1000, 2000))
        assert diverges is (far[0] > 0.99 * far[1])


def test_conditions_of_kiefer_wolfowitz_and_dvoretzky() -> None:
    assert kiefer_wolfowitz_conditions(harmonic(), Power(1, 0.25)).holds is True
    failing = [c.text for c in kiefer_wolfowitz_conditions(harmonic(), Power(1, 0.5)).conditions if not c.holds]
    assert failing == ["Σ a_n² / c_n² < ∞"]  # 1/n² over 1/n
    failing = [c.text for c in kiefer_wolfowitz_conditions(harmonic(), constant(0.1)).conditions if not c.holds]
    assert failing == ["c_n -> 0", "Σ a_n c_n < ∞"]
    assert kiefer_wolfowitz_conditions(harmonic(), lambda n: 1 / n).holds is None
    a = Power(1, 0.75)
    assert dvoretzky_conditions(Power(1, 0.2), constant(0), Power(1, 0.95), Power(1, 1.5)).holds is True
    assert dvoretzky_conditions(Power(1, 0.3), constant(0), Power(1, 1.05), Power(1, 1.5)).holds is False
    assert dvoretzky_conditions(Power(1, 0.2), lambda n: 0.0, a, Power(1, 1.5)).holds is None
    assert dvoretzky_conditions(Power(1, 0.2), lambda n: 0.0, a, a).holds is False  # one that fails is enough
    with pytest.raises(DataError, match="zeros"):
        kiefer_wolfowitz_conditions(harmonic(), constant(0))


@pytest.mark.parametrize("bad", [{"shift": -1.0}, {"scale": -1.0}, {"power": math.nan}])
def test_families_refuse_what_gives_no_step_sizes(bad: dict[str, float]) -> None:
    with pytest.raises(DataError):
        Power(**bad)
    with pytest.raises(DataError):
        Geometric(1.0, -0.5)


def test_a_running_mean_is_robbins_monro_with_steps_of_one_over_n() -> None:
    draws = torch.randn(50, 4, dtype=torch.float64)
    running, rows = RunningMean(), iter(draws)
    found = robbins_monro(lambda x: x - next(rows), 0.0, torch.zeros(4, dtype=torch.float64), harmonic(), iterations=50)
    for row in draws:
        running.update(row)
    torch.testing.assert_close(found.last, running.mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.last, draws.mean(0), rtol=0, atol=1e-14)


def test_the_root_of_a_noisy_function_is_found_within_its_asymptotic_deviation() -> None:
    """a_n = 1 / (slope n) has n Var[x_n] -> σ² / slope²; so does the average of n^−2/3. 400 problems at once."""
    rng = torch.Generator().manual_seed(1)
    n, sigma, root = 2000, 0.5, math.log(3) / 2  # tanh(x) = 1/2
    slope = 1 - 0.25

    def noisy(x: Tensor) -> Tensor:
        return x.tanh() + sigma * torch.randn(x.shape, generator=rng, dtype=x.dtype)

    start = torch.zeros(400, dtype=torch.float64)
    best = robbins_monro(noisy, 0.5, start, harmonic(1 / slope), iterations=n)
    slow = robbins_monro(noisy, 0.5, start, Power(1 / slope, 2 / 3), iterations=n, burn_in=n // 4)
    want = sigma / slope / math.sqrt(n)
    for found, kept in ((best.last, n), (slow.average, 3 * n // 4)):
        deviation = want * math.sqrt(n / kept)
        assert abs(float((found - root).square().mean().sqrt()) / deviation - 1) < 0.15
        assert abs(float((found - root).mean())) < 5 * deviation / 20
    assert float((slow.last - root).std()) > 2 * want  # what averaging is for


def test_sgd_is_robbins_monro_and_torch_sgd_step_for_step() -> None:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 5, generator=rng, dtype=torch.float64)
    y = rows @ torch.arange(5.0, dtype=torch.float64) + 0.1 * torch.randn(60, generator=rng, dtype=torch.float64)
    steps = harmonic(0.5, 10)

    def draws() -> object:
        order = iter(range(60))

        def gradient(w: Tensor) -> Tensor:
            i = next(order)
            return (rows[i] @ w - y[i]) * rows[i]

        return gradient

    start = torch.zeros(5, dtype=torch.float64)
    w = torch.nn.Parameter(start.clone())
    optimiser = torch.optim.SGD([w], lr=1.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda done: steps(done + 1))
    path = iterates(draws(), start, steps)  # type: ignore[arg-type]
    for i in range(60):
        optimiser.zero_grad()
        (0.5 * (rows[i] @ w - y[i]) ** 2).backward()
        optimiser.step()
        rate.step()
        torch.testing.assert_close(next(path), w.detach(), rtol=0, atol=1e-13)
    a = sgd(draws(), start, steps, iterations=60, burn_in=10)  # type: ignore[arg-type]
    b = robbins_monro(draws(), 0.0, start, steps, iterations=60, burn_in=10)  # type: ignore[arg-type]
    assert torch.equal(a.last, b.last)
    assert torch.equal(a.average, b.average)
    torch.testing.assert_close(a.last, w.detach(), rtol=0, atol=1e-13)


def test_kiefer_wolfowitz_finds_a_minimum_from_noisy_values() -> None:
    rng = torch.Generator().manual_seed(2)
    at = torch.tensor([1.0, -0.5], dtype=torch.float64)

    def noisy(x: Tensor) -> Tensor:
        bowl = ((x - at) ** 2 * torch.tensor([1.0, 2.0])).sum() + 0.1 * (x - at).sum() ** 2
        return bowl + 0.05 * torch.randn((), generator=rng, dtype=torch.float64)

    calls = kiefer_wolfowitz(noisy, torch.zeros(2), harmonic(0.5, 5), Power(1, 0.25), iterations=800)
    assert float((calls.last - at).abs().max()) < 0.05
    single = kiefer_wolfowitz(lambda x: (x - 3) ** 2, 0.0, harmonic(0.5), Power(1, 0.25), iterations=50)
    assert float(single.last) == pytest.approx(3.0, abs=1e-12)  # of a parabola differences are exact
    with pytest.raises(DataError, match="no width"):
        kiefer_wolfowitz(noisy, torch.zeros(2), harmonic(), constant(0), iterations=2)


def test_iterations_refuse_what_leads_nowhere() -> None:
    with pytest.raises(RunError, match="step"):
        robbins_monro(lambda x: 1e200 * x, 0.0, 1.0, constant(1e200), iterations=5)
    with pytest.raises(DataError, match="step size 2"):
        robbins_monro(lambda x: x, 0.0, 1.0, lambda n: 1.0 if n == 1 else -1.0, iterations=5)
    with pytest.raises(DataError, match="shape"):
        robbins_monro(lambda x: x.sum(), 0.0, torch.ones(2), constant(0.1))
    with pytest.raises(DataError, match="average"):
        robbins_monro(lambda x: x, 0.0, 1.0, constant(0.1), iterations=5, burn_in=5)


def classified(n: int, k: int, temperature: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labels drawn from softmax(z), and z · temperature: the best temperature is about that."""
    rng = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(n, k, generator=rng, dtype=torch.float64)
    return z * temperature, torch.multinomial(z.softmax(-1), 1, generator=rng)[:, 0]


@pytest.mark.parametrize(("k", "temperature"), [(2, 0.02), (5, 1.0), (10, 3.0), (4, 500.0)])
def test_the_temperature_is_that_of_scipy_and_makes_the_slope_zero(k: int, temperature: float) -> None:
    logits, labels = classified(3000, k, temperature)

    def nats(log_t: float) -> float:
        return -float(log_softmax(logits.numpy() / math.exp(log_t), -1)[range(3000), labels.numpy()].mean())

    found = calibrate_temperature(logits.view(30, 100, k), labels.view(30, 100))
    near = math.log(temperature)
    want = minimize_scalar(nats, bounds=(near - 2, near + 2), method="bounded", options={"xatol": 1e-9})
    assert found.after == pytest.approx(want.fun, rel=1e-10)
    assert found.before == pytest.approx(nats(0.0), rel=1e-10)
    assert math.log(found.temperature) == pytest.approx(want.x, abs=1e-5)
    assert found.temperature == pytest.approx(temperature, rel=0.1)
    t = torch.tensor(found.temperature, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits / t, labels), t)
    assert abs(float(slope) * temperature) < 1e-12
    assert calibrate_temperature(logits / found.temperature, labels).temperature == pytest.approx(1.0, abs=1e-9)


def test_excluded_classes_do_not_matter() -> None:
    logits, labels = classified(500, 4, 2.0)
    wide = torch.cat([logits, torch.full((500, 3), -math.inf)], -1)
    assert calibrate_temperature(wide, labels) == calibrate_temperature(logits, labels)


def test_batches_lead_to_the_same_temperature() -> None:
    logits, labels = classified(40_000, 5, 3.0)
    whole = calibrate_temperature(logits, labels).temperature
    batches = list(zip(logits.split(100), labels.split(100), strict=True))
    for start in (1.0, 20.0):
        online = calibrate_temperature_online(batches, harmonic(), start=start)
        assert math.log(online / whole) == pytest.approx(0, abs=0.03)
    with pytest.raises(DataError, match="no batch"):
        calibrate_temperature_online([], harmonic())


def test_calibration_refuses_what_has_no_best_temperature() -> None:
    z, y = classified(50, 3, 1.0)
    for logits, labels, said in (
        (z, z.argmax(-1), "temperature is 0"),
        (z, z.argmin(-1), "infinite"),
        (torch.zeros(50, 3), y, "infinite"),
        (z, y[:-1], "shape"),
        (z, y.double(), "type"),
        (z, torch.full_like(y, -100), "label"),
        (z, torch.full_like(y, 3), "label"),
        (z.masked_fill(z > 3, math.nan), y, "NaN"),
        (z.scatter(1, y[:, None], -math.inf), y, "inf"),
    ):
        with pytest.raises(DataError, match=said):
            calibrate_temperature(logits, labels)


def test_the_kl_controller_follows_the_formula_and_finds_the_coefficient() -> None:
    control = AdaptiveKL(0.2, target=6.0)
    assert control.update(6.6) == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    assert control.update(60.0) == pytest.approx(0.2 * 1.01 * 1.02)  # clipped
    assert control.update(-1.0) == pytest.approx(0.2 * 1.01 * 1.02 * 0.98)
    rng = torch.Generator().manual_seed(0)
    control = AdaptiveKL(5.0, target=2.0)  # of a policy whose KL is 1/β, seen through noise, the root is 1/2
    found = [control.update(1 / control.coefficient + 0.3 * float(torch.randn((), generator=rng))) for _ in range(600)]
    assert sum(found[300:]) / 300 == pytest.approx(0.5, rel=0.05)
    with pytest.raises(DataError, match="KL"):
        control.update(math.nan)
    for bad in ({"target": 0.0}, {"target": 1.0, "gain": 10.0}, {"start": -1.0, "target": 1.0}):
        with pytest.raises(DataError):
            AdaptiveKL(**bad)
