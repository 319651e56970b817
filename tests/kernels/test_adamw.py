"""AdamW's step in one pass against torch.optim.AdamW in fp64, and the optimiser that takes it.

The kernel runs on a GPU, else interpreted, where fp16 stands for bf16; bench/adamw.py checks bf16.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dovetail.kernels import adamw, counted, twins
from dovetail.kernels.adamw import Row, plan, reference, step_
from dovetail.kernels.installed import TRITON
from dovetail.training.optim import AdamW, set_rate, update

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NARROW = torch.bfloat16 if GPU else torch.float16
BETAS, EPS = (0.9, 0.999), 1e-8


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The plan of a GPU for tensors of 16 entries or more; the sizes of what the kernel has stepped."""
    pytest.importorskip("triton")
    from dovetail.kernels.adamw import triton

    sizes, launch = list[int](), triton.step_
    monkeypatch.setattr(triton, "step_", lambda row, *more: (sizes.append(row.weight.numel()), launch(row, *more)))
    monkeypatch.setattr(counted, "_for", "cuda")
    monkeypatch.setattr(adamw, "LEAST", 16)
    return sizes


def made(size: int, dtype: torch.dtype, count: int) -> Row:
    """Of weights whose moments have been there for `count` steps."""
    weight, gradient, m = (torch.randn(size, device=DEVICE).to(dtype) for _ in range(3))
    v = (torch.rand(size, device=DEVICE) + 0.1).to(dtype)
    return Row(weight, gradient, m, v, torch.tensor(float(count), device=DEVICE))


def truth(row: Row, lr: float, betas: tuple[float, float], decay: float, divisor: float = 1.0) -> list[Tensor]:
    """Weight and moments after torch's step in fp64."""
    weight = nn.Parameter(row.weight.double())
    weight.grad = row.gradient.double() / divisor
    theirs = torch.optim.AdamW([weight], lr=lr, betas=betas, eps=EPS, weight_decay=decay, foreach=False, fused=False)
    theirs.state[weight] = {
        "step": row.count.double().cpu(), "exp_avg": row.exp_avg.double(), "exp_avg_sq": row.exp_avg_sq.double(),
    }  # fmt: skip
    theirs.step()
    state = theirs.state[weight]
    return [weight.detach(), state["exp_avg"], state["exp_avg_sq"]]


@pytest.mark.usefixtures("stepped")
@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
@pytest.mark.parametrize(
    ("size", "count", "lr", "decay", "divisor"),
    [
        (1024, 0, 1e-3, 0.0, None), (16, 1, 0.5, 0.1, 3.7), (3 * 1024 + 48, 499, 1e-2, 0.3, None),
        (1040, 10_000, torch.tensor(0.25, device=DEVICE), 0.1, 1.5), (1040, 2**24 - 2, torch.tensor(1.0), 0.0, None),
    ],
)  # fmt: skip
def test_a_step_is_torchs(dtype: torch.dtype, size: int, count: int, lr: Any, decay: float, divisor: Any) -> None:
    """Each number within one rounding of fp64's, beside fp32's own; early and late, rates on the device and on the host."""
    row = made(size, dtype, count)
    wanted = truth(row, float(lr), BETAS, decay, divisor or 1.0)
    gradient, twin = row.gradient.clone(), [t.clone() for t in row]
    by = None if divisor is None else torch.tensor(divisor, device=DEVICE)
    how: dict[str, Any] = {"lr": lr, "betas": BETAS, "eps": EPS, "weight_decay": decay, "divisor": by}
    assert step_([row], **how) == []
    assert float(row.count) == count + 1 and torch.equal(row.gradient, gradient)
    reference.step_(*twin[:4], row.count, **how)
    unit = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
    for found, plain, exact in zip(
        (row.weight, row.exp_avg, row.exp_avg_sq), (twin[0], *twin[2:4]), wanted, strict=True
    ):
        for each in (found, plain):
            assert (
                (each.double() - exact).abs() <= 1.01 * unit * exact.abs() + 1e-6 * exact.abs().clamp_min(1.0)
            ).all()


@pytest.mark.usefixtures("stepped")
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.95, 0.999, 1 - 1e-6])
def test_bias_corrections_are_exact(beta: float) -> None:
    """Moments that stay at 1 move a weight by what their corrections say, from the first step to the millionth."""
    for count in (0, 1, 6, 100, 10**6):
        row = made(16, torch.float32, count)
        row.weight.zero_()
        for t in (row.gradient, row.exp_avg, row.exp_avg_sq):
            t.fill_(1.0)
        step_([row], lr=1.0, betas=(beta, beta), eps=1e-30, weight_decay=0.0)
        missing = -math.expm1((count + 1) * math.log(beta)) if beta else 1.0
        torch.testing.assert_close(row.weight, torch.full_like(row.weight, -1 / math.sqrt(missing)), rtol=5e-7, atol=0)


