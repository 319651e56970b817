"""Products with weights in int8, int4 and NF4 codes at decoding's sizes (Llama-3-8B's maps, 1 to 32 vectors) on CUDA,
against cuBLAS in bf16 and torch's own int4 product.

First every path equals the fp64 product with the dequantised weight. Then each case is a CUDA graph of one call for each
of many copies of the weight, more than the cache holds, so that a call reads its weight from memory, as a layer does
whose turn comes once a token. The floor reads what must be read once, at the rate of a copy.

`python bench/quantised_linear.py --sweep` tells which tiles are best; `--tiny` runs all of it at small sizes, anywhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

if "--tiny" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from common import captured, ceilings, interleaved, main, often, replayed, row
from torch import Tensor
from torch.nn import functional as F
from tuning import workers

from dovetail.kernels import quantise
from dovetail.kernels.quantise import reference
from dovetail.parts.storage.base import Stored
from dovetail.spec import Spec

BENCHMARK = {"device": "cuda", "packages": {"triton": "triton"}, "minutes": 4}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))  # in, out
ROWS = (1, 8, 32)
KINDS: dict[str, Any] = {
    "int8": "int8", "int4": {"kind": "int4", "block": 128}, "int4, 32": {"kind": "int4", "block": 32},
    "nf4": {"kind": "nf4", "double": False},
}  # fmt: skip
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}
ROUNDS = 9 if DEVICE == "cuda" else 1
COLD = 256 * 2**20  # bytes of weights in turn: five times the second-level cache
NARROW = torch.bfloat16 if DEVICE == "cuda" else torch.float32
CUBLAS, TORCH_INT4, INDUCTOR_INT8 = "cuBLAS bf16", "torch _weight_int4pack_mm", "torch.compile, as torchao's int8"
Call = Callable[[], Tensor]


def stored(spec: Any, width: int, out: int) -> Stored:
    parsed: Any = Spec.parse("storage", spec)
    return parsed.store(torch.randn(out, width, device=DEVICE) * width**-0.5)


def check() -> None:
    """Ours in every type, with and without bias; then through graphs and compiled. Each case in a process of its own,
    since most of the time is compiling."""
    cases = [(width, out, name) for width, out in ((4096, 4096), (14336, 512), (1024, 1000)) for name in KINDS]
    with workers() as pool:
        for line in pool.map(checked, cases):
            print(line, flush=True)
    _graphed_and_compiled(1024, 4096)


@torch.no_grad()
def checked(case: tuple[int, int, str]) -> str:
    """Largest error over the largest output, against x in fp64 times the weight that the codes say; torch's int4 too."""
    width, out, name = case
    torch.manual_seed(0)
    weight = stored(KINDS[name], width, out)
    assert quantise.plan_linear("cuda", 1, torch.float16, weight.group, width).path == "triton", case
    wide, codes, found = weight.dense(torch.float64), weight.rows(), {}

    def note(who: str, y: Tensor, expected: Tensor) -> None:
        who = f"{who} {str(y.dtype).removeprefix('torch.')}"
        found[who] = max(found.get(who, 0.0), float((y.double() - expected).abs().max() / expected.abs().max()))

    for dtype in (torch.bfloat16, torch.float16, torch.float32)[DEVICE == "cpu" :]:
        for count in (1, 2, 8, 17, 32) if dtype == NARROW and width == 4096 else (1, 3, 32):
            x = torch.randn(count, width, device=DEVICE).to(dtype)
            for bias in (None, torch.randn(out, device=DEVICE).to(dtype)):
                expected = x.double() @ wide.t() + (0 if bias is None else bias.double())
                note("ours", quantise.linear(x, codes, bias), expected)
                note("twin", reference.linear(x, codes, bias), expected)
    theirs = torch_int4(weight) if name == "int4" else None
    if theirs is not None:
        x = torch.randn(8, width, device=DEVICE).to(NARROW)
        note(TORCH_INT4, theirs[0](x), x.double() @ theirs[1].double().t())
    text = "  ".join(f"{who} {error:.1e}" for who, error in found.items())
    assert all(error < TOLERANCE[who.split()[-1]] for who, error in found.items()), (case, text)
    return f"{width} to {out}, {name}: {text}"


