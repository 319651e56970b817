"""Gated linear attention on CUDA: first the same numbers as in fp64, then milliseconds beside flash-linear-attention.

`python bench/gated_linear.py --sweep` instead times the launches of each kernel at D128, T8192 (and prints them).

The peer is fla.ops.gla.chunk_gla; its kernels tune themselves at their first call, which
takes minutes unless they are compiled at once, as here.

Bytes, in units of u = tokens · heads · 128 · 2 bytes (268 MB for 64k tokens of 16 heads), D = Dv = 128, bf16 with log α in
fp32: no kernel can move less than 6u forward (q, k, v, log α, o) and 11u backward (those and do; dq, dk, dv, dlog α):
17u = 4.6 GB, 1.1 ms at 4.2 TB/s. Ours writes a state in bf16 for every 64 tokens (2u): a walk is 6u, the outputs 8u, dv
8u, dq, dk and dlog α 14u; so 14u forward, 34u backward, 48u = 12.9 GB in all, 3.1 ms. (States in fp32 for every 64 tokens,
with scores, sums and partial gradients kept in fp32 between kernels, come to about 90u.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from common import interleaved, often, row
from torch import Tensor
from torch.nn import functional as F
from tuning import compiled_at_once, compiled_choices, main_or_sweep, ranked, workers

from dovetail.kernels.gated_linear import gated_linear, reference, triton

BENCHMARK = {"device": "cuda", "packages": {"triton": "triton", "fla": "flash-linear-attention"}, "minutes": 5}
TOKENS, HEADS = 65536, 16
REPEAT = 5  # calls queued between two synchronisations
PEER = "fla chunk_gla"


def inputs(
    B: int, T: int, H: int, D: int, Dv: int, dtype: torch.dtype, decay: torch.dtype, strong: bool
) -> list[Tensor]:
    """q, k, v, log α as (B,T,H,W). strong: one token in twenty forgets everything."""
    q, k, v = (torch.randn(B, T, H, w, device="cuda", dtype=dtype) for w in (D, D, Dv))
    g = F.logsigmoid(torch.randn(B, T, H, D, device="cuda"))
    if strong:
        g = torch.where(torch.rand(B, T, H, 1, device="cuda") < 0.05, -30.0, g)
    return [t.requires_grad_() for t in (q, k, v, g.to(decay))]


def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    o, end = gated_linear(*(t.transpose(1, 2) for t in (q, k, v, g)), **more)
    return o.transpose(1, 2), end


# D, Dv, dtype, packed, strong
CHECKS = [
    (128, 128, torch.bfloat16, False, False), (128, 128, torch.bfloat16, True, True), (64, 64, torch.bfloat16, True, False),
    (64, 128, torch.bfloat16, False, True), (256, 256, torch.bfloat16, True, True), (40, 72, torch.bfloat16, False, True),
    (128, 128, torch.float16, True, True), (128, 128, torch.float32, True, True), (256, 256, torch.float32, False, True),
    (33, 7, torch.float32, True, False),
]  # fmt: skip
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 3e-5}


def checked(case: tuple[int, int, torch.dtype, bool, bool]) -> str:
    """One line of errors relative to the largest number, ours and (where it can run) the peer's, against fp64."""
    D, Dv, dtype, packed, strong = case
    torch.manual_seed(0)
    B, T, H = 2, 2100 if D == 128 else 300, 2  # 2100: enough chunks for segments
    given = inputs(B, T, H, D, Dv, dtype, torch.float32, strong)
    start = torch.randn(B, H, D, Dv, device="cuda", requires_grad=True)
    reset = torch.rand(B, T, device="cuda") < 0.01 if packed else None
    found = ours(*given, start=start, reset=reset)
    ups = [torch.randn_like(t) for t in found]
    mine = [*found, *torch.autograd.grad(found, [*given, start], ups)]
    wide = [t.detach().double().requires_grad_() for t in (*given, start)]
    q, k, v, g = (t.transpose(1, 2) for t in wide[:4])
    o, end = reference.gated_linear(q * D**-0.5, k, v, g, wide[4], reset)
    twin = o.transpose(1, 2), end
    truth = [*twin, *torch.autograd.grad(twin, wide, [u.double() for u in ups])]
    names = ("o", "S_T", "dq", "dk", "dv", "dlog", "dS_0")
    errors = dict(zip(names, map(_error, mine, truth), strict=True))
    for name, error in errors.items():
        assert error < TOLERANCE[dtype], (case, name, error)
    line = " ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return f"D{D} Dv{Dv} {str(dtype)[6:]:8} packed={packed!s:5} strong={strong!s:5} {line}"


def _error(a: Tensor, b: Tensor) -> float:
    assert a.isfinite().all()
    return ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-9)).item()


def check() -> None:
    """Each case in a process of its own: most of the time is compiling."""
    with workers() as pool:
        for line in pool.map(checked, CHECKS):
            print(line, flush=True)