@pytest.mark.usefixtures("stepped")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite() -> None:
    """As torch: a NaN or infinite gradient spoils its own weight alone; moments that are full stop theirs."""
    row = made(16, torch.float32, 3)
    row.gradient[:2] = torch.tensor([math.nan, math.inf])
    row.exp_avg_sq[2] = math.inf
    wanted = truth(row, 0.1, BETAS, 0.1)
    step_([row], lr=0.1, betas=BETAS, eps=EPS, weight_decay=0.1)
    for found, exact in zip((row.weight, row.exp_avg, row.exp_avg_sq), wanted, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """Two that the kernel serves, one too small, one whose size 16 does not divide, one of fp64, one with its sides swapped."""
    shapes = [(8, 40), (64,), (3,), (7, 5)]
    found = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
    found += [torch.randn(4, 8, device=DEVICE).double(), torch.randn(4, 8, device=DEVICE).to(dtype).T]
    return [nn.Parameter(t) for t in found]


def grouped(cls: Any, held: list[nn.Parameter], **more: Any) -> torch.optim.AdamW:
    listed = [{"params": held[::2], "weight_decay": 0.1, "peak": 0.02}, {"params": held[1::2], "weight_decay": 0.0, "peak": 0.01}]  # fmt: skip
    return cls(listed, lr=0.01, betas=(0.9, 0.95), eps=EPS, **more)


def walk(optimizer: torch.optim.AdamW, held: list[nn.Parameter], start: int, stop: int, limit: float) -> None:
    """Steps whose gradients and rates are those of their number."""
    for step in range(start, stop):
        made_by = torch.Generator().manual_seed(step)
        set_rate(optimizer, 1.0 / (1 + step))
        for p in held:
            drawn = torch.randn(p.shape, generator=made_by, dtype=torch.float64)
            p.grad = torch.empty_like(p).copy_(drawn)  # lies as autograd lays it: like its weight
        update(optimizer, held, limit)


@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
@pytest.mark.parametrize("limit", [0.0, 2.0])
def test_the_optimiser_is_torchs(dtype: torch.dtype, limit: float, stepped: list[int]) -> None:
    """Groups, schedules and clipping for several steps; rates as tensors; resumed bitwise; states go either way."""
    ours = parameters(dtype)
    exact = [nn.Parameter(p.detach().clone().double()) for p in ours]
    theirs = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in ours]
    mine = grouped(AdamW, ours, fused=True)
    assert isinstance(mine, torch.optim.AdamW)
    versions = [p._version for p in ours]
    walk(mine, ours, 0, 3, limit)
    assert sorted(stepped) == [64, 64, 64, 320, 320, 320]
    assert all(
        p._version > before for p, before in zip(ours[:2], versions[:2], strict=True)
    )  # so that autograd sees it
    torchs = grouped(torch.optim.AdamW, theirs, fused=True)
    walk(torchs, theirs, 0, 3, limit)
    walk(grouped(torch.optim.AdamW, exact, foreach=False, fused=False), exact, 0, 3, limit)
    close: dict[str, Any] = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 8 * torch.finfo(dtype).eps, "atol": 1e-4}
    )
    for a, b, c in zip(ours, theirs, exact, strict=True):
        torch.testing.assert_close(a, b, **close)
        torch.testing.assert_close(a.double(), c, **close)
        for name, kept in torchs.state[b].items():
            found = mine.state[a][name]
            assert found.dtype == kept.dtype and found.device == kept.device and found.stride() == kept.stride()
            torch.testing.assert_close(found, kept, **close)
    assert all(float(mine.state[p]["step"]) == 3 for p in ours)
    state = copy.deepcopy(mine.state_dict())
    assert state.keys() == torchs.state_dict().keys() and state["param_groups"] == torchs.state_dict()["param_groups"]

    kept = [[nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in ours] for _ in range(3)]
    resumed, graphed, other = (
        grouped(c, k, fused=True) for c, k in zip((AdamW, AdamW, torch.optim.AdamW), kept, strict=True)
    )
    for optimizer in (resumed, graphed, other):
        optimizer.load_state_dict(copy.deepcopy(state))
    for group in graphed.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=DEVICE)
    for optimizer, held in zip((mine, resumed, graphed, other), (ours, *kept), strict=True):
        walk(optimizer, held, 3, 5, limit)
    for a, b, c, d in zip(ours, *kept, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, **close)
        torch.testing.assert_close(a, d, **close)
    torchs.load_state_dict(copy.deepcopy(mine.state_dict()))
    mine.load_state_dict(copy.deepcopy(torchs.state_dict()))
    assert mine.state_dict()["param_groups"] == torchs.state_dict()["param_groups"]


