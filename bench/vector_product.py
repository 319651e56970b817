"""Products with one vector on CUDA in bf16, at the sizes of Llama-3.2-1B's and Llama-3-8B's maps, against cuBLAS and torch's
compiler: alone, and with the norm before, the gate over the halves or the residual sum that a decoding step has beside them.

First results against fp64. A case is a CUDA graph of one call for each of many weights, more than the cache holds, so that a
call reads its weight from memory. Floor: the weight read once at the measured rate of copies.

`python bench/vector_product.py --sweep` times rows, columns and warps of a program.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from common import ceilings, interleaved, main, replayed, row
from torch import Tensor
from torch.nn import functional as F

from dovetail.kernels.gate import reference
from dovetail.kernels.linear import vector

BENCHMARK = {"device": "cuda", "packages": {"triton": "triton"}, "minutes": 2}
DEVICE, DTYPE, EPS, COLD = "cuda", torch.bfloat16, 1e-5, 2**29  # COLD: bytes of weights in one graph, at least
SEARCHED = {"coordinate_descent_tuning": True}
Call = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Map:
    """rows, width: of W. beside: "norm", "gate" (with a norm), "sum", or "" for nothing."""

    name: str
    rows: int
    width: int
    beside: str = ""


MAPS = [
    Map("1B qkv", 3072, 2048, "norm"), Map("1B out", 2048, 2048, "sum"), Map("1B gate and up", 16_384, 2048, "gate"),
    Map("1B down", 2048, 8192, "sum"), Map("1B head", 128_256, 2048), Map("1B head and norm", 128_256, 2048, "norm"),
    Map("8B qkv", 6144, 4096, "norm"), Map("8B out", 4096, 4096, "sum"), Map("8B gate and up", 28_672, 4096, "gate"),
    Map("8B down", 4096, 14_336, "sum"), Map("8B head", 128_256, 4096),
]  # fmt: skip


def given(each: Map) -> list[Tensor]:
    """x, the norm's weight, and what is added."""
    return [torch.randn(n, device=DEVICE).to(DTYPE) for n in (each.width, each.width, each.rows)]


def formula(each: Map, x: Tensor, scale: Tensor, residual: Tensor) -> Call:
    """In plain torch."""

    def run(w: Tensor) -> Tensor:
        y = F.linear(F.rms_norm(x, (each.width,), scale, EPS) if each.beside in ("norm", "gate") else x, w)
        y = reference.gated(y, "silu") if each.beside == "gate" else y
        return y + residual if each.beside == "sum" else y

    return run


def ours(each: Map, x: Tensor, scale: Tensor, residual: Tensor) -> Call:
    how = (
        scale if each.beside in ("norm", "gate") else None, EPS, "silu" if each.beside == "gate" else None,
        residual if each.beside == "sum" else None, True,
    )  # fmt: skip
    return lambda w: vector.step(x, w, *how)


def check() -> None:
    for name, rows, width in (("even", 3072, 2048), ("long", 64, 14_336), ("ragged", 34, 1030)):
        for beside in ("", "norm", "gate", "sum"):
            torch.manual_seed(0)
            each = Map(name, rows, width, beside)
            w, beside_it = (torch.randn(rows, width, device=DEVICE) / width**0.5).to(DTYPE), given(each)
            found = ours(each, *beside_it)(w).double()
            right = formula(each, *(t.double() for t in beside_it))(w.double())
            far = ((found - right).abs() / (right.abs() * 2**-8 + 1e-4)).max().item()
            print(f"{name} {beside or 'alone'}: at most {far:.2f} roundings from fp64", flush=True)
            assert far < 1.1, (name, beside, far)


def timed(each: Map, ways: dict[str, Call]) -> dict[str, tuple[float, float]]:
    """Microseconds of a call, and their spread."""
    weights = [
        torch.randn(each.rows, each.width, device=DEVICE, dtype=DTYPE)
        for _ in range(max(2, -(-COLD // (2 * each.rows * each.width))))
    ]
    runs = {name: (lambda way=way: [way(w) for w in weights]) for name, way in ways.items()}
    with torch.no_grad():
        times = interleaved(replayed(runs), rounds=9, warmup=2)
    return {
        name: (1e6 * median / len(weights), 1e6 * spread / len(weights)) for name, (median, spread) in times.items()
    }


def measure(maps: Sequence[Map] = MAPS) -> Iterator[dict[str, Any]]:
    rate = 1e12 * ceilings().copy_tbs
    for each in maps:
        torch.compiler.reset()
        beside_it = given(each)
        plain = formula(each, *beside_it)
        ways = {"ours": ours(each, *beside_it), "torch, cuBLAS": plain}
        us = timed(each, ways | {"torch.compile": torch.compile(plain, fullgraph=True, options=SEARCHED)})
        size = each.rows * each.width * DTYPE.itemsize
        for peer in list(us)[1:]:
            yield row(
                f"{each.name}{f', {each.beside}' if each.beside else ''}", "us", round(us["ours"][0], 2),
                round(us[peer][0], 2), peer, smaller=True, spread=round(us["ours"][1], 2),
                floor=round(1e6 * size / rate, 2), tb_s=round(size / us["ours"][0] / 1e6, 2),
            )  # fmt: skip


def sweep() -> None:
    for each in MAPS:
        found = []
        for rows, columns, warps in itertools.product((1, 2, 4, 8), (512, 1024, 2048), (1, 2, 4, 8)):
            if 8 <= rows * columns // (32 * warps) <= 128:
                tile = vector.Launch(rows, columns, warps)
                with mock.patch.object(vector, "launch", lambda *_, tile=tile: tile):
                    found.append((timed(each, {"ours": ours(each, *given(each))})["ours"][0], tile))
        for us, tile in sorted(found)[:12]:
            print(f"{each.name} {each.beside}: {us:.2f} us, {tile}", flush=True)


if __name__ == "__main__":
    if "--sweep" in sys.argv:
        sweep()
    else:
        main(__file__)
