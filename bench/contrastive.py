"""The contrastive losses of CLIP and SigLIP on CUDA, forward and backward, against the same with all scores at once.

First the same numbers as the fp64 twin, then milliseconds and peak gigabytes above the inputs at n = 32,768 pairs of
d = 768. `python bench/contrastive.py --sweep` instead times blocks of rows and the launches of both kernels.

The peers are transformers' `image_text_contrastive_loss` and the lines of its `SiglipModel`, in fp32 and under bf16
autocast. Floor: 2·n·n·d operations four times (three for sigmoid) at the measured rate of bf16 products.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from common import ceilings, interleaved, often, peak_gb, row
from torch import Tensor
from torch.nn import functional as F
from transformers.models.clip.modeling_clip import image_text_contrastive_loss
from tuning import main_or_sweep

from dovetail.kernels import contrastive as folder
from dovetail.kernels.contrastive import contrastive, plan, reference

BENCHMARK = {"device": "cuda", "packages": {"transformers": "transformers", "triton": "triton"}, "minutes": 2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, D, REPEAT = 32768, 768, 3  # REPEAT: calls queued between two synchronisations, as in a real step
TARGETS = {"ms": 25.0, "GB": 1.0}
NAMES = {"softmax": "CLIP", "rows": "InfoNCE", "sigmoid": "SigLIP"}


def inputs(n: int, m: int, d: int, form: str, dtype: torch.dtype, scale: float = 100.0) -> list[Tensor]:
    """Normalised embeddings with pairs a little alike, so that the loss is not small, the scale, and for sigmoid SigLIP's
    first bias."""
    a, b = (torch.randn(k, d, device=DEVICE) for k in (n, m))
    a[: min(n, m)] += 0.1 * b[: min(n, m)]
    given = [F.normalize(t).to(dtype) for t in (a, b)]
    given += [torch.tensor(s, device=DEVICE) for s in ([scale, -10.0] if form == "sigmoid" else [scale])]
    return [t.requires_grad_() for t in given]


def ours(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return contrastive(a, b, scale, "softmax" if bias is None else "sigmoid", bias)


def dense(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """As transformers' CLIPModel and SiglipModel compute their losses."""
    logits = torch.matmul(b, a.t()) * scale
    if bias is None:
        return image_text_contrastive_loss(logits)
    logits = logits + bias
    eye = torch.eye(logits.size(0), device=logits.device)
    m1_diag1 = -torch.ones_like(logits) + 2 * eye
    return -torch.sum(F.logsigmoid(m1_diag1 * logits), dim=-1).mean()


def step(run: Callable[..., Tensor], given: list[Tensor], autocast: bool) -> Callable[[], list[Tensor]]:
    """Loss and gradients."""

    def once() -> list[Tensor]:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = run(*given[:3], **({"bias": given[3]} if len(given) > 3 else {}))
        return [loss.detach(), *torch.autograd.grad(loss, given)]

    return once


# form, n, m, d, offset, dtype, scale
CHECKS = [
    ("softmax", 2000, 2000, 768, 0, torch.bfloat16, 100.0), ("softmax", 1024, 1024, 100, 0, torch.bfloat16, 10.0),
    ("softmax", 1, 1, 64, 0, torch.bfloat16, 100.0), ("softmax", 333, 333, 768, 0, torch.float16, 100.0),
    ("softmax", 2000, 2000, 768, 0, torch.float32, 100.0), ("rows", 500, 2100, 768, 1537, torch.bfloat16, 100.0),
    ("rows", 65, 200, 72, 0, torch.float16, 20.0), ("sigmoid", 2000, 2000, 768, 0, torch.bfloat16, 100.0),
    ("sigmoid", 333, 333, 40, 0, torch.float16, 10.0), ("sigmoid", 500, 2100, 768, -77, torch.bfloat16, 100.0),
    ("sigmoid", 700, 300, 768, 4000, torch.bfloat16, 10.0), ("sigmoid", 2000, 2000, 768, 0, torch.float32, 100.0),
]  # fmt: skip
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}


