"""Queries and keys of one product turned by RoPE on CUDA, in bf16, against torch, its compiler and Liger.

First outputs and gradients against the fp64 twin, both layouts. Then ms, forward and forward and backward, at 4 x 4096
tokens of 32 heads of queries and 8 of keys and values, 64 wide (Llama-3.2-1B's). Floor: what must be read and written at
the measured copy rate; backward the values' gradient too. "ours compiled" is what a compiled model runs. Liger turns
queries and keys that are tensors of their own, heads before tokens, and leaves putting their gradients together to others.
Gradients come as attention leaves them, heads before tokens, but to what is compiled here by itself: at a graph's border
they would be copied first, which within a compiled model is not so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import ceilings, interleaved, main, replayed, row
from torch import Tensor

from dovetail.kernels.rotary import Heads, Turning, operator, reference

BENCHMARK = {"device": "cuda", "packages": {"triton": "triton"}, "minutes": 1}
DEVICE, DTYPE, REPEAT = "cuda", torch.bfloat16, 4
HEADS, B, T = Heads(32, 8, 64, 64), 4, 4096
OURS, COMPILED = "ours", "ours compiled"
Way = tuple[Callable[[], tuple[Tensor, ...]], list[Tensor]]


def inputs(heads: Heads, rows: int, tokens: int, dtype: torch.dtype, layout: str) -> tuple[Tensor, Turning]:
    total = (heads.queries + heads.keys) * heads.width + heads.keys * heads.value_width
    angle = torch.randn(1, tokens, 1, heads.width // 2, device=DEVICE)
    x = torch.randn(rows, tokens, total, device=DEVICE).to(dtype).requires_grad_()
    return x, Turning(angle.cos().to(dtype), angle.sin().to(dtype), layout)


def check() -> None:
    for dtype, unit in ((torch.float32, 2**-22), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        for layout in ("half", "interleaved"):
            for heads in (Heads(6, 2, 64, 64), Heads(3, 1, 10, 6)):
                x, turning = inputs(heads, 2, 300, dtype, layout)
                wide = x.detach().double().requires_grad_()
                found = operator.turned(x, heads, turning)
                right = reference.turned(wide, *heads, turning.cos.double(), turning.sin.double(), layout)
                up = [torch.randn_like(t.transpose(1, 2).contiguous()).transpose(1, 2) for t in found]
                (d_x,) = torch.autograd.grad(found, x, up)
                (d_wide,) = torch.autograd.grad(right, wide, [u.double() for u in up])
                far = max(
                    ((a.double() - b).abs() / (unit * b.abs() + 2e-6)).max().item()
                    for a, b in zip((*found, d_x), (*right, d_wide), strict=True)
                )
                print(f"{dtype} {layout} {tuple(heads)}: at most {far:.2f} roundings from fp64", flush=True)
                assert far < 1.1, (dtype, layout, heads, far)


def ways(x: Tensor, turning: Turning) -> dict[str, Way]:
    def plain(x: Tensor) -> tuple[Tensor, ...]:
        return reference.turned(x, *HEADS, *turning)

    def own(x: Tensor) -> tuple[Tensor, ...]:
        return operator.turned(x, HEADS, turning)

    runs = {OURS: own, COMPILED: torch.compile(own, fullgraph=True), "torch eager": plain}
    runs["torch.compile"] = torch.compile(plain, fullgraph=True)
    found: dict[str, Way] = {name: ((lambda run=run: run(x)), [x]) for name, run in runs.items()}
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.ops.rope import LigerRopeFunction  # type: ignore[import-not-found]

        sizes = [HEADS.queries * HEADS.width, HEADS.keys * HEADS.width, HEADS.keys * HEADS.value_width]
        q, k, v = (t.detach().unflatten(-1, (-1, 64)).transpose(1, 2).contiguous() for t in x.split(sizes, -1))
        q, k, v = (t.requires_grad_() for t in (q, k, v))
        table = [torch.cat([t, t], -1)[:, :, 0] for t in turning[:2]]
        found["Liger"] = (lambda: (*LigerRopeFunction.apply(q, k, *table), v * 1)), [q, k, v]
    return found


def step(way: Way, up: list[Tensor]) -> tuple[Tensor, ...]:
    out = way[0]()
    like = [u if u.shape == t.shape else u.transpose(1, 2) for u, t in zip(up, out, strict=True)]
    return torch.autograd.grad(out, way[1], like)


def forward(way: Way) -> Any:
    with torch.no_grad():
        return way[0]()


def measure() -> Iterator[dict[str, Any]]:
    rate = 1e12 * ceilings().copy_tbs
    x, turning = inputs(HEADS, B, T, DTYPE, "half")
    turned = B * T * (HEADS.queries + HEADS.keys) * HEADS.width * DTYPE.itemsize
    found = ways(x, turning)
    up = [torch.randn_like(t.transpose(1, 2).contiguous()).transpose(1, 2) for t in forward(found[OURS])]
    as_made = [u.contiguous() for u in up]
    ups = {name: as_made if "compile" in name else up for name in found}
    cases = {
        "fwd": ({name: (lambda way=way: forward(way)) for name, way in found.items()}, 2 * turned),
        "fwd+bwd": (
            {name: (lambda way=way, up=ups[name]: step(way, up)) for name, way in found.items()},
            2 * turned + 2 * x.nbytes,
        ),
    }
    for what, (runs, moved) in cases.items():
        times = interleaved(replayed(runs, REPEAT), rounds=9, warmup=2)
        ms = {name: 1e3 * median / REPEAT for name, (median, _) in times.items()}
        for ours in (OURS, COMPILED):
            more = {"spread": round(1e3 * times[ours][1] / REPEAT, 4), "floor": round(1e3 * moved / rate, 4)}
            for peer in (name for name in ms if name not in (OURS, COMPILED)):
                case = f"{ours}, {B} x {T} tokens, heads 32|8|8 of 64 {what}"
                yield row(case, "ms", round(ms[ours], 4), round(ms[peer], 4), peer, smaller=True, **more)


if __name__ == "__main__":
    main(__file__)
