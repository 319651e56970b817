"""Causal linear attention on CUDA against flash-linear-attention: first the same numbers as the fp64 twin, then time.

`python bench/linear_attention.py --sweep` instead tells which sizes are best, and what each kernel takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from common import ceilings, interleaved, often, row
from torch import Tensor
from tuning import compiled_at_once, main_or_sweep, workers

from dovetail.kernels.linear_attention import linear_attention, normalised, operator, plan, reference, triton
from dovetail.kernels.linear_attention.spans import Sizes

try:
    from fla.ops.linear_attn import chunk_linear_attn
except ImportError:
    chunk_linear_attn = None

BENCHMARK = {"device": "cuda", "packages": {"triton": "triton", "fla": "flash-linear-attention"}, "minutes": 3}
H, D, TOKENS, REPEAT = 16, 128, 65536, 5  # REPEAT: calls queued between two synchronisations, as in a real step
PEER = "fla chunk_linear_attn"


def inputs(B: int, T: int, heads: tuple[int, int, int], widths: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v (B,T,heads,width), as projections give them; features of about unit products."""
    D, E = widths
    sizes = zip(heads, (D, D, E), strict=True)
    made = [torch.randn(B, T, n, d, device="cuda") * (D**-0.25 if i < 2 else 1) for i, (n, d) in enumerate(sizes)]
    return [t.to(dtype).requires_grad_() for t in made]


def ours(q: Tensor, k: Tensor, v: Tensor, **known: Any) -> Tensor:
    return linear_attention(*(t.transpose(1, 2) for t in (q, k, v)), causal=True, **known)[0].transpose(1, 2)


def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    assert chunk_linear_attn is not None
    return chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0]


def first_call() -> None:
    """The peer, forward and backward, on little: its kernels are chosen by widths and types alone."""
    for heads in (4, H):  # of the check and of the measurement
        q, k, v = inputs(1, 1024, (heads,) * 3, (D, D), torch.bfloat16)
        torch.autograd.grad(theirs(q, k, v), (q, k, v), torch.randn_like(v))


# name, dtype, T, heads of keys, widths, what is known besides, whether divided by the sum of weights
CHECKS = [
    (*case, divided)
    for case in (
        ("plain", torch.bfloat16, 1024, 4, (128, 128), ()), ("plain", torch.bfloat16, 1000, 4, (256, 256), ()),
        ("plain", torch.bfloat16, 700, 4, (64, 128), ()), ("grouped", torch.bfloat16, 700, 2, (128, 64), ()),
        ("ragged", torch.bfloat16, 333, 4, (100, 1), ()), ("decay", torch.bfloat16, 1000, 4, (128, 128), ("decay",)),
        ("packed", torch.bfloat16, 1000, 2, (128, 128), ("segments", "decay", "start")),
        ("plain", torch.float16, 700, 4, (128, 128), ("start",)), ("plain", torch.float32, 700, 4, (128, 128), ()),
        ("packed", torch.float32, 700, 2, (64, 256), ("segments", "decay", "start")),
    )
    for divided in (False, True)
]  # fmt: skip
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}


def check() -> None:
    """Each case in a process of its own: most of the time is compiling."""
    assert plan(8192, causal=True, segments=False, state=False, device="cuda", widest=D).path == "triton"
    compiled_at_once(first_call)
    with workers() as pool:
        for lines in pool.map(checked, CHECKS):
            print(*lines, sep="\n", flush=True)


def checked(case: tuple[str, torch.dtype, int, int, tuple[int, int], tuple[str, ...], bool]) -> list[str]:
    """Errors of outputs and gradients against the plain twin in fp64; of the peer too where it does the same."""
    name, dtype, T, G, widths, more, divided = case
    torch.manual_seed(0)
    q, k, v = inputs(2, T, (4, G, G), widths, dtype)
    if divided:
        q, k = (t.detach().float().abs().to(dtype).requires_grad_() for t in (q, k))
    known = {n: _known(n, T, G, widths[0], widths[1] + divided) for n in more}
    run = ours if not divided else partial(_divided, normalised)
    twin = _twin if not divided else partial(_divided, _twin_normalised)
    start = [known["start"].requires_grad_()] if "start" in known else []
    real = (known["segments"] >= 0)[:, :, None, None] if "segments" in known else 1
    g = torch.randn(*q.shape[:3], widths[1], device="cuda") * real
    wide = [t.detach().double().requires_grad_() for t in (q, k, v, *start)]
    also = {n: t.double() if t.is_floating_point() else t for n, t in known.items()}
    if start:
        also["start"] = wide[3]
    plain = twin(*wide[:3], **also) * real
    expected = (plain, *torch.autograd.grad(plain, wide, g.double()))
    ways = {"ours": lambda: run(q, k, v, **known)}
    if name == "plain" and widths == (128, 128) and dtype == torch.bfloat16 and not divided and chunk_linear_attn:
        ways["fla"] = lambda: theirs(q, k, v)
    lines = []
    for who, way in ways.items():
        out = way() * real
        found = (out, *torch.autograd.grad(out, [q, k, v, *start], g.to(out.dtype)))
        errors = [_error(a, b) for a, b in zip(found, expected, strict=True)]
        lines.append(f"{who:5} {name:8} {dtype!s:15} T{T} D,E {widths} divided={divided!s:5} {_text(errors)}")
        assert who != "ours" or max(errors) < TOLERANCE[dtype], (case, errors)
    return lines


