"""Causal attention on CUDA, which the plan gives to cuDNN, against torch's backends called directly, TFLOP/s."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import ceilings, interleaved, main, often, row
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dovetail.kernels.attention import BoundMask, attend, reference
from dovetail.parts.context import Context
from dovetail.parts.mask import Causal, Full, Mask, Window

BENCHMARK = {"device": "cuda", "minutes": 1}
TARGETS = {"SDPA cuDNN": 0.98, "SDPA flash": 1.8}  # ratios


def inputs(B: int, H: int, T: int, D: int) -> list[torch.Tensor]:
    make = lambda: torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()  # noqa: E731
    return [make() for _ in range(3)]


def check() -> None:
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


REPEAT = 10  # calls queued between two synchronisations, as in a real step


def measure() -> Iterator[dict[str, Any]]:
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