@torch.no_grad()
def _graphed_and_compiled(width: int, out: int) -> None:
    how: dict[str, Any] = {} if DEVICE == "cuda" else {"backend": "aot_eager"}
    for name, spec in KINDS.items():
        codes = stored(spec, width, out).rows()
        for count in (1, 8):
            x = torch.randn(count, width, device=DEVICE).to(NARROW)
            eager = quantise.linear(x, codes)
            torch.compiler.reset()
            compiled = torch.compile(lambda x, codes=codes: quantise.linear(x, codes), fullgraph=True, **how)
            assert torch.equal(compiled(x), eager), f"{name}: compiled differs"
            found: list[Tensor] = []
            replay = captured(lambda x=x, codes=codes, found=found: found.append(quantise.linear(x, codes)))
            replay()
            assert torch.equal(found[-1], eager), f"{name}: graphed differs"
    print("compiled and in CUDA graphs: the same bits", flush=True)


def torch_int4(weight: Stored) -> tuple[Callable[[Tensor], Tensor], Tensor] | None:
    """(x -> y, the weight that it has) of the product that torchao's int4 calls; None where it does not run."""
    codes, width = weight.rows(), weight.shape[1]
    assert codes.zero is not None
    # (code - 8) · scale + zero
    scale, zero = codes.scale.float(), (8 - codes.zero.float()) * codes.scale.float()
    both = torch.stack([scale, zero], 2).transpose(0, 1).contiguous().to(NARROW)
    suffix, given = ("", codes.codes) if DEVICE == "cuda" else ("_for_cpu", _unpacked(codes.codes).int())
    run: Any = getattr(torch.ops.aten, f"_weight_int4pack_mm{suffix}")
    try:
        packed = getattr(torch.ops.aten, f"_convert_weight_to_int4pack{suffix}")(given, 8)
        run(torch.zeros(1, width, device=DEVICE, dtype=NARROW), packed, codes.block, both)
    except RuntimeError as error:
        print(f"{TORCH_INT4} does not run: {str(error).splitlines()[0][:120]}", flush=True)
        return None
    value, wide = (_unpacked(codes.codes).float() - 8).view(*scale.shape, codes.block), both.float().transpose(0, 1)
    return (lambda x: run(x, packed, codes.block, both)), (value * wide[..., :1] + wide[..., 1:]).flatten(1)


def inductor_int8(x: Tensor, weight: Stored) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """(x, codes, scale) -> y as torchao's int8 writes it, for torch.compile to fuse; None where that fails or differs."""
    codes = weight.rows()

    def product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x, codes.to(x.dtype)) * scale

    how: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs"} if DEVICE == "cuda" else {"backend": "aot_eager"}
    torch.compiler.reset()
    run: Any = torch.compile(product, **how)
    try:
        y = run(x, codes.codes, (codes.scale[:, 0] * codes.factor).to(x.dtype))
        torch.testing.assert_close(y.float(), reference.linear(x, codes).float(), rtol=5e-2, atol=5e-2)
    except Exception as error:  # whatever the compiler says
        print(f"{INDUCTOR_INT8} does not run: {type(error).__name__} {str(error)[:120]}", flush=True)
        return None
    return run


def _unpacked(codes: Tensor) -> Tensor:
    return torch.stack([codes >> 4, codes & 15], 2).flatten(1)