def measure() -> Iterator[dict[str, Any]]:
    from fla.ops.gla import chunk_gla  # type: ignore[import-not-found]

    compiled_at_once(first_call, partial(first_call, 64))
    single, half = torch.float32, torch.bfloat16
    cases = [(2048, 128, single), (8192, 128, single), (32768, 128, single), (8192, 128, half), (8192, 64, single)]
    for (T, D, decay), strong in [*((case, False) for case in cases), ((8192, 128, single), True)]:
        q, k, v, g = given = inputs(TOKENS // T, T, HEADS, D, D, half, decay, strong)
        up = torch.randn_like(v)
        ways: dict[str, Callable[[], Tensor]] = {"ours": lambda: ours(q, k, v, g)[0]}  # noqa: B023
        ways[PEER] = lambda: chunk_gla(q, k, v, g)[0]  # noqa: B023
        print(f"T{T} D{D}: ours - fla, relative to the largest: {_error(ways['ours'](), ways[PEER]().double()):.1e}")
        steps = {n: (lambda run=run: torch.autograd.grad(run(), given, up)) for n, run in ways.items()}  # noqa: B023
        with torch.no_grad():
            forward = interleaved({n: often(run, REPEAT) for n, run in ways.items()}, rounds=10, warmup=2)
        both = interleaved({n: often(run, REPEAT) for n, run in steps.items()}, rounds=10, warmup=2)
        case = f"B{TOKENS // T} T{T} H{HEADS} D{D} log α {str(decay)[6:]}{' strong' if strong else ''}"
        for what, times in (("fwd", forward), ("fwd+bwd", both)):
            ms = {n: 1e3 * t[0] / REPEAT for n, t in times.items()}
            more = {"spread": round(1e3 * times["ours"][1] / REPEAT, 4)}
            yield row(f"{case} {what}", "ms", ms["ours"], ms[PEER], PEER, smaller=True, **more)


def first_call(D: int = 128) -> None:
    """The peer, forward and backward, on little: its kernels are chosen by widths and types alone."""
    from fla.ops.gla import chunk_gla  # type: ignore[import-not-found]

    for decay in (torch.float32, torch.bfloat16) if D == 128 else (torch.float32,):
        q, k, v, g = given = inputs(1, 2048, HEADS, D, D, torch.bfloat16, decay, False)
        torch.autograd.grad(chunk_gla(q, k, v, g)[0], given, torch.randn_like(v))


KEY = (128, True)
CHOSEN = triton.BLOCKS[KEY]
SWEEP: dict[str, list[triton.Launch]] = {
    "walk": [triton.Launch(v, 8 if k == 128 else 4, s, k) for k, v, s in itertools.product((32, 64, 128), (64, 128), (2, 3, 4))],
    "forward": [triton.Launch(v, 4, s) for v, s in itertools.product((32, 64, 128), (1, 2, 3))] + [triton.Launch(64, 8, 2)],
    "backward_values": [triton.Launch(v, 4, s) for v, s in itertools.product((32, 64, 128), (1, 2, 3))],
    "backward_keys": [triton.Launch(v, 4, s, k) for k, v, s in itertools.product((32, 64), (32, 64, 128), (1, 2, 3))]
    + [triton.Launch(64, 8, s, 128) for s in (1, 2)],
}  # fmt: skip


def one(name: str, launch: triton.Launch) -> Callable[[], Any]:
    """A call of the kernel alone, so launched, at T8192; the steep chunks' variant is left out."""
    triton.STEEP = (False,)
    triton.BLOCKS[KEY] = CHOSEN._replace(**{name: launch})
    q, k, v, g = (
        t.detach().transpose(1, 2) for t in inputs(8, 8192, HEADS, 128, 128, torch.bfloat16, torch.float32, False)
    )
    call, out = triton._Call.of(q, k, v, None), torch.empty_like(v)
    if name == "walk":
        return lambda: call.walk(k, v, g, None, 1.0, back=False)
    states, _, sums = call.walk(k, v, g, None, 1.0, back=False)
    if name == "forward":
        return lambda: call.forward([q, k, v, g], states, sums, out, 1.0)
    gradients = [torch.empty_like(t) for t in (q, k, v, g)]
    if name == "backward_values":
        return lambda: call.backward_values([q, k, g, v, gradients[2]], states, sums, 1.0)
    tokens = [q, k, v, g, v, gradients[0], gradients[1], gradients[3]]
    return lambda: call.backward_keys(tokens, states, states, sums, 1.0)


def compiled(job: tuple[str, triton.Launch]) -> str:
    """Compiles into the cache on disk; empty where it could, else why not."""
    try:
        one(*job)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return ""


def sweep() -> None:
    jobs = [(name, launch) for name, launches in SWEEP.items() for launch in launches]
    failed = compiled_choices(compiled, jobs)
    for name, launches in SWEEP.items():
        times = {}
        for launch in launches:
            if failed[name, launch]:
                print(f"{name:16} {launch}: {failed[name, launch]}")
                continue
            times[launch] = interleaved({"": often(one(name, launch), REPEAT)}, rounds=5, warmup=1)[""][0] / REPEAT
        ranked(f"{name:16}", times, getattr(CHOSEN, name))
    triton.BLOCKS[KEY] = CHOSEN
    for T, fill in itertools.product((8192, 32768), (128, 256, 512, 1024, 2048)):
        triton.FILL = fill
        q, k, v, g = (t.detach() for t in inputs(TOKENS // T, T, HEADS, 128, 128, torch.bfloat16, torch.float32, False))
        with torch.no_grad():
            seconds = interleaved({"": often(lambda: ours(q, k, v, g), REPEAT)}, rounds=5, warmup=1)[""][0] / REPEAT  # noqa: B023
        print(f"T{T} FILL {fill}: forward {1e3 * seconds:.3f} ms", flush=True)


if __name__ == "__main__":
    main_or_sweep(__file__, sweep)