def check(cases: list[tuple[str, int, int, int, int, torch.dtype, float]] = CHECKS) -> None:
    """Loss and gradients against the twin in fp64 on the same rounded inputs; then autocast, ours and dense beside it."""
    block = folder.BLOCK[DEVICE]
    for form, n, m, d, offset, dtype, scale in cases:
        torch.manual_seed(0)
        given = inputs(n, m, d, form, dtype, scale)
        folder.BLOCK[DEVICE] = 600 * m  # several blocks of rows, the last of them in part
        run = partial(contrastive, form=form, offset=offset)
        errors = _errors(step(run, given, False)(), given, form, offset)
        print(f"{form:8} n{n} m{m} d{d} offset {offset} {str(dtype)[6:]:8} {_text(errors)}", flush=True)
        assert max(errors) < TOLERANCE[dtype], (form, n, m, d, offset, dtype, errors)
    folder.BLOCK[DEVICE] = block
    for form in ("softmax", "sigmoid"):
        n, m, d = cases[0][1:4]
        given = inputs(n, n, d, form, torch.float32)
        errors = [_errors(step(run, given, True)(), given, form, 0) for run in (ours, dense)]
        print(f"{form:8} n{n} d{d} fp32 under bf16 autocast: {_text(errors[0])}; dense {_text(errors[1])}", flush=True)
        assert max(errors[0]) <= max(2e-2, *errors[1]), errors


def _errors(found: list[Tensor], given: list[Tensor], form: str, offset: int) -> list[float]:
    """Of loss, gradients of a, b, scale and bias, relative to the largest number of each, or a thousandth of what one pair
    asks for: all that a single pair asks for is taken back."""
    wide = [t.detach().double().requires_grad_() for t in given]
    bias = wide[3] if len(wide) > 3 else None
    loss = reference.contrastive(*wide[:3], form, bias, offset)
    truth = [loss, *torch.autograd.grad(loss, wide)]
    errors = []
    for mine, right in zip(found, truth, strict=True):
        assert mine.isfinite().all()
        least = 1e-3 * float(wide[2].detach()) / len(wide[0])
        errors.append(((mine.double() - right).abs().max() / right.abs().max().clamp_min(least)).item())
    return errors


def _text(errors: list[float]) -> str:
    return " ".join(f"{n} {e:.1e}" for n, e in zip(("loss", "da", "db", "dscale", "dbias"), errors, strict=False))


def measure(n: int = N, d: int = D, rounds: int = 7) -> Iterator[dict[str, Any]]:
    rate = ceilings(DEVICE).bf16_matmul_tflops * 1e12
    for form in ("softmax", "sigmoid"):
        given = inputs(n, n, d, form, torch.float32)
        ways = {
            "ours": step(ours, given, True),
            "dense, fp32": step(dense, given, False),
            "dense, bf16 autocast": step(dense, given, True),
            "ours, fp32": step(ours, given, False),
        }
        peaks = {}
        for name, run in list(ways.items()):
            try:
                run()  # compiles, and lets cuBLAS take its workspace
                peaks[name] = peak_gb(run)
            except torch.OutOfMemoryError:
                assert not name.startswith("ours"), f"{name} does not fit"
                print(f"{NAMES[form]}: {name} does not fit this device", flush=True)
                del ways[name]
        times = interleaved({name: often(run, REPEAT) for name, run in ways.items()}, rounds)
        ms = {name: 1e3 * seconds[0] / REPEAT for name, seconds in times.items()}
        floor = 1e3 * (4 if form == "softmax" else 3) * 2 * n * n * d / rate
        more = {"spread": round(1e3 * times["ours"][1] / REPEAT, 3), "floor": round(floor, 2)}
        case = f"{NAMES[form]} n{n} d{d} fwd+bwd"
        for peer in (name for name in ways if name.startswith("dense")):
            goal = TARGETS["ms"]
            yield row(f"{case}, bf16", "ms", ms["ours"], ms[peer], peer, smaller=True, target=goal, **more)
            if DEVICE != "cpu":
                goal = TARGETS["GB"]
                yield row(f"{case}, bf16", "GB", peaks["ours"], peaks[peer], peer, smaller=True, target=goal)
        if "dense, fp32" in ways:
            mine, peer = "ours, fp32", "dense, fp32"
            yield row(f"{case}, fp32", "ms", ms[mine], ms[peer], peer, smaller=True)
            if DEVICE != "cpu":
                yield row(f"{case}, fp32", "GB", peaks[mine], peaks[peer], peer, smaller=True)


