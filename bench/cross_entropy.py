"""The loss over a vocabulary on CUDA, head and gradients included, from hidden states in bf16, against torch and Liger.

First the same sums and gradients as in fp64, then milliseconds and peak gigabytes above the inputs for 16,384 tokens, width
2048 and 128,256 ids; then the pieces by themselves: the pass over a chunk of logits, the weight's gradient added up over
two chunks, its last product. `python bench/cross_entropy.py --sweep` times launches of the kernel and sizes of chunks.

Floor: 2·N·C·V operations three times at the measured rate of bf16 products; of the pieces but the sum, bytes read once and
written once at the measured rate of copies.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import ceilings, interleaved, peak_gb, replayed, row
from torch import Tensor
from torch.nn import functional as F
from tuning import main_or_sweep

from dovetail.kernels.cross_entropy import plain, plan, reference, scaled, softmax_loss_
from dovetail.kernels.linear.accumulate import add_product
from dovetail.objectives import next_token
from dovetail.objectives.next_token import cross_entropy

BENCHMARK = {"device": "cuda", "packages": {"triton": "triton"}, "minutes": 3}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, C, V, CHUNK = 16384, 2048, 128256, 2048
Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(n: int, width: int, vocab: int, dtype: torch.dtype) -> list[Tensor]:
    """Hidden states and weights whose logits have a deviation of about 1, and labels of which one in 16 is ignored."""
    h = torch.randn(n, width, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, device=DEVICE) * width**-0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (n,), device=DEVICE)
    labels[5::16] = reference.IGNORED
    return [h, weight, labels]


def ours(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(lambda x: F.linear(x, weight), h, labels)[0]


def full(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits, in fp32 as transformers has them."""
    return F.cross_entropy(F.linear(h, weight).float(), labels, reduction="sum")


def peers() -> dict[str, Step]:
    found = {"torch": full, "torch compiled": torch.compile(full)}
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["Liger"] = lambda h, weight, labels: liger(weight, h, labels)
    return found


def step(run: Step, given: list[Tensor]) -> Callable[[], list[Tensor]]:
    """The mean loss and its gradients."""

    def once() -> list[Tensor]:
        loss = run(*given) / len(given[0])
        return [loss.detach(), *torch.autograd.grad(loss, given[:2])]

    return once


# n, width, vocabulary, dtype
CHECKS = [
    (700, 128, 5120, torch.bfloat16), (700, 128, 5003, torch.bfloat16), (1, 64, 50257, torch.bfloat16),
    (300, 64, 32000, torch.float16), (300, 64, 4999, torch.float32),
]  # fmt: skip
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}


