"""Every fast path off: the same curve of losses over 200 steps of the real loop on real text, within bf16's rounding.

Two runs that start alike drift apart by rounding alone, and an error of a hundredth hides in that. So the fast run is
also set to the plain run's weights before every step: what is left is rounding, whose mean is zero, or an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import dovetail as dt
from dovetail.errors import SpecError
from dovetail.kernels import attention, gated_linear, twins
from dovetail.objectives.next_token import NextToken
from dovetail.training import Recipe, fit
from dovetail.training.loop import Run
from dovetail.training.optim import adamw
from dovetail.training.setup import set_up
from training.small import recipe

STEPS = 200
ROUNDING = 2.0**-9  # of bf16, relative
ROPE = {"kind": "attention", "heads": 4, "kv_heads": 2, "position": "rope", "qk_norm": "rms"}  # sharp from the start
GLA = {"kind": "gla", "heads": 2}


def made(folder: Path, mixer: dict[str, Any], autocast: str = "none", plain: bool = False) -> Run:
    """A run on the text of one of Python's modules. eps: Adam's own would make whole steps of vanishing gradients' rounding."""
    train = {"steps": STEPS, "batch": 8, "length": 16, "lr": 1e-3, "eps": 1e-4, "warmup": 10, "device": "cpu"}
    data = {
        "model": {"kind": "decoder", "dim": 32, "depth": 1, "blocks": {"mixer": mixer}},
        "tokenizer": {"train": 300},
        "data": {"train": {"kind": "text", "path": argparse.__file__}, "cache": str(folder)},
        "train": train | {"autocast": autocast},
        "out": str(folder / "out"),
    }
    with twins.plain() if plain else nullcontext():
        run = Run(set_up(Recipe.load(data)), folder / "out")
    run.model.train()
    return run


def step(run: Run, context: AbstractContextManager[Any] | None = None) -> torch.Tensor:
    """(2,) the loss and the gradient's norm of the next step."""
    with context or nullcontext():
        loss, norm, _ = run.one_step()
    run.step += 1
    return torch.stack([loss, norm.detach()]).double()


@contextmanager
def wrong(where: Any, name: str, change: Callable[..., Any]) -> Iterator[None]:
    """A fast path with an error: change(the function, its arguments)."""
    right = getattr(where, name)
    setattr(where, name, lambda *given: change(right, *given))
    try:
        yield
    finally:
        setattr(where, name, right)