def sweep(n: int = N, d: int = D) -> None:
    """Milliseconds (and peak GB) by rows of a block, then of each kernel alone by its launch. "*": as it stands."""
    block = folder.BLOCK[DEVICE]
    for form in ("softmax", "sigmoid"):
        run = step(ours, inputs(n, n, d, form, torch.float32), True)
        for rows in (1024, 2048, 2816, 4096, 5632, 8192, 11264):
            folder.BLOCK[DEVICE] = rows * n
            seconds = interleaved({"": often(run, REPEAT)}, rounds=5, warmup=2)[""][0] / REPEAT
            mark = "*" if rows * n == block else " "
            print(f"{mark} {form:8} {rows:6} rows: {1e3 * seconds:7.2f} ms {peak_gb(run):.2f} GB", flush=True)
    folder.BLOCK[DEVICE] = block
    if plan(DEVICE, torch.bfloat16).path != "triton":
        return
    from dovetail.kernels.contrastive import triton
    from dovetail.kernels.contrastive.walk import Sigmoid, Softmax

    a, b, scale, bias = (t.detach() for t in inputs(n, n, d, "sigmoid", torch.bfloat16))
    rows = block // n
    norms = triton.normalisers(a, b, scale, 0, rows)
    kernels: dict[str, tuple[str, Callable[[], Any]]] = {
        "normalisers": ("NORMALISERS", lambda: triton.normalisers(a, b, scale, 0, rows)),
        "softmax gradient": ("GRADIENT", lambda: triton.gradient(
            a[:rows], b, scale, Softmax(norms.rows[:rows], norms.columns, 2.0), 0, True)),
        "sigmoid gradient": ("GRADIENT", lambda: triton.gradient(a[:rows], b, scale, Sigmoid(bias), 0, True)),
    }  # fmt: skip
    shapes = ((128, 128, 64), (128, 256, 64), (256, 128, 64), (64, 256, 64))
    for name, (table, run) in kernels.items():
        chosen = getattr(triton, table)
        passes = 1 if name == "normalisers" else n // rows
        for shape, warps, stages, registers in itertools.product(shapes, (4, 8), (3, 4), (None, 128)):
            if shape[0] * shape[1] > warps * 32 * 128 // (2 if registers else 1):  # half of them at most for the sums
                continue
            setattr(triton, table, triton.Launch(*shape, warps, stages, registers))
            try:
                seconds = interleaved({"": often(run, passes)}, rounds=3)[""][0]
            except Exception as reason:
                print(f"  {name} {getattr(triton, table)}: {type(reason).__name__} {str(reason)[:80]}", flush=True)
                continue
            rate = 2 * n * n * d / seconds / 1e12
            mark = "*" if getattr(triton, table) == chosen else " "
            print(f"{mark} {name} {getattr(triton, table)}: {1e3 * seconds:.2f} ms, {rate:.0f} TFLOP/s", flush=True)
        setattr(triton, table, chosen)
    g = triton.gradient(a[:rows], b, scale, Sigmoid(bias), 0, True)[0]
    assert g is not None
    for name, run in {"G b": lambda: g @ b, "Gᵀ a": lambda: g.T @ a[:rows]}.items():
        seconds = interleaved({"": often(run, n // rows)}, rounds=5)[""][0]
        print(
            f"  {name} of {rows} rows, all: {1e3 * seconds:.2f} ms, {2 * n * n * d / seconds / 1e12:.0f} TFLOP/s",
            flush=True,
        )


if __name__ == "__main__":
    main_or_sweep(__file__, sweep)
