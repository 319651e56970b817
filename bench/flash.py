"""FLASH's mixed chunk attention on CUDA: first the same numbers as the fp64 twin, then time beside plain torch and softmax.

`python bench/flash.py --sweep` instead times both kernels in other tiles, and says what each kernel of a step takes.

Widths are those of a model of 768: keys of 128, values of 1536, chunks of 256. Peers: the same operation in plain torch
(under autocast, which is how it is fastest), and causal softmax attention whose heads of 128 have as many values in all
(flash-linear-attention has no such operation). Floor: the longer of moving each input and output once, at the rate of a
copy, and of the products that no way can spare, at the rate of a large product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import ceilings, interleaved, often, row
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tuning import compiled_choices, main_or_sweep, ranked, workers

from dovetail.kernels.mixed_chunk import Heads, chunked, mixed_chunk, plan, reference, triton
from dovetail.parts.context import Context

BENCHMARK = {"device": "cuda", "minutes": 2, "writes": "flash_kernel"}
D, E, CHUNK, TOKENS, REPEAT = 128, 1536, 256, 65536, 5  # REPEAT: calls queued between two synchronisations
SCALE = CHUNK**-0.5

# dtype, T, chunk, D, E, sort, causal
CHECKS = [
    (torch.bfloat16, 1024, 256, 128, 1536, "plain", True), (torch.bfloat16, 1000, 256, 128, 768, "plain", True),
    (torch.bfloat16, 1000, 256, 128, 768, "plain", False), (torch.bfloat16, 1000, 64, 64, 200, "plain", True),
    (torch.bfloat16, 1500, 512, 128, 384, "packed", True), (torch.bfloat16, 1024, 256, 128, 768, "packed", True),
    (torch.bfloat16, 1500, 200, 128, 384, "plain", True), (torch.bfloat16, 700, 256, 256, 512, "plain", True),
    (torch.bfloat16, 1100, 256, 128, 384, "padded", True), (torch.float16, 1000, 256, 128, 384, "packed", True),
    (torch.float32, 700, 256, 128, 768, "plain", True), (torch.float32, 700, 128, 128, 384, "packed", True),
    (torch.float32, 700, 256, 128, 384, "plain", False), (torch.float32, 300, 64, 256, 200, "plain", True),
]  # fmt: skip
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}


def inputs(B: int, T: int, D: int, E: int, dtype: torch.dtype) -> tuple[Heads, Tensor]:
    """As the mixer has them: views of two that are stacked, and values beside others."""
    q, k = (torch.randn(B, T, 2, D, device="cuda").to(dtype) for _ in range(2))
    v = torch.randn(B, T, 2 * E, device="cuda", dtype=dtype)[..., :E]
    views = (q[:, :, 0], k[:, :, 0], q[:, :, 1] * D**-0.5, k[:, :, 1])
    return Heads(*(t.detach().requires_grad_() for t in views)), v.requires_grad_()


def context(sort: str, B: int, T: int) -> Context:
    """Whole rows, rows padded on the left, or documents with padding between and inside them."""
    device = torch.device("cuda")
    if sort == "padded":
        hidden = torch.arange(T, device=device) < torch.tensor([[T // 2], [3]], device=device)
        return Context.of(B, T, device, attention_mask=~hidden)
    if sort == "packed":
        hidden = torch.rand(B, T, device=device) < 0.05
        number = (torch.rand(B, T, device=device) < 0.004).long().cumsum(1)
        return Context.of(B, T, device, segments=number, attention_mask=~hidden)
    return Context.of(B, T, device)


def checked(case: tuple[torch.dtype, int, int, int, int, str, bool]) -> str:
    """One line of errors relative to the largest number, against fp64. Both parts of the sum are made of about one size."""
    dtype, T, chunk, D, E, sort, causal = case
    torch.manual_seed(0)
    (heads, v), ctx = inputs(2, T, D, E, dtype), context(sort, 2, T)
    known: dict[str, Any] = {"chunk": chunk, "causal": causal, "scale": D**-0.5, "segments": ctx.segments}
    facts = {"segments": not ctx.aligned, "state": False, "device": "cuda", "width": D, "dtype": dtype}
    assert plan(T, chunk=chunk, causal=causal, **facts).path == "triton"
    real = 1 if ctx.segments is None else (ctx.segments >= 0)[..., None]
    out = mixed_chunk(heads, v, **known, order=ctx.order, plain=ctx.aligned)[0]
    up = torch.randn(out.shape, device="cuda").to(out.dtype) * real
    found = (out * real, *torch.autograd.grad(out, [*heads, v], up))
    wide = [t.detach().double().requires_grad_() for t in (*heads, v)]
    twin = reference.mixed_chunk(*wide, **known, order=ctx.order.expand(2, T))
    expected = (twin * real, *torch.autograd.grad(twin, wide, up.double()))
    errors = {n: _error(a, b) for n, a, b in zip(("out", "dq", "dk", "dq'", "dk'", "dv"), found, expected, strict=True)}
    for name, error in errors.items():
        assert error < TOLERANCE[dtype], (case, name, error)
    line = " ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return f"{str(dtype)[6:]:8} T{T} chunk {chunk} D{D} E{E} {sort:6} causal={causal!s:5} {line}"


def _error(a: Tensor, b: Tensor) -> float:
    assert a.isfinite().all()
    return ((a.double() - b).abs().max() / b.abs().max()).item()


def check() -> None:
    """Each case in a process of its own: most of the time is compiling."""
    with workers() as pool:
        for line in pool.map(checked, CHECKS):
            print(line, flush=True)


def ours(heads: Heads, v: Tensor) -> Tensor:
    order = torch.arange(v.shape[1], device="cuda")[None]
    return mixed_chunk(heads, v, chunk=CHUNK, causal=True, scale=SCALE, order=order, plain=True)[0]


def in_torch(heads: Heads, v: Tensor) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        return chunked.plain(*heads, v, CHUNK, True, SCALE)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B,T,H,128)."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def milliseconds(T: int, rounds: int) -> dict[str, dict[str, float]]:
    """{"fwd" | "fwd+bwd": {way: median milliseconds}}, bf16."""
    B = TOKENS // T
    heads, v = inputs(B, T, D, E, torch.bfloat16)
    qkv = [torch.randn(B, T, E // 128, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    up = torch.randn(B, T, E, device="cuda", dtype=torch.bfloat16)
    ways: dict[str, tuple[Callable[[], Tensor], list[Tensor], Tensor]] = {
        "ours": (lambda: ours(heads, v), [*heads, v], up),
        "plain torch": (lambda: in_torch(heads, v), [*heads, v], up.float()),
        "SDPA cuDNN": (lambda: softmax(*qkv), qkv, up.view_as(qkv[2])),
    }
    with torch.no_grad():
        found = {"fwd": interleaved({n: often(run, REPEAT) for n, (run, _, _) in ways.items()}, rounds, warmup=2)}
    steps = {n: often(lambda w=way: torch.autograd.grad(w[0](), w[1], w[2]), REPEAT) for n, way in ways.items()}
    found["fwd+bwd"] = interleaved(steps, rounds, warmup=2)
    return {what: {n: 1e3 * t[0] / REPEAT for n, t in times.items()} for what, times in found.items()}


def measure() -> Iterator[dict[str, Any]]:
    limits = ceilings("cuda")
    for T in (2048, 8192, 32768):
        for what, times in milliseconds(T, rounds=9).items():
            size = 2 * (4 * D + 2 * E) if what == "fwd" else 2 * (12 * D + 5 * E)
            # Half of a chunk's pairs; matrices are summed and read, and backward read three times and summed once more.
            work = 4 * D * E + CHUNK * (D + E) if what == "fwd" else 12 * D * E + CHUNK * (4 * D + 3 * E)
            seconds = TOKENS * max(size / (1e12 * limits.copy_tbs), work / (1e12 * limits.bf16_matmul_tflops))
            for peer in ("plain torch", "SDPA cuDNN"):
                case = f"B{TOKENS // T} T{T} keys {D} values {E} chunk {CHUNK} {what}"
                yield row(case, "ms", times["ours"], times[peer], peer, smaller=True, floor=round(1e3 * seconds, 3))


SWEEP = {
    "reads": [triton.Tiles(r, k, c, w, s) for r, k, c, w, s in (
        (128, 64, 256, 8, 2), (128, 64, 256, 8, 3), (128, 64, 128, 8, 2), (128, 64, 128, 8, 3), (128, 64, 128, 4, 2),
        (128, 128, 128, 8, 2), (128, 128, 256, 8, 1), (64, 64, 256, 4, 2), (64, 64, 256, 4, 3), (64, 64, 128, 4, 3),
        (128, 32, 256, 8, 3),
    )],
    "slopes": [triton.Tiles(r, k, c, w, s) for r, k, c, w, s in (
        (128, 64, 64, 8, 3), (128, 64, 64, 8, 4), (128, 64, 128, 8, 2), (128, 128, 64, 8, 2), (128, 128, 128, 8, 2),
        (64, 64, 64, 4, 3), (64, 64, 128, 4, 2), (64, 128, 64, 4, 3), (64, 128, 128, 8, 2), (64, 256, 64, 8, 2),
        (128, 256, 64, 8, 2),
    )],
}  # fmt: skip


def one(name: str, tiles: triton.Tiles) -> Callable[[], Any]:
    """Both ways of a kernel, so tiled, at T8192."""
    triton.TILES[name, True] = tiles
    (q, k, lq, lk), v = inputs(TOKENS // 8192, 8192, D, E, torch.bfloat16)
    q, k, lq, lk, v, up = (t.detach() for t in (q, k, lq, lk, v, torch.randn_like(v)))
    call, out = triton._Call(v, None, None, None, CHUNK, True, SCALE), torch.empty_like(v)
    there, back = call.states(lk, v, reverse=False), call.states(lq, up, reverse=True)

    def reads() -> None:
        call.reads(q, k, v, lq, lk, there, out, reverse=False)
        call.reads(k, q, up, lk, lq, back, out, reverse=True)

    da, dla = torch.empty_like(q), torch.empty_like(q)

    def slopes() -> None:
        call.slopes(q, k, lk, up, v, there, da, dla, reverse=False)
        call.slopes(k, q, lq, v, up, back, da, dla, reverse=True)

    return reads if name == "reads" else slopes


def compiled(job: tuple[str, triton.Tiles]) -> str:
    """Compiles into the cache on disk; empty where it could, else why not."""
    try:
        one(*job)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return ""


def sweep() -> None:
    jobs = [(name, tiles) for name, choices in SWEEP.items() for tiles in choices]
    kept = dict(triton.TILES)
    failed = compiled_choices(compiled, jobs)
    for name, choices in SWEEP.items():
        times: dict[triton.Tiles, float] = {}
        for tiles in choices:
            if failed[name, tiles]:
                print(f"{name:8} {tiles}: {failed[name, tiles]}")
                continue
            times[tiles] = interleaved({"": often(one(name, tiles), REPEAT)}, rounds=5, warmup=1)[""][0] / REPEAT
        ranked(f"{name:8} both ways", times, kept[name, True])
    triton.TILES.update(kept)
    heads, v = inputs(TOKENS // 8192, 8192, D, E, torch.bfloat16)
    up = torch.randn_like(v)
    torch.autograd.grad(ours(heads, v), [*heads, v], up)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(ours(heads, v), [*heads, v], up)
        torch.cuda.synchronize()
    print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=12, max_name_column_width=40))


if __name__ == "__main__":
    main_or_sweep(__file__, sweep)