def curves(folder: Path, mixer: dict[str, Any], error: Any) -> dict[str, torch.Tensor]:
    """(steps,2) losses and norms of the plain run, of fast ones at its weights in fp32, in bf16 and with `error`, and of
    one in bf16 that goes its own way."""
    plain, free = made(folder, mixer, plain=True), made(folder, mixer, "bf16")
    at = {"fp32": made(folder, mixer), "bf16": made(folder, mixer, "bf16"), "wrong": made(folder, mixer, "bf16")}
    last = {"fp32": 50, "bf16": STEPS, "wrong": STEPS // 2}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ("plain", "free", *at)}
    for i in range(STEPS):
        for name, run in at.items():
            if i < last[name]:
                with torch.no_grad():
                    torch._foreach_copy_(run.parameters, plain.parameters)  # type: ignore[arg-type]
                found[name].append(step(run, error() if name == "wrong" else None))
        found["plain"].append(step(plain, twins.plain()))
        found["free"].append(step(free))
    return {name: torch.stack(values) for name, values in found.items()}


def agrees(found: torch.Tensor, plain: torch.Tensor) -> bool:
    """Whether residuals (steps,2) are rounding: as small as bf16's, and their mean within four of its standard errors,
    these from ten stretches of steps, since what rounds alike in one step does in the next."""
    residual = found / plain[: len(found)] - 1
    stretches = residual.unflatten(0, (10, -1)).mean(1)
    error = stretches.std(0) / len(stretches) ** 0.5
    return bool((residual.square().mean(0).sqrt() < ROUNDING).all() and (stretches.mean(0).abs() < 4 * error).all())


SHARP = lambda run, *x: run(*x[:5], 1.02 * x[5], *x[6:])  # noqa: E731
ERRORS = {
    "attention's scale": (ROPE, lambda: wrong(attention.sdpa, "attend", SHARP)),
    "gated linear attention's queries": (
        GLA, lambda: wrong(gated_linear.chunked, "gated_linear", lambda run, q, *x: run(1.02 * q, *x)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", ["attention's scale", pytest.param("gated linear attention's queries", marks=pytest.mark.slow)]
)
def test_the_curve_is_that_of_the_plain_twins(tmp_path: Path, case: str) -> None:
    """And what is wrong by a fiftieth is told from it by the same measure."""
    mixer, error = ERRORS[case]
    found = curves(tmp_path, mixer, error)
    plain = found["plain"]
    assert plain[-20:, 0].mean() < 0.75 * plain[0, 0]  # it learns
    torch.testing.assert_close(found["fp32"], plain[:50], rtol=1e-5, atol=0)
    assert agrees(found["bf16"], plain)
    assert not agrees(found["wrong"], plain)
    apart = found["free"][:, 0] / plain[:, 0] - 1  # a curve of its own, off by what rounding has grown to
    assert apart.mean().abs() < ROUNDING / 2 and apart.abs().max() < 2 * ROUNDING


def test_fp32_is_the_plain_twin_step_by_step(tmp_path: Path) -> None:
    """Ten steps of a mixer with a state, each run going its own way."""
    plain, fast = made(tmp_path, GLA, plain=True), made(tmp_path, GLA)
    for _ in range(10):
        torch.testing.assert_close(step(fast), step(plain, twins.plain()), rtol=1e-5, atol=0)


MIXERS: list[Any] = [
    ROPE, GLA, "delta_net", "gated_delta_net", "mamba", "s4d", {"kind": "linear"}, {"kind": "retention"}, "flash",
    {"kind": "attention", "heads": 2, "position": {"kind": "rerope", "window": 6}},
    {"kind": "gau", "normaliser": {"kind": "relu2", "length": 20}},
]  # fmt: skip


@pytest.mark.parametrize(
    "mixer", MIXERS, ids=lambda m: m if isinstance(m, str) else "-".join(map(str, m.values()))[:40]
)
def test_every_plan_is_asked(mixer: Any) -> None:
    """Losses and gradients of the twins are those of the fast paths, and the plan says which were taken."""
    spec = {"kind": "decoder", "vocab": 50, "dim": 16, "depth": 1, "blocks": {"mixer": mixer}}
    model = dt.build(spec, seed=0).train()
    tokens = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(0))
    found = []
    for context in (nullcontext(), twins.plain()):
        with context:
            loss = NextToken(z=1e-3)(model, {"tokens": tokens, "labels": tokens}).total()
            found.append((loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
            plans = model.blocks[0].mixer.plans("cuda", 4096)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-6)
    first = next(iter(plans.values()))
    assert first.why == twins.WHY or first.path == "regions", plans


def test_a_recipe_asks_for_it(tmp_path: Path) -> None:
    data = recipe(tmp_path / "plain", steps=2, plain=True)
    assert not twins.asked()
    result = fit(data | {"out": str(tmp_path / "a")}, progress=False)
    fast = fit(data | {"out": str(tmp_path / "b")}, ["train.plain=false"], progress=False)
    assert result.loss == pytest.approx(fast.loss, rel=1e-5) and result.autocast == "none" and not twins.asked()
    with twins.plain():
        optimizer = adamw(dt.build({"kind": "decoder", "vocab": 9, "dim": 8, "depth": 1}), lr=1.0, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0)  # fmt: skip
    assert optimizer.defaults["fused"] is False and optimizer.defaults["foreach"] is False
    with pytest.raises(SpecError, match=r"train\.plain"):
        Recipe.load(data, ["train.compile=true"])