def check(cases: list[tuple[int, int, int, torch.dtype]] = CHECKS) -> None:
    """Loss and gradients of several chunks against fp64 from the same rounded inputs; then the kernel by itself, with
    smoothing and z, logits of 1e4 and of -inf, and rows beyond 2^31 entries."""
    before = next_token._CHUNK[DEVICE]
    for n, width, vocab, dtype in cases:
        torch.manual_seed(0)
        given = inputs(n, width, vocab, dtype)
        next_token._CHUNK[DEVICE] = 64 * vocab
        found = step(ours, given)()
        wide = [t.detach().double().requires_grad_() for t in given[:2]]
        right = step(full, [*wide, given[2]])()
        errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, right, strict=True)]
        print(f"n{n} c{width} v{vocab} {str(dtype)[6:]:8} " + " ".join(f"{e:.1e}" for e in errors), flush=True)
        assert max(errors) < TOLERANCE[dtype], (n, width, vocab, dtype, errors)
    next_token._CHUNK[DEVICE] = before
    if plan(DEVICE).path != "triton":
        return
    for dtype, tolerance in TOLERANCE.items():
        for vocab, smoothing, z in ((128_256, 0.0, 0.0), (50_257, 0.1, 1e-4), (40_000, 0.1, 1e-4)):
            x = (3 * torch.randn(9, vocab, device=DEVICE)).to(dtype)
            labels = torch.randint(0, vocab, (9,), device=DEVICE)
            x[0] *= 1e3
            if not smoothing:  # which asks for the logarithm of every probability
                x[1, : vocab // 2] = -float("inf")
                labels[1] = vocab - 1
            labels[2] = reference.IGNORED
            _same(x, labels, smoothing, z, tolerance)
    many = torch.zeros(2**31 // 2**17 + 3, 2**17, device=DEVICE, dtype=torch.bfloat16)
    many[-1, 7] = 5.0
    labels = torch.full((len(many),), reference.IGNORED, device=DEVICE)
    labels[-1] = 7
    last = many[-1:].clone()
    sums, alone = softmax_loss_(many, labels, 0.0, 0.0, True), softmax_loss_(last, labels[-1:], 0.0, 0.0, True)
    assert torch.equal(sums, alone) and torch.equal(many[-1:], last) and not many[:-1].any()
    print("the kernel by itself: as in fp64", flush=True)


def _same(x: Tensor, labels: Tensor, smoothing: float, z: float, tolerance: float) -> None:
    wide = x.double().requires_grad_()
    total, nats, _ = reference.cross_entropy(wide, labels, smoothing, z)
    (grad,) = torch.autograd.grad(total, wide)
    sums = softmax_loss_(x, labels, smoothing, z, True)
    torch.testing.assert_close(sums[:2].double(), torch.stack([total.detach(), nats]), rtol=2e-5, atol=1e-3)
    torch.testing.assert_close(x.double(), grad, rtol=tolerance, atol=2e-6)


def timed(cases: dict[str, Callable[[], Any]], rounds: int, times: int = 3) -> dict[str, tuple[float, float]]:
    """Milliseconds, (median, spread), of each case."""
    found = interleaved(replayed(cases, times), rounds)
    return {name: (1e3 * a / times, 1e3 * b / times) for name, (a, b) in found.items()}


def measure(n: int = N, width: int = C, vocab: int = V, rounds: int = 7) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    best, given = ceilings(DEVICE), inputs(n, width, vocab, torch.bfloat16)
    ways = {name: step(run, given) for name, run in {"ours": ours, **peers()}.items()}
    peaks: dict[str, float] = {}
    for name, run in ways.items():
        run()  # compiles, and lets cuBLAS take its workspace
        peaks[name] = peak_gb(run)
    # Long enough to be launched as they are: a peer that cannot be captured leaves nothing that can after it.
    ms = {name: (1e3 * a, 1e3 * b) for name, (a, b) in interleaved(ways, rounds).items()}
    floor = round(3e3 * 2 * n * width * vocab / best.bf16_matmul_tflops / 1e12, 2)
    case = f"{n} x {width} -> {vocab} fwd+bwd"
    for peer in ways:
        if peer == "ours":
            continue
        known: dict[str, Any] = {"smaller": True}
        spread = round(ms["ours"][1], 3)
        yield row(case, "ms", ms["ours"][0], ms[peer][0], peer, spread=spread, floor=floor, **known)
        if DEVICE != "cpu":
            yield row(case, "GB", peaks["ours"], peaks[peer], peer, **known)
    if plan(DEVICE).path == "triton":
        yield from pieces(width, vocab, rounds)


def pieces(width: int, vocab: int, rounds: int, rows: int = CHUNK) -> Iterator[dict[str, Any]]:
    """What a chunk costs besides its products, each beside what it was before."""
    h, weight, labels = (t.detach() for t in inputs(rows, width, vocab, torch.bfloat16))
    logits, copy = h @ weight.T, ceilings(DEVICE).copy_tbs * 1e9  # bytes in a millisecond
    made, compiled = logits.clone(), torch.compile(plain.softmax_loss)
    total, factor = torch.zeros(vocab, width, device=DEVICE), torch.tensor(0.1, device=DEVICE)
    narrow = torch.empty_like(total, dtype=torch.bfloat16)
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any], str, float]] = {
        f"softmax loss of {rows} x {vocab}": (
            lambda: softmax_loss_(made, labels, 0.0, 0.0, True),
            lambda: compiled(logits, labels, 0.0, 0.0, True), "torch compiled", 2 * logits.nbytes / copy,
        ),
        f"{vocab} x {width} gradient added": (
            lambda: add_product(total, logits, h, DEVICE),
            lambda: torch._foreach_add_([total], [logits.T @ h]), "product, then sum", 0.0,
        ),
        f"{vocab} x {width} gradient scaled": (
            lambda: scaled(total, factor, torch.bfloat16),
            lambda: torch.mul(total, factor, out=narrow), "torch.mul", (total.nbytes + narrow.nbytes) / copy,
        ),
    }  # fmt: skip
    with torch.no_grad():
        for case, (mine, other, peer, floor) in pairs.items():
            ms = timed({"ours": mine, peer: other}, rounds)
            more = {"floor": round(floor, 3)} if floor else {}
            yield row(
                case, "ms", ms["ours"][0], ms[peer][0], peer, smaller=True, spread=round(ms["ours"][1], 4), **more
            )


def sweep(rounds: int = 5) -> None:
    """The kernel by its launch, for rows of whole and of broken steps; then the whole by the size of a chunk."""
    from dovetail.kernels.cross_entropy import triton

    for name, vocab in (("EVEN", V), ("RAGGED", 50_257)):
        chosen, times = getattr(triton, name), {}
        labels = torch.randint(0, vocab, (CHUNK,), device=DEVICE)
        logits = torch.randn(CHUNK, vocab, device=DEVICE).bfloat16()
        for warps, read, programs in itertools.product((4, 8, 16, 32), (16, 32, 64, 128), (1, 2, 4)):
            registers = min(255, 65536 // (32 * warps * programs))
            if registers < read // 2 + 16:
                continue
            launch = triton.Launch(warps, read, registers)
            setattr(triton, name, launch)
            run = {"": lambda: softmax_loss_(logits, labels, 0.0, 0.0, True)}  # noqa: B023
            try:
                times[launch] = timed(run, rounds, 5)[""][0]
            except Exception as reason:
                print(f"{name} {launch}: {type(reason).__name__} {str(reason)[:80]}", flush=True)
        setattr(triton, name, chosen)
        for launch, each in sorted(times.items(), key=lambda item: item[1]):
            print(f"{name} v{vocab} {1e3 * each:7.1f} µs {launch}{' *' if launch == chosen else ''}", flush=True)
    before, run = next_token._CHUNK[DEVICE], step(ours, inputs(N, C, V, torch.bfloat16))
    for size in (25, 26, 27, 28, 29, 30):
        next_token._CHUNK[DEVICE] = 2**size
        ms, peak = timed({"": run}, rounds, 1)[""][0], peak_gb(run)
        print(
            f"2^{size + 1} logits at a time: {ms:.2f} ms {peak:.2f} GB{' *' if 2**size == before else ''}", flush=True
        )
    next_token._CHUNK[DEVICE] = before


if __name__ == "__main__":
    main_or_sweep(__file__, sweep)
