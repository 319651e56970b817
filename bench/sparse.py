"""Local and dilated attention on CUDA: time by the tiles that a mask leaves, which it should be proportional to.

Rows of 32,768 tokens, 16 heads of 128, bf16. A tile is 128 queries by 128 keys; it counts where any pair of it is seen.
The peer of each mask is the average of all: its ratio is the average nanoseconds a tile and head over its own, which
tiles at a constant price keep within 15% of 1. Tiles that are seen in part cost the mask's evaluation besides.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from common import interleaved, main, often, row

from dovetail.kernels.attention import attend, plan, reference
from dovetail.parts.context import Context
from dovetail.parts.mask import Causal, Dilated, Mask, Window

BENCHMARK = {"device": "cuda", "minutes": 3}
T, H, D, TILE, REPEAT = 32768, 16, 128, 128, 3
RULES: dict[str, Mask] = {
    **{f"local {size}": Causal() & Window(size=size) for size in (512, 1024, 2048, 4096, 8192)},
    "dilated 1024, step 2": Causal() & Window(size=1024) & Dilated(step=2),
    "dilated 4096, step 4": Causal() & Window(size=4096) & Dilated(step=4),
}


def inputs(B: int, length: int) -> list[torch.Tensor]:
    shape = (B, length, H, D)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3)]


def check() -> None:
    """The path that long rows take against the plain twin in fp64: outputs and gradients."""
    length = 2048
    for name in ("local 512", "dilated 1024, step 2"):
        q, k, v = inputs(1, length)
        mask = Context.of(1, length, q.device).bind(RULES[name])
        g = torch.randn_like(q)
        ours = attend(q, k, v, mask=mask)
        wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
        twin = reference.attend(*wide, mask, None, D**-0.5)[0]
        found = (ours, *torch.autograd.grad(ours, (q, k, v), g))
        expected = (twin, *torch.autograd.grad(twin, wide, g.double()))
        errors = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)]
        print(f"{name}: relative errors of out, dq, dk, dv", *(f"{e:.1e}" for e in errors), flush=True)
        assert max(errors) < 2e-2, (name, errors)


def measure() -> Iterator[dict[str, Any]]:
    q, k, v = inputs(1, T)
    g = torch.randn_like(q)
    context = Context.of(1, T, q.device)
    masks = {name: context.bind(rule) for name, rule in RULES.items()}
    tiles = {name: int(mask.tiles(TILE).sum()) for name, mask in masks.items()}
    forward = {n: often(lambda m=m: attend(q, k, v, mask=m), REPEAT) for n, m in masks.items()}
    both = {
        n: often(lambda m=m: torch.autograd.grad(attend(q, k, v, mask=m), (q, k, v), g), REPEAT)
        for n, m in masks.items()
    }
    for what, ways in (("fwd", forward), ("fwd+bwd", both)):
        times = interleaved(ways, rounds=7, warmup=2)
        each = {n: 1e9 * t[0] / REPEAT / tiles[n] / H for n, t in times.items()}
        mean = statistics.fmean(each.values())
        for name, mask in masks.items():
            path = plan(device="cuda", dtype=q.dtype, queries=T, width=D, mask=mask, score=None).path
            more = {"ms": round(1e3 * times[name][0] / REPEAT, 3), "tiles": tiles[name], "path": path}
            ns, average = round(each[name], 3), round(mean, 3)
            yield row(f"{name}, T{T} {what}", "ns a tile and head", ns, average, "average", smaller=True, **more)


if __name__ == "__main__":
    main(__file__)