def _known(name: str, T: int, G: int, D: int, E: int) -> Tensor:
    if name == "decay":
        return -torch.rand(2, G, T, device="cuda") * 0.1
    if name == "start":
        return torch.randn(2, G, D, E, device="cuda").abs()
    begun, hidden = (torch.rand(2, T, device="cuda") < p for p in (0.01, 0.1))
    begun[:, 0] = hidden[:, 0] = False  # the first token is of the document that a state goes on in
    return torch.where(hidden, -1, begun.long().cumsum(1))


def _twin(q: Tensor, k: Tensor, v: Tensor, **known: Any) -> Tensor:
    return reference.linear_attention(*(t.transpose(1, 2) for t in (q, k, v)), causal=True, **known).transpose(1, 2)


def _twin_normalised(q: Tensor, k: Tensor, v: Tensor, causal: bool, **known: Any) -> tuple[Tensor, None]:
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    out = reference.linear_attention(q, k, values, causal=causal, **known)
    return out[..., :-1] / out[..., -1:].clamp_min(1e-6), None


def _divided(way: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, **known: Any) -> Tensor:
    return way(*(t.transpose(1, 2) for t in (q, k, v)), causal=True, **known)[0].transpose(1, 2)


def _error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).abs().max() / b.abs().max()).item()


def _text(errors: list[float]) -> str:
    return "  ".join(f"{n} {e:.1e}" for n, e in zip(("out", "dq", "dk", "dv", "dstart"), errors, strict=False))


def milliseconds(
    ways: dict[str, Callable[..., Tensor]], T: int, rounds: int, tokens: int = TOKENS
) -> dict[str, dict[str, float]]:
    """{"fwd" | "fwd+bwd": {way: median milliseconds}}, bf16."""
    q, k, v = inputs(tokens // T, T, (H, H, H), (D, D), torch.bfloat16)
    g = torch.randn_like(v)
    with torch.no_grad():
        forward = {n: often(lambda run=run: run(q, k, v), REPEAT) for n, run in ways.items()}
        found = {"fwd": interleaved(forward, rounds, warmup=2)}
    both = {
        n: often(lambda run=run: torch.autograd.grad(run(q, k, v), (q, k, v), g), REPEAT) for n, run in ways.items()
    }
    found["fwd+bwd"] = interleaved(both, rounds, warmup=2)
    return {what: {n: 1e3 * t[0] / REPEAT for n, t in times.items()} for what, times in found.items()}


def measure() -> Iterator[dict[str, Any]]:
    """Floor: every input read once and every output written once, at the rate of a copy. Work: chunks of 64 tokens."""
    rate = ceilings("cuda").copy_tbs * 1e12
    ways: dict[str, Callable[..., Tensor]] = {"ours": ours, "fla": theirs}
    for T in (2048, 8192, 32768, 131072):
        tokens = max(TOKENS, T)
        for what, times in milliseconds(ways, T, rounds=11, tokens=tokens).items():
            tensors, parts = (4, 1) if what == "fwd" else (11, 4)
            size = tensors * tokens * H * D * 2
            work = parts * tokens * H * (4 * D * D + 2 * 64 * 2 * D)
            mine, peer = times["ours"], times["fla"]
            print(f"T{T} {what}: {work / mine / 1e9:.0f} TFLOP/s, {size / mine / 1e6:.0f} GB/s", flush=True)
            case, goal = f"causal {tokens // 1024}k tokens H{H} D{D} T{T} {what}", 1.1 if what == "fwd+bwd" else None
            floor = round(1e3 * size / rate, 3)
            yield row(case, "ms", mine, peer, PEER, smaller=True, target_ratio=goal, floor=floor)


def sweep() -> None:
    """Milliseconds of each choice of sizes; what does not fit the device says so."""
    chosen = operator.sizes
    found = []
    for tile, columns, warps, stages in (
        (64, 128, 8, 2), (64, 64, 4, 2), (64, 128, 8, 3), (64, 64, 4, 3), (64, 64, 8, 2), (64, 128, 4, 2), (128, 64, 8, 2),
    ):  # fmt: skip
        for span in (512, 1024, 2048):
            operator.sizes = lambda *_, s=span, t=tile, c=columns, w=warps, g=stages: Sizes(s, t, c, w, g)
            try:
                times = [milliseconds({"ours": ours}, T, rounds=3) for T in (2048, 8192, 32768)]
            except Exception as reason:
                print(operator.sizes(), type(reason).__name__, str(reason)[:100], flush=True)
                break
            text = "  ".join(f"{t['fwd']['ours']:.2f} {t['fwd+bwd']['ours']:.2f}" for t in times)
            found.append((sum(t["fwd+bwd"]["ours"] for t in times), operator.sizes(), text))
            print(operator.sizes(), "fwd, fwd+bwd at T 2k, 8k, 32k:", text, flush=True)
    operator.sizes = chosen
    print("best:", *min(found)[1:])
    q, k, v = inputs(8, 8192, (H, H, H), (D, D), torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(ours(q, k, v), (q, k, v), torch.randn_like(v))
        torch.cuda.synchronize()
    print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=12, max_name_column_width=40))
    wide = [t.detach().float()[:2].requires_grad_() for t in (q, k, v)]
    g, kept = torch.randn_like(wide[2]), triton.PRECISION
    for precision in ("ieee", "tf32x3"):
        triton.PRECISION = precision
        run = often(lambda: torch.autograd.grad(ours(*wide), wide, g), REPEAT)
        print(
            "fp32, 16k tokens, fwd+bwd,",
            precision,
            f"{1e3 * interleaved({'': run}, 3)[''][0] / REPEAT:.2f} ms",
            flush=True,
        )
    triton.PRECISION = kept


if __name__ == "__main__":
    main_or_sweep(__file__, sweep)
