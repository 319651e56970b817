"""Causal attention on CUDA, which the plan gives to cuDNN, against torch's backends called directly, TFLOP/s; and attention
over a grid with terms of rows and columns (SAM's), against a dense bias that is there already."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from common import ceilings, interleaved, main, often, row
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dovetail.kernels.attention import BoundMask, RelativeLogits, Score, attend, reference
from dovetail.parts.context import Context
from dovetail.parts.mask import Causal, Full, Mask, Window

BENCHMARK = {"device": "cuda", "minutes": 1}
TARGETS = {"SDPA cuDNN": 0.98, "SDPA flash": 1.8}  # ratios


def inputs(B: int, H: int, T: int, D: int) -> list[torch.Tensor]:
    make = lambda: torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()  # noqa: E731
    return [make() for _ in range(3)]


def check() -> None:
    check_paths()
    check_grid()


def check_paths() -> None:
    """The paths on this device against the plain twin: outputs and gradients, bf16."""
    rules: list[Mask] = [Full(), Causal(), Causal() & Window(size=100)]
    for rule in rules:
        for padded in (False, True):
            B, H, T, D = 2, 4, 384, 64
            q, k, v = inputs(B, H, T, D)
            real = torch.ones(B, T, device="cuda")
            if padded:
                real[0, :50] = 0
            ctx = Context.of(B, T, torch.device("cuda"), attention_mask=real if padded else None)
            mask: BoundMask = ctx.bind(rule)
            g = torch.randn_like(q)
            ours = attend(q, k, v, mask=mask)
            theirs = reference.attend(q.double(), k.double(), v.double(), mask, None, D**-0.5)[0]
            gradients = torch.autograd.grad(ours, (q, k, v), g)
            expected = torch.autograd.grad(theirs, (q, k, v), g.double())
            for name, a, b in zip(("out", "dq", "dk", "dv"), (ours, *gradients), (theirs, *expected), strict=True):
                error = ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
                print(f"{rule.kind:8} padded={padded!s:5} {name:4} relative error {error:.1e}", flush=True)
                assert error < 2e-2, (rule, padded, name, error)


def gridded(B: int, H: int, side: int, D: int) -> tuple[list[torch.Tensor], BoundMask, Score, torch.Tensor]:
    """q, k, v and the terms' values, which learn; and the bias that they mean."""
    qkv, ctx = inputs(B, H, side * side, D), Context.on_grid(side, side, torch.device("cuda"))
    made = [torch.randn(B, H, side * side, 2 * side - 1, device="cuda").bfloat16().requires_grad_() for _ in range(2)]
    terms = tuple(RelativeLogits(t, side - 1, i, inside_scale=False, places=side) for i, t in enumerate(made))
    mask, score = ctx.bind(Full()), Score(terms)
    with torch.no_grad():
        bias = score.bias(mask.at, D**-0.5)
    assert bias is not None
    return [*qkv, *made], mask, score, bias.bfloat16()


def check_grid() -> None:
    """Outputs and gradients of rows and columns against the plain twin."""
    (q, k, v, *values), mask, score, _ = gridded(2, 4, 14, 64)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v, *values)]
    twins = [replace(t, values=values) for t, values in zip(score.terms, wide[3:], strict=True)]
    theirs, g = reference.attend(*wide[:3], mask, Score(tuple(twins)), 64**-0.5)[0], torch.randn_like(q)
    ours = attend(q, k, v, mask=mask, score=score)
    found = (ours, *torch.autograd.grad(ours, (q, k, v, *values), g))
    expected = (theirs, *torch.autograd.grad(theirs, wide, g.double()))
    errors = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)]
    print("grid     out, dq, dk, dv, rows, columns", *(f"{e:.1e}" for e in errors), flush=True)
    assert max(errors) < 2e-2, errors


REPEAT = 10  # calls queued between two synchronisations, as in a real step


def grid() -> Iterator[dict[str, Any]]:
    """SAM's whole image, 64 x 64 patches."""
    B, H, side, D = 4, 16, 64, 64
    (q, k, v, *values), mask, score, bias = gridded(B, H, side, D)
    g, work = torch.randn_like(q), REPEAT * 4 * B * H * side**4 * D / 1e12
    ours = lambda: attend(q, k, v, mask=mask, score=score)  # noqa: E731
    dense = lambda: F.scaled_dot_product_attention(q, k, v, bias)  # noqa: E731
    ways = {
        "fwd": {"ours": ours, "a dense bias": dense},
        "fwd+bwd": {
            "ours": lambda: torch.autograd.grad(ours(), (q, k, v, *values), g),
            "a dense bias": lambda: torch.autograd.grad(dense(), (q, k, v), g),
        },
    }
    for what, made in ways.items():
        with torch.set_grad_enabled(what != "fwd"):
            times = interleaved({n: often(run, REPEAT) for n, run in made.items()}, rounds=10, warmup=2)
        rate = {n: round(work * (1 if what == "fwd" else 3.5) / t[0], 1) for n, t in times.items()}
        more = {"target": 150} if what == "fwd" else {}
        case = f"rows and columns, grid {side} x {side}, B{B} H{H} D{D} {what}"
        yield row(case, "TFLOP/s", rate["ours"], rate["a dense bias"], "a dense bias", **more)


def measure() -> Iterator[dict[str, Any]]:
    yield from grid()
    floor = round(ceilings("cuda").bf16_matmul_tflops)
    for B, H, T, D in ((4, 16, 4096, 128), (1, 16, 16384, 128), (4, 32, 4096, 64)):
        q, k, v = inputs(B, H, T, D)
        g = torch.randn_like(q)
        mask = Context.of(B, T, torch.device("cuda")).bind(Causal())
        flop = 4 * B * H * T * T * D / 2

        def peer(backend: SDPBackend, q: Any = q, k: Any = k, v: Any = v) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        ways: dict[str, Callable[[], torch.Tensor]] = {
            "ours": lambda q=q, k=k, v=v, mask=mask: attend(q, k, v, mask=mask),
            "SDPA cuDNN": lambda: peer(SDPBackend.CUDNN_ATTENTION),
            "SDPA flash": lambda: peer(SDPBackend.FLASH_ATTENTION),
        }
        case = f"causal B{B} H{H} T{T} D{D}"
        with torch.no_grad():
            forward = interleaved({n: often(run, REPEAT) for n, run in ways.items()}, rounds=10, warmup=2)
        steps = {
            n: (lambda run=run, g=g, q=q, k=k, v=v: torch.autograd.grad(run(), (q, k, v), g)) for n, run in ways.items()
        }
        both = interleaved({n: often(run, REPEAT) for n, run in steps.items()}, rounds=10, warmup=2)
        for what, times, work in (("fwd", forward, flop), ("fwd+bwd", both, 3.5 * flop)):
            rate = {n: REPEAT * work / t[0] / 1e12 for n, t in times.items()}
            spread = round(rate["ours"] * times["ours"][1] / times["ours"][0], 1)
            for name, ratio in TARGETS.items():
                more = {"spread": spread, "floor": floor, "target_ratio": ratio}
                yield row(f"{case} {what}", "TFLOP/s", round(rate["ours"], 1), round(rate[name], 1), name, **more)


if __name__ == "__main__":
    main(__file__)
