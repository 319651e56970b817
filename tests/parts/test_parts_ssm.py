"""State-space mixers and HiPPO: numbers of the authors' code, and one system whichever way it runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dovetail.errors import BuildError
from dovetail.parts.context import Context
from dovetail.parts.recurrent.hippo import Hippo, basis, diagonalised, transition
from dovetail.parts.recurrent.s4d import started
from dovetail.parts.state import Room
from dovetail.training.optim import adamw
from oracles import oracle_for
from parts.making import make

GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "state_space.safetensors")


def golden(case: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{case}."): t for n, t in GOLDEN.items() if n.startswith(f"{case}.")}


def check_golden(case: str, mixer: dict[str, Any]) -> None:
    """Outputs and gradients of the authors' layer with the same weights; and the same token by token."""
    want = golden(case)
    module = make("mixer", {"state": 8} | mixer, dtype=torch.float64, dim=3)
    module.load_state_dict({n.removeprefix("p."): t for n, t in want.items() if n.startswith("p.")})
    x = want["x"].clone().requires_grad_()
    y = module(x, plain(x))
    torch.testing.assert_close(y, want["y"], rtol=1e-9, atol=1e-9)
    grads = {n: t for n, t in want.items() if n.startswith("g.")}
    given = {f"g.{n}": p for n, p in module.named_parameters()} | {"g.x": x}
    found = torch.autograd.grad((y * want["w"]).sum(), [given[n] for n in grads])
    for name, ours in zip(grads, found, strict=True):
        torch.testing.assert_close(ours, grads[name], rtol=1e-8, atol=1e-8, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(
            stepped(module, x.detach(), [1] * 5 + [x.shape[1] - 5]), want["y"], rtol=1e-9, atol=1e-9
        )


def stepped(module: Any, x: Tensor, chunks: list[int]) -> Tensor:
    """The mixer fed in chunks, with a state."""
    state = module.new_state(Room(x.shape[0], x.shape[1], x.device, x.dtype))
    return torch.cat([module(part, plain(part), state) for part in x.split(chunks, 1)], 1)


def plain(x: Tensor) -> Context:
    return Context.of(x.shape[0], x.shape[1], x.device)


@oracle_for("mixer", "s4d")
@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("start", ["lin", "inv", "legs", "quad", "real"])
def test_s4d_is_the_authors(rule: str, start: str) -> None:
    check_golden(f"s4d.{rule}.{start}", {"kind": "s4d", "start": start, "discretise": rule})


def test_s4d_by_transforms_is_the_authors() -> None:
    check_golden("s4d.zoh.long", {"kind": "s4d", "start": "inv"})


@pytest.mark.parametrize("start", ["lin", "inv", "legs", "quad", "real"])
def test_s4d_starts_where_the_authors_do(start: str) -> None:
    """One of each pair: theirs has the other, and counts frequencies down for legs."""
    theirs = torch.view_as_complex(GOLDEN[f"start.{start}"].double())
    ours = started(start, 8)[0]
    torch.testing.assert_close(ours.imag.sort().values, -theirs.imag.sort(descending=True).values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.real.sort().values, theirs.real.sort().values, rtol=0, atol=1e-6)


@oracle_for("mixer", "s4")
@pytest.mark.parametrize("start", ["legs", "fourier"])
def test_s4_is_the_authors(start: str) -> None:
    check_golden(f"s4.{start}", {"kind": "s4"})


def test_s4_by_transforms_is_the_authors() -> None:
    check_golden("s4.long", {"kind": "s4"})


@oracle_for("mixer", "lssl")
@pytest.mark.parametrize("start", ["legs", "legt", "fourier"])
def test_lssl_is_its_recurrence(start: str) -> None:
    module = make("mixer", {"kind": "lssl", "start": start, "state": 6}, dtype=torch.float64, dim=3)
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    eye, found = torch.eye(6, dtype=torch.float64), torch.zeros_like(x)
    for h, dt in enumerate(module.log_dt.exp()):
        inverse, state = torch.linalg.inv(eye - dt / 2 * module.A), torch.zeros(2, 6, dtype=torch.float64)
        for t in range(9):
            state = state @ (inverse @ (eye + dt / 2 * module.A)).T + x[:, t, h, None] * (dt * inverse @ module.B)
            found[:, t, h] = state @ module.C[h] + module.D[h] * x[:, t, h]
    theirs = torch.nn.functional.glu(module.out(torch.nn.functional.gelu(found)), -1)
    torch.testing.assert_close(module(x, Context.of(2, 9, x.device)), theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["s4d", "s4", "lssl"])
@torch.no_grad()
def test_convolution_scan_and_steps_agree_in_fp32(kind: str) -> None:
    """To 1e-5 of the largest output, at a state of 64 and over 300 tokens."""
    module = make("mixer", {"kind": kind}, dim=8)
    x = torch.randn(2, 300, 8)
    whole = module(x, Context.of(2, 300, x.device))
    for chunks in ([300], [1] * 300, [130, 1, 169]):
        assert (stepped(module, x, chunks) - whole).abs().max() <= 1e-5 * whole.abs().max()


@torch.no_grad()
def test_a_state_keeps_the_law_that_it_goes_by() -> None:
    """Discretised once: later changes of the weights of A, B and dt are not seen, in snapshots neither."""
    module, x = make("mixer", {"kind": "s4"}, dim=4), torch.randn(1, 3, 4)
    states = [module.new_state(Room(1, 3, x.device, x.dtype)) for _ in range(2)]
    states[1] = states[1].snapshot()
    whole = module(x, plain(x))
    module.log_dt.add_(1.0)
    assert not torch.allclose(module(x, plain(x)), whole)
    for state in states:
        torch.testing.assert_close(torch.cat([module(t, plain(t), state) for t in x.split(1, 1)], 1), whole)


@pytest.mark.parametrize("kind", ["s4d", "s4", "lssl"])
def test_a_channel_drops_out_of_a_row_at_all_its_times(kind: str) -> None:
    torch.manual_seed(0)
    sure = make("mixer", {"kind": kind, "state": 4}, dtype=torch.float64, dim=8)
    chance = make("mixer", {"kind": kind, "state": 4, "dropout": 0.25}, dtype=torch.float64, dim=8)
    chance.load_state_dict(sure.state_dict())
    x, read = torch.randn(50, 6, 8, dtype=torch.float64), []
    for module in (sure, chance):
        module.out.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    with torch.no_grad():
        sure(x, plain(x)), chance.train()(x, plain(x))
        times = read[1] / read[0]
        torch.testing.assert_close(times, times[:, :1].expand_as(times))
        assert set(times[:, 0].mul(0.75).round(decimals=9).unique().tolist()) == {0.0, 1.0}
        assert (times[:, 0] == 0).double().mean().sub(0.25).abs() < 0.1 and 0 < (times[0, 0] == 0).sum() < 8
        torch.testing.assert_close(chance.eval()(x, plain(x)), sure(x, plain(x)))


@pytest.mark.parametrize("kind", ["s4d", "s4", "lssl"])
def test_long_packed_rows_are_convolved_by_document(kind: str) -> None:
    """Beyond the direct products: transforms of each document, gradients too."""
    module = make("mixer", {"kind": kind, "state": 4}, dtype=torch.float64, dim=3)
    x = torch.randn(1, 400, 3, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([0] * 150 + [1] * 200 + [-1] * 10 + [2] * 40)[None]
    packed = module(x, Context.of(1, 400, x.device, segments=segments))[:, segments[0] >= 0]
    alone = [x[:, segments[0] == n] for n in range(3)]
    apart = torch.cat([module(part, Context.of(1, part.shape[1], x.device)) for part in alone], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(apart)
    given = [x, *module.parameters()]
    for one, other in zip(*(torch.autograd.grad((y * weights).sum(), given) for y in (packed, apart)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("s4d", {"log_dt", "log_decay", "frequency", "B"}),
        ("s4", {"log_dt", "log_decay", "frequency", "P", "B"}),
        ("lssl", {"log_dt", "A", "B"}),
        ("mamba", {"A_log", "D"}),
    ],
)
def test_the_law_takes_no_weight_decay(kind: str, names: set[str]) -> None:
    module = make("mixer", {"kind": kind, "state": 4})
    optimizer = adamw(module, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    free = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    own = dict(module.named_parameters())
    assert all(id(own[name]) in free for name in names)
    assert any(id(p) not in free for p in own.values())


@pytest.mark.parametrize(
    ("mixer", "slot", "said"),
    [
        ({"kind": "s4d", "state": 5}, {}, "conjugate pairs"),
        ({"kind": "s4", "state": 5}, {}, "conjugate pairs"),
        ({"kind": "s4d", "dt_min": 0.2}, {}, "dt_min"),
        ({"kind": "s4d"}, {"memory_dim": 16}, "encoder"),
        ({"kind": "mamba"}, {"memory_dim": 16}, "encoder"),
        ({"kind": "mamba", "dt_min": 0.2}, {}, "dt_min"),
        ({"kind": "hippo"}, {"memory_dim": 16}, "encoder"),
    ],
)
def test_refusals(mixer: dict[str, Any], slot: dict[str, Any], said: str) -> None:
    with pytest.raises(BuildError, match=said) as refusal:
        make("mixer", mixer, **slot)
    assert refusal.value.remedy


@pytest.mark.parametrize("measure", ["legs", "legt", "fourier"])
def test_hippo_matrices_are_the_authors(measure: Any) -> None:
    """Their windows have length 2."""
    a, b = transition(measure, 8)
    scale = 1.0 if measure == "legs" else 0.5
    torch.testing.assert_close(scale * a, GOLDEN[f"hippo.{measure}.A"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scale * b, GOLDEN[f"hippo.{measure}.B"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("measure", ["legs", "fourier"])
def test_diagonal_plus_low_rank_is_the_matrix(measure: Any) -> None:
    eigen, p, b, v = diagonalised(measure, 64)
    a, given = transition(measure, 64)
    eigen, p, b = (torch.cat([t, t.conj()]) for t in (eigen, p, b))
    v = torch.cat([v, v.conj()], 1)
    whole = v @ (torch.diag(eigen) - p[:, None] * p.conj()) @ v.mH
    torch.testing.assert_close(whole, a.to(v.dtype), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(v @ b, given.to(v.dtype), rtol=1e-10, atol=1e-10)


def gauss(points: int = 24) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1] (Golub and Welsch 1969)."""
    n = torch.arange(1, points, dtype=torch.float64)
    off = n / (4 * n**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (nodes + 1) / 2, vectors[0] ** 2


@pytest.mark.parametrize("measure", ["legs", "lagt"])
def test_hippo_coefficients_are_the_projections(measure: Any) -> None:
    """Of a function that is constant between samples, exactly: ∫ f g_n under the measure, by quadrature."""
    T, order, window = 20, 7, 6.0 if measure == "lagt" else None
    f, (nodes, weights) = torch.randn(3, T, dtype=torch.float64), gauss()
    ours = Hippo(measure, order, window).coefficients(f)
    for k in (1, 2, 13, T):
        age = (k - (torch.arange(k)[:, None] + nodes)) / (window or k)  # (k, points)
        under = (torch.exp(-age) if window else torch.ones_like(age)) * weights / (window or k)
        g = basis(measure, order, age.flatten()).view(k, -1, order)
        exact = f[:, :k] @ (g * under[..., None]).sum(1)
        torch.testing.assert_close(ours[:, k - 1], exact, rtol=1e-9, atol=1e-9)


def test_hippo_legs_does_not_know_how_fast_time_runs() -> None:
    """Gu et al. 2020, proposition 3: a function drawn out twice has the same coefficients."""
    f = torch.randn(15, dtype=torch.float64)
    slow = Hippo("legs", 8).coefficients(f.repeat_interleave(2))[1::2]
    torch.testing.assert_close(slow, Hippo("legs", 8).coefficients(f), rtol=1e-10, atol=1e-10)


def error_of(f: Tensor, order: int) -> float:
    """Root mean square of f (T,) minus what its LegS coefficients give back."""
    hippo, T = Hippo("legs", order), len(f)
    back = hippo.reconstruct(hippo.coefficients(f)[-1], T - 0.5 - torch.arange(T), seen=T)
    return float((back - f).square().mean().sqrt())


def test_hippo_legs_errors_fall_as_the_theory_says() -> None:
    """Gu et al. 2020, proposition 6: O(N^-1/2) at least with one bounded derivative, faster than N^-4 with many."""
    t = (torch.arange(300, dtype=torch.float64) + 0.5) / 300
    kink, smooth = (2 * t - 1).abs(), (7 * t).sin()
    slope = math.log(error_of(kink, 32) / error_of(kink, 8)) / math.log(4)
    assert -2.5 < slope < -0.5
    assert error_of(smooth, 16) < 1e-3 < 16**-0.5 and error_of(smooth, 12) < error_of(smooth, 6) / 2**4


@pytest.mark.parametrize(("measure", "order", "bound"), [("legt", 12, 0.02), ("fourier", 32, 0.02), ("lagt", 40, 0.05)])
@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_hippo_gives_the_window_back(measure: Any, order: int, bound: float, rule: Any) -> None:
    """A wave whose period is half a window, after three windows; of lagt the last two e-folds."""
    w = 200
    t = torch.arange(3 * w + w // 3, dtype=torch.float64)
    f = (4 * math.pi * t / w).sin() if measure != "lagt" else (math.pi * t / w).sin()
    hippo, age = Hippo(measure, order, float(w), rule), torch.arange(10, w - 10) + 0.5
    back = hippo.reconstruct(hippo.coefficients(f)[-1], age)
    assert (back - f.flip(0)[10 : w - 10]).abs().max() < bound


def test_hippo_refusals() -> None:
    for wrong in (lambda: Hippo("legs", 8, 10.0), lambda: Hippo("legt", 8), lambda: transition("fourier", 7)):
        with pytest.raises(BuildError):
            wrong()
    with pytest.raises(BuildError, match="seen"):
        Hippo("legs", 4).reconstruct(torch.zeros(4, dtype=torch.float64), torch.ones(1))


@oracle_for("mixer", "hippo")
@pytest.mark.parametrize("order", [1, 5, 24])
def test_the_hippo_recurrence_is_its_formula(order: int) -> None:
    """Memory by the whole matrices of the operator, on a row longer than they are wide."""
    module = make("mixer", {"kind": "hippo", "hidden": 6, "order": order}, dtype=torch.float64, dim=3)
    x, hippo = torch.randn(2, 30, 3, dtype=torch.float64), Hippo("legs", order, discretise="bilinear")
    h, c, found = x.new_zeros(2, 6), x.new_zeros(2, order), []
    for t in range(30):
        f, inside, gate = module.read(x[:, t]).split([1, 6, 6], -1)
        a, b = hippo.matrices(t)
        c = c @ a.T + (f + h @ module.told.weight.T) * b
        inner, opened = (c @ module.recall.weight.T).split([6, 6], -1)
        g = torch.sigmoid(gate + opened)
        h = (1 - g) * h + g * torch.tanh(inside + inner)
        found.append(module.out(h))
    ours = module(x, Context.of(2, 30, x.device))
    torch.testing.assert_close(ours, torch.stack(found, 1), rtol=1e-9, atol=1e-9)
