"""The gate of gated feed-forwards on CUDA, silu(gate) · up in bf16, against torch, its compiler and Liger.

First outputs and gradients against the fp64 twin, every activation. Then ms, forward and forward and backward, at 16,384
rows of 2 x 8192 (Llama-3.2-1B's, 4 x 4096 tokens) and of 2 x 5464, which 16 does not divide. Floor: what must be read and
written at the measured copy rate, 6 bytes an entry of the output forward, 10 backward. "ours compiled" is what a compiled
model runs. "torch.compile, halves apart", where Inductor can be asked to, has it write the halves of the gradient in one
loop over both, and not entry by entry. Liger's gate and up are tensors of their own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import ceilings, interleaved, main, replayed, row
from torch import Tensor
from torch._inductor import config as inductor

from dovetail.kernels.gate import ACTIVATIONS, gated, plan, reference

BENCHMARK = {"device": "cuda", "packages": {"triton": "triton"}, "minutes": 2}
DEVICE, DTYPE, ROWS, WIDTHS, REPEAT = "cuda", torch.bfloat16, 16384, (8192, 5464), 10
OURS, COMPILED = "ours", "ours compiled"
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2e-6}  # of one number
Way = tuple[Callable[[], Tensor], list[Tensor]]  # and of what gradients are taken


def silu(both: Tensor) -> Tensor:
    return gated(both, "silu")


def plain(both: Tensor) -> Tensor:
    return reference.gated(both, "silu")


def ways(both: Tensor) -> dict[str, Way]:
    """Compiled anew for each shape, so that none is dynamic."""
    torch.compiler.reset()
    runs = {
        OURS: silu,
        COMPILED: torch.compile(silu, fullgraph=True),
        "torch eager": plain,
        "torch.compile": torch.compile(plain, fullgraph=True),
    }
    if hasattr(inductor, "max_complex_pointwise_cat_inputs"):
        apart: dict[str, Any] = {"max_pointwise_cat_inputs": 0, "max_complex_pointwise_cat_inputs": 0}
        runs["torch.compile, halves apart"] = torch.compile(lambda x: plain(x), fullgraph=True, options=apart)
    found: dict[str, Way] = {name: ((lambda run=run: run(both)), [both]) for name, run in runs.items()}
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # type: ignore[import-not-found]

        # Its backward writes over them: their numbers are the check's for one step alone.
        halves = [half.detach().clone().requires_grad_() for half in both.chunk(2, -1)]
        found["Liger"] = (lambda: LigerSiLUMulFunction.apply(*halves)), halves
    return found


def made(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return (3 * torch.randn(rows, 2 * width, device=DEVICE)).to(dtype).requires_grad_()


def step(way: Way, up: Tensor) -> tuple[Tensor, ...]:
    out = way[0]()
    return out.detach(), *torch.autograd.grad(out, way[1], up)


def forward(way: Way) -> Tensor:
    with torch.no_grad():
        return way[0]()


def roundings(way: Way, activation: str, both: Tensor) -> float:
    """The largest difference of any output or gradient from fp64, by what one rounding of it may be."""
    wide = both.detach().double().requires_grad_()
    right, up = reference.gated(wide, activation), torch.randn_like(both).chunk(2, -1)[0]
    out, *grads = step(way, up)
    pairs = (out, right), (torch.cat(grads, -1), torch.autograd.grad(right, wide, up.double())[0])
    unit = ROUNDING[both.dtype]
    return max(((a.double() - b).abs() / (unit * b.abs() + 2e-5)).max().item() for a, b in pairs)


def check() -> None:
    """Every activation in every type, then every way."""
    torch.manual_seed(0)
    for activation in ACTIVATIONS:
        far = []
        for dtype in ROUNDING:
            assert plan(activation, DEVICE, dtype).path == "triton"
            for rows, width in ((300, 2048), (77, 1100), (1000, 37), (1, 1)):
                both = made(rows, width, dtype)
                far.append(roundings((lambda: gated(both, activation), [both]), activation, both))  # noqa: B023
        print(f"{activation}: at most {max(far):.2f} roundings from fp64", flush=True)
        assert max(far) < 1.1, (activation, far)
    for width in WIDTHS:
        both = made(512, width, DTYPE)
        for name, way in ways(both).items():
            far = roundings(way, "silu", both)
            print(f"{name}, {width}: {far:.2f} roundings from fp64", flush=True)
            assert far < (1.1 if name == OURS else 16), (name, far)


def measure() -> Iterator[dict[str, Any]]:
    """A case for each of ours, against each peer."""
    rate = 1e12 * ceilings().copy_tbs
    for width in WIDTHS:
        both = made(ROWS, width, DTYPE)
        up, found = torch.randn_like(both[:, :width]), ways(both)
        cases = {
            "fwd": {name: (lambda way=way: forward(way)) for name, way in found.items()},
            "fwd+bwd": {name: (lambda way=way, up=up: step(way, up)) for name, way in found.items()},
        }
        for what, runs in cases.items():
            times = interleaved(replayed(runs, REPEAT), rounds=9, warmup=2)
            ms = {name: 1e3 * median / REPEAT for name, (median, _) in times.items()}
            moved = {"fwd": 6, "fwd+bwd": 16}[what] * ROWS * width
            for name, each in ms.items():
                share = moved / each * 1e3 / rate
                print(f"{what} {width}, {name}: {each:.4f} ms, {moved / each / 1e6:.0f} GB/s, {share:.2f} of a copy's", flush=True)  # fmt: skip
            for ours in (OURS, COMPILED):
                more = {"spread": round(1e3 * times[ours][1] / REPEAT, 4), "floor": round(1e3 * moved / rate, 4)}
                for peer in (name for name in ms if name not in (OURS, COMPILED)):
                    case = f"{ours}, {ROWS} x 2 x {width} {what}"
                    yield row(case, "ms", round(ms[ours], 4), round(ms[peer], 4), peer, smaller=True, **more)


if __name__ == "__main__":
    main(__file__)
