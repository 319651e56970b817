"""Permuted MNIST before it is run whole: the recurrence against its fp64 twin, then what a step of each arm takes.

python bench/pmnist.py [--out DIR]: checks first, and stops where they fail; then writes docs/results/pmnist_steps.json.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import interleaved, row, write
from torch import Tensor

from dovetail.kernels import legs_recurrence as legs
from dovetail.report.study_recipe import Study
from dovetail.training.device import choose
from dovetail.training.loop import Run
from dovetail.training.setup import set_up

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


def check(device: torch.device) -> None:
    exact = rows(4, 32, 64, torch.float64)
    want = with_gradients(twin, exact)
    found = with_gradients(legs.recurrence, [t.to(device, torch.float32) for t in exact])
    for name, one, other in zip(("h", "d given", "d told", "d recall"), found, want, strict=True):
        lost = float((one.cpu().double() - other).abs().max() / other.abs().max())
        print(f"legs_recurrence {name}: {lost:.1e} of the largest")
        if not lost <= ALLOWED:
            raise SystemExit(f"{name} is off by {lost:.1e}, and {ALLOWED:.0e} is allowed")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--override", action="append", default=[], help="of the study, such as base.train.device=cpu")
    options = parser.parse_args()
    asked = Study.load(Path(__file__).parent.parent / "recipes" / "pmnist.yaml", options.override)
    device = choose(asked.base["train"].get("device", "auto"))
    check(device)
    size = (200, 512, 512) if device.type == "cuda" else (2, 16, 16)  # rows, hidden, order: those of the recipe
    big = [t.to(device) for t in rows(*size, torch.float32)]
    runs = {"ours": lambda: with_gradients(legs.recurrence, big), "twin": lambda: with_gradients(twin, big)}
    times = interleaved(runs, rounds=3)
    ours, theirs = (times[name][0] for name in ("ours", "twin"))
    shape = "recurrence B{} T{} H{} N{}, forward + backward".format(size[0], LENGTH, *size[1:])
    found = [row(shape, "s", ours, theirs, "its twin, token by token", smaller=True, spread=times["ours"][1])]
    for arm in asked.arms:
        recipe = asked.recipe(arm, 0)
        with tempfile.TemporaryDirectory() as folder:
            run = Run(set_up(recipe), Path(folder))
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            median, spread = interleaved({"step": run.one_step}, rounds=10, warmup=3)["step"]
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        minutes = median * recipe.train.steps / 60
        print(f"{arm.name}: {1e3 * median:.1f} ms a step, {minutes:.1f} min for {recipe.train.steps} steps")
        more = {"step_ms": round(1e3 * median, 2), "spread_ms": round(1e3 * spread, 2), "peak_mb": round(peak / 1e6)}
        found.append(row(arm.name, "min", minutes, 10.0, "the ten minutes allowed", smaller=True, **more))
        del run
    write("pmnist_steps", found, "python bench/pmnist.py", options.out)


if __name__ == "__main__":
    main()