def test_closures_hooks_and_profiles_are_torchs(stepped: list[int]) -> None:
    """Each once, in torch's order, and hooks before a step change what it reads; gradients are there after it."""
    drawn = parameters(torch.float32)
    found = []
    for cls in (torch.optim.AdamW, AdamW):
        held = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in drawn]
        calls, optimizer = [], grouped(cls, held, fused=True)

        def closure(held: list[nn.Parameter] = held, calls: list[str] = calls) -> float:
            assert torch.is_grad_enabled()
            calls.append("closure")
            for p in held:
                p.grad = torch.ones_like(p)
            return 1.5

        def before(*_: Any, held: list[nn.Parameter] = held, calls: list[str] = calls) -> None:
            calls.append("before")
            for p in held:
                if p.grad is not None:
                    p.grad.neg_()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("after"))
        with torch.no_grad(), torch.autograd.profiler.profile() as profile:
            assert optimizer.step(closure) == 1.5
            given = [p.grad for p in held]
            assert optimizer.step() is None
        assert all(p.grad is g for p, g in zip(held, given, strict=True))
        assert calls == ["before", "closure", "after", "before", "after"]
        names = [event.name for event in profile.function_events if event.name.startswith("Optimizer.step")]
        found.append((names, held))
    assert sorted(stepped) == [64, 64, 320, 320] and found[0][0] == found[1][0] == ["Optimizer.step#AdamW.step"] * 2
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not GPU, reason="a CUDA graph needs a GPU")
def test_a_graph_reads_rates_and_counts(stepped: list[int]) -> None:
    """Captured once, it takes the steps that are taken without: each with its rate and its count."""
    held, twins_of = ([nn.Parameter(torch.linspace(-1, 1, n, device=DEVICE)) for n in (4096, 80)] for _ in range(2))
    graphed, eager = (AdamW([{"params": p, "peak": 0.1}], fused=True) for p in (held, twins_of))
    for p, q in zip(held, twins_of, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    graphed.param_groups[0] |= {"lr": torch.tensor(0.1, device=DEVICE), "capturable": True}
    set_rate(eager, 1.0)
    for optimizer, own in ((graphed, held), (eager, twins_of)):
        update(optimizer, own, 0.5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(graphed, held, 0.5)
    assert stepped == [4096, 80] * 3
    for step in range(3):
        for optimizer in (graphed, eager):
            set_rate(optimizer, 1.0 / (2 + step))
        graph.replay()
        update(eager, twins_of, 0.5)
    for p, q in zip(held, twins_of, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert float(graphed.state[p]["step"]) == 4


def test_what_is_torchs_alone(stepped: list[int]) -> None:
    """Another kind of gradient or step, and plain twins; clipped gradients where they are read."""
    for more in (
        {"fused": False, "foreach": False},
        {"fused": True, "amsgrad": True},
        {"fused": True, "maximize": True},
    ):
        held = parameters(torch.float32)
        walk(grouped(AdamW, held, **more), held, 0, 1, 1.0)
    held = parameters(torch.float32)
    optimizer = grouped(AdamW, held, fused=True)
    with twins.plain():
        walk(optimizer, held, 0, 1, 1.0)
    optimizer.found_inf = torch.zeros((), device=DEVICE)  # type: ignore[attr-defined]
    walk(optimizer, held, 1, 2, 0.0)
    assert not stepped
    del optimizer.found_inf  # type: ignore[attr-defined]
    for p in held:
        p.grad = torch.ones_like(p)
    norm = update(optimizer, held, 0.5, read_after=True)
    total = torch.stack([p.grad.double().norm() for p in held if p.grad is not None]).norm()
    assert stepped and norm > 1.0 and float(total) == pytest.approx(0.5, rel=1e-4)


def test_plans() -> None:
    assert plan("cuda", torch.bfloat16).path == ("triton" if TRITON else "plain")
    for given in (("cpu", torch.bfloat16), ("cuda", torch.float64)):
        assert plan(*given).path == "plain" and plan(*given).why
    with twins.plain():
        assert plan("cuda").why == twins.WHY
