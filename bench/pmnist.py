"""Permuted MNIST before it is run whole: recurrence and convolution against fp64 twins, then what a step of each arm takes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import ROOT, interleaved, main, row
from torch import Tensor

from dovetail.kernels import legs_recurrence as legs
from dovetail.kernels import ssm_convolution
from dovetail.report.study_recipe import Study
from dovetail.training.device import choose
from dovetail.training.loop import Run
from dovetail.training.setup import set_up

BENCHMARK = {"device": "cuda", "data": ["../shared/data/mnist"], "minutes": 3, "writes": "pmnist_steps"}
LENGTH = 784
ALLOWED = 1e-4  # of the largest entry, fp32 against fp64


def rows(batch: int, hidden: int, order: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = ((batch, LENGTH, 1 + 2 * hidden), (1, hidden), (2 * hidden, order))
    scales = (1.0, hidden**-0.5, order**-0.5)
    return [s * torch.randn(n, dtype=dtype) for n, s in zip(sizes, scales, strict=True)]


def twin(given: Tensor, told: Tensor, recall: Tensor) -> Tensor:
    number = torch.arange(LENGTH, device=given.device).expand(given.shape[:2])
    start = [given.new_zeros(len(given), n) for n in (told.shape[1], recall.shape[1])]
    return legs.reference.recurrence(given, told, recall, number, None, *start)[0]


def with_gradients(run: Any, given: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in given]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def compare(what: str, names: tuple[str, ...], found: list[Tensor], want: list[Tensor]) -> None:
    for name, one, other in zip(names, found, want, strict=True):
        lost = float((one.double() - other).abs().max() / other.abs().max())
        print(f"{what} {name}: {lost:.1e} of the largest")
        if not lost <= ALLOWED:
            raise SystemExit(f"{what} {name} is off by {lost:.1e}, and {ALLOWED:.0e} is allowed")


def check() -> None:
    """Two draws of the recurrence, one at the recipe's width with few rows; the convolution by products."""
    device = choose("auto")
    for sizes in ((4, 32, 64), (2, 512, 64)):
        exact = [t.to(device) for t in rows(*sizes, torch.float64)]
        found = with_gradients(legs.recurrence, [t.float() for t in exact])
        names = ("h", "d given", "d told", "d recall")
        compare("legs_recurrence H{} N{}".format(*sizes[1:]), names, found, with_gradients(twin, exact))
    fading = torch.linspace(0, -5, LENGTH).exp()
    exact = [t.double().to(device) for t in (torch.randn(3, LENGTH, 8), torch.randn(8, LENGTH) * fading)]
    found = with_gradients(ssm_convolution.products.convolve, [t.float() for t in exact])
    want = with_gradients(ssm_convolution.reference.convolve, exact)
    compare("convolution by products", ("y", "dx", "d kernel"), found, want)


def convolutions(device: torch.device) -> list[Any]:
    """Products beside transforms, forward and backward, at lengths around the one where `plan` changes over."""
    found, (B, D) = [], (100, 256) if device.type == "cuda" else (4, 16)
    for T in (512, LENGTH, 1024, 1536):
        given = [torch.randn(B, T, D, device=device), torch.randn(D, T, device=device)]
        sorts = {"products": ssm_convolution.products.convolve, "transforms": ssm_convolution.transforms}
        runs = {name: lambda run=run: with_gradients(run, given) for name, run in sorts.items()}  # noqa: B023 (run at once)
        times = interleaved(runs, rounds=5)
        ours, theirs = (times[name][0] for name in sorts)
        print(f"convolution T{T}: products {1e3 * ours:.2f} ms, transforms {1e3 * theirs:.2f} ms")
        shape = f"convolution B{B} T{T} D{D}, forward + backward, by products"
        found.append(row(shape, "s", ours, theirs, "by transforms", smaller=True, spread=times["products"][1]))
    return found


def measure() -> Iterator[dict[str, Any]]:
    asked, device = Study.load(ROOT / "recipes" / "pmnist.yaml"), choose("auto")
    size = (200, 512, 512) if device.type == "cuda" else (2, 16, 16)  # rows, hidden, order: those of the recipe
    big = [t.to(device) for t in rows(*size, torch.float32)]
    runs = {"ours": lambda: with_gradients(legs.recurrence, big), "twin": lambda: with_gradients(twin, big)}
    times = interleaved(runs, rounds=3)
    ours, theirs = (times[name][0] for name in ("ours", "twin"))
    shape = "recurrence B{} T{} H{} N{}, forward + backward".format(size[0], LENGTH, *size[1:])
    yield row(shape, "s", ours, theirs, "its twin, token by token", smaller=True, spread=times["ours"][1])
    yield from convolutions(device)
    for arm in asked.arms:
        recipe = asked.recipe(arm, 0)
        with tempfile.TemporaryDirectory() as folder:
            run = Run(set_up(recipe), Path(folder))
            run.model.train()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            median, spread = interleaved({"step": run.one_step}, rounds=10, warmup=3)["step"]
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        minutes = median * recipe.train.steps / 60
        print(f"{arm.name}: {1e3 * median:.1f} ms a step, {minutes:.1f} min for {recipe.train.steps} steps")
        more = {"step_ms": round(1e3 * median, 2), "spread_ms": round(1e3 * spread, 2), "peak_mb": round(peak / 1e6)}
        yield row(arm.name, "min", minutes, 10.0, "the ten minutes allowed", smaller=True, target=10.0, **more)
        del run


if __name__ == "__main__":
    main(__file__)