def microseconds(ways: dict[str, tuple[list[Call], float]], rounds: int = ROUNDS) -> dict[str, tuple[float, float]]:
    """{way: (median, spread)} of one call; ways: name -> (calls in turn, bytes of one's weight)."""
    graphs = replayed({name: lambda calls=calls: [call() for call in calls] for name, (calls, _) in ways.items()})
    turns = {name: max(1, 400 // len(calls)) for name, (calls, _) in ways.items()} if DEVICE == "cuda" else {}
    cases = {name: often(run, turns.get(name, 1)) for name, run in graphs.items()}
    found = interleaved(cases, rounds, warmup=2)
    each = {name: len(calls) * turns.get(name, 1) for name, (calls, _) in ways.items()}
    return {name: (1e6 * t / each[name], 1e6 * s / each[name]) for name, (t, s) in found.items()}


def in_turn(make: Callable[[], Any], size: float, cold: float) -> list[Any]:
    """So many of a weight that they do not fit in the cache together."""
    return [make() for _ in range(max(2, round(cold / size)))]


@torch.no_grad()
def timed(width: int, out: int, count: int, cold: float) -> Iterator[dict[str, Any]]:
    """A row for each kind against bf16, and for each peer of that kind."""
    dtype = NARROW
    x = torch.randn(count, width, device=DEVICE).to(dtype)
    dense = in_turn(lambda: torch.randn(out, width, device=DEVICE).to(dtype), 2 * width * out, cold)
    bf16 = [lambda w=w: F.linear(x, w) for w in dense], float(dense[0].nbytes)
    rate = ceilings(DEVICE).copy_tbs * 1e12
    print(f"{width} to {out}, {count} vectors, {CUBLAS}: {len(dense)} weights in turn", flush=True)
    for name, spec in KINDS.items():
        first = stored(spec, width, out)
        size = first.bits_per_weight / 8 * width * out
        weights = [first, *in_turn(lambda spec=spec: stored(spec, width, out), size, cold)[1:]]
        rows = [w.rows() for w in weights]
        ways = {CUBLAS: bf16, name: ([lambda r=r: quantise.linear(x, r) for r in rows], size)}
        peers: dict[str, list[Call]] = {}
        if name == "int4":
            made = [p[0] for w in weights if (p := torch_int4(w)) is not None]
            peers[TORCH_INT4] = [lambda p=p: p(x) for p in made]
        if name == "int8" and count == 1 and (compiled := inductor_int8(x, first)) is not None:
            scales = [(r.scale[:, 0] * r.factor).to(dtype) for r in rows]
            peers[INDUCTOR_INT8] = [lambda r=r, s=s: compiled(x, r.codes, s) for r, s in zip(rows, scales, strict=True)]
        ways |= {who: (calls, size) for who, calls in peers.items() if calls}
        times = microseconds(ways)
        mine, spread = times[name]
        least = (size + (width + out) * count * 2) / rate * 1e6
        more = {
            "floor": round(least, 2), "spread": round(spread, 3), "gb_per_s": round(size / mine / 1e3),
            "peer_gb_per_s": round(bf16[1] / times[CUBLAS][0] / 1e3), "bits_per_weight": round(first.bits_per_weight, 3),
        }  # fmt: skip
        case = f"{name}, {width} to {out}, {count} vector{'s' * (count > 1)}"
        yield row(
            case,
            "µs",
            *(round(times[n][0], 2) for n in (name, CUBLAS)),
            CUBLAS,
            smaller=True,
            **more,
        )
        for who in ways.keys() & peers.keys():
            yield row(case, "µs", round(mine, 2), round(times[who][0], 2), who, smaller=True, floor=more["floor"])


def measure() -> Iterator[dict[str, Any]]:
    """Every map at 1, 8 and 32 vectors; what was the way before (dequantise, then cuBLAS) once."""
    for width, out in SHAPES:
        for count in ROWS:
            yield from timed(width, out, count, COLD)
    yield from dequantised(4096, 4096, COLD)


@torch.no_grad()
def dequantised(width: int, out: int, cold: float) -> Iterator[dict[str, Any]]:
    """One vector, by codes and by the dense weight made anew for every call."""
    x = torch.randn(1, width, device=DEVICE).to(NARROW)
    for name, spec in KINDS.items():
        weights = in_turn(lambda spec=spec: stored(spec, width, out), width * out, cold)
        fused: list[Call] = [lambda w=w: quantise.linear(x, w.rows()) for w in weights]
        whole: list[Call] = [lambda w=w: F.linear(x, w.dense(x.dtype)) for w in weights]
        size = weights[0].bits_per_weight / 8 * width * out
        times = microseconds({"codes": (fused, size), "dense": (whole, size)})
        case, (mine, other) = f"{name}, {width} to {out}, 1 vector", (round(times[n][0], 2) for n in ("codes", "dense"))
        yield row(case, "µs", mine, other, "ours, dequantised for each call", smaller=True)


@cache
def tiles() -> dict[str, list[Any]]:
    from dovetail.kernels.quantise.triton_linear import Tiles

    vector = [Tiles(r, b, w, s) for r in (2, 4, 8) for b in (512, 1024, 2048) for w in (4, 8) for s in (1, 3)]
    product = [Tiles(r, b, w, s) for r in (16, 32, 64) for b in (64, 128) for w in (2, 4) for s in (3, 5)]
    return {"vector": vector, "product": product}


@torch.no_grad()
def sweep(shapes: Any = ((4096, 4096), (4096, 28672)), cold: float = COLD, some: int = 1000) -> None:
    """Microseconds of each choice of tiles, one vector and eight; then of FILL, eight vectors."""
    from dovetail.kernels.quantise import triton_linear

    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    for name in ("int8", "int4"):
        make = [partial(stored, KINDS[name], *shape) for shape in shapes]
        sizes = [width * out / 2 for width, out in shapes]
        made = {s: [w.rows() for w in in_turn(m, n, cold)] for s, m, n in zip(shapes, make, sizes, strict=True)}

        def times(count: int, made: Any = made) -> list[float]:
            found = []
            for (width, _), rows in made.items():
                x = torch.randn(count, width, device=DEVICE).to(dtype)
                calls: list[Call] = [lambda r=r, x=x: quantise.linear(x, r) for r in rows]
                found.append(microseconds({"": (calls, 1.0)}, rounds=min(3, ROUNDS))[""][0])
            return found

        for what, table, count in (("vector", triton_linear.VECTOR, 1), ("product", triton_linear.PRODUCT, 8)):
            kept, results = table[name], []
            for choice in tiles()[what][:some]:
                table[name] = choice
                try:
                    results.append((times(count), choice))
                except Exception as reason:  # what does not fit says so
                    print(name, choice, type(reason).__name__, str(reason)[:80], flush=True)
            table[name] = kept
            print(f"{name}, {count} vectors, {shapes}; chosen now {kept}: {[round(t, 2) for t in times(count)]} µs")
            for found, choice in sorted(results, key=lambda r: sum(r[0]))[:6]:
                print(f"  {choice} {[round(t, 2) for t in found]}", flush=True)
        fill = triton_linear.FILL
        for programs in (128, 256, 512, 1024):
            triton_linear.FILL = programs
            print(f"{name}, 8 vectors, FILL {programs}: {[round(t, 2) for t in times(8)]}", flush=True)
        triton_linear.FILL = fill


def tiny() -> None:
    """All of it at sizes where nothing is measured: that it runs."""
    for name in KINDS:
        print(checked((256, 32, name)))
    for one in (*timed(256, 32, 1, 2**12), *timed(256, 32, 2, 2**12), *dequantised(256, 32, 2**12)):
        print(one)
    _graphed_and_compiled(128, 32)
    sweep(((256, 32),), 2**12, some=1)


if __name__ == "__main__":
    torch.manual_seed(0)
    if "--tiny" in sys.argv:
        tiny()
    elif "--sweep" in sys.argv:
        sweep()
    else:
        main(__file__)
