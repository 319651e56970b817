"""A training step of the Llama-3.2-1B shape on one GPU against transformers, 4 x 4096 tokens, tokens a second.

`python bench/train_gpu.py --profile` prints a compiled step's kernels by their time, `--only VARIANT ...` some variants
(names as in VARIANTS); `--tiny`, first, runs either at a small size on a CPU. These write nothing.

bf16 weights, AdamW, random weights and data, one process, medians. MFU counts 6 FLOPs a parameter and token and the
attention's causal half, against 990 TFLOP/s; the floor is these at the measured rate of products.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch._functorch.config
from common import ceilings, main, row
from transformers import LlamaConfig, LlamaForCausalLM

import dovetail as dt
from dovetail.errors import RunError
from dovetail.objectives import next_token
from dovetail.objectives.next_token import NextToken
from dovetail.training.device import compiled
from dovetail.training.flops import flops_per_token
from dovetail.training.fp8 import multiply_in_fp8
from dovetail.training.optim import adamw, update
from dovetail.training.room import Step, predict

BENCHMARK = {"device": "cuda", "packages": {"transformers": "transformers"}, "minutes": 8}
TINY = "--tiny" in sys.argv
DEVICE = "cpu" if TINY else "cuda"
VOCAB, BATCH, LENGTH, PEAK = (512, 2, 128, 1e11) if TINY else (128_256, 4, 4096, 990e12)
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
}  # fmt: skip
SPEC = {
    "kind": "decoder", "vocab": VOCAB, "dim": 2048, "depth": 16, "context": LENGTH,
    "head": {"kind": "ref", "path": "embedding"},
    "blocks": {
        "mixer": {"kind": "attention", "heads": 32, "kv_heads": 8, "head_dim": 64},
        "feedforward": {"kind": "glu", "hidden": 8192},
    },
}  # fmt: skip
if TINY:
    SHAPE |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    SPEC |= {"dim": 64, "depth": 4, "blocks": {"mixer": {"kind": "attention", "heads": 4, "kv_heads": 2},
                                               "feedforward": {"kind": "glu", "hidden": 128}}}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A way to take the step. chunk: log2 of half the logits that live at a time.
    again: every how many blocks are checkpointed. budget: share of the activations that Inductor's partition may keep.
    fp8: the blocks' products in 8 bits, which is other arithmetic."""

    compiled: bool = True
    chunk: int = 27
    again: int = 0
    budget: float = 1.0
    fp8: bool = False


VARIANTS = {
    "compiled": Variant(),
    "eager": Variant(compiled=False),
    "compiled, activation budget 0.97": Variant(budget=0.97),
    "compiled, activation budget 0.97, logits 2^29 at a time": Variant(budget=0.97, chunk=28),
    "compiled, activation budget 0.9": Variant(budget=0.9),
    "compiled, logits 2^29 at a time": Variant(chunk=28),
    "compiled, one block in 4 made again": Variant(again=4),
    "compiled, fp8": Variant(fp8=True),
    "compiled, fp8, logits 2^29 at a time": Variant(fp8=True, chunk=28),
}
TARGETS = {
    name: {"target": 68_000, "target_peak_gb": 26} for name, how in VARIANTS.items() if how.compiled and not how.fp8
}
Made = tuple[Callable[[], None], Any]


def next_tokens(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"tokens": tokens, "labels": torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)}


def ours(tokens: torch.Tensor, how: Variant) -> Made:
    model = dt.build(SPEC, device=DEVICE, dtype=torch.bfloat16).train()
    multiply_in_fp8(model, ["blocks.*"] * how.fp8)
    model.checkpointing = how.again
    run = compiled(model, how.again > 0) if how.compiled else model
    optimizer = adamw(model, lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    objective, batch = NextToken(), next_tokens(tokens)
    counts = objective.counts(batch)

    def step() -> None:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.dict(next_token._CHUNK, {DEVICE: 2**how.chunk}))
            stack.enter_context(torch._functorch.config.patch(activation_memory_budget=how.budget))
            objective(run, batch).total(counts).backward()
        update(optimizer, parameters, 1.0)
        optimizer.zero_grad(set_to_none=True)

    return step, model


def theirs(tokens: torch.Tensor, compiled: bool) -> Made:
    with torch.device(DEVICE):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).train()
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        run(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def check(device: str = DEVICE) -> None:
    """Two narrow layers with equal weights: in fp32 the same loss and norm of the gradients. Raises RunError otherwise."""
    small = SHAPE | {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip
    peer = LlamaForCausalLM(LlamaConfig(**small)).train()
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        model = dt.load(folder, device=device).train()
    peer.to(device)
    tokens = torch.randint(0, 512, (2, 96), device=device)
    losses = [peer(input_ids=tokens, labels=tokens).loss, NextToken()(model, next_tokens(tokens)).total()]
    norms = []
    for loss, of in zip(losses, (peer, model), strict=True):
        loss.backward()
        norms.append(torch.stack([p.grad.norm() for p in of.parameters() if p.grad is not None]).norm())
    for name, (expected, found) in {"loss": [x.detach() for x in losses], "gradient's norm": norms}.items():
        if abs(float(found / expected) - 1) > 1e-3:
            raise RunError(
                f"{name} {float(found):.6f}, transformers' {float(expected):.6f}", where="bench/train_gpu.py"
            )


def timed(make: Callable[[], Made], steps: int = 6) -> tuple[float, float, float, float]:
    """(tokens/s, its spread, peak GB, seconds of the first step)."""
    steps = 2 if TINY else steps
    if not TINY:
        torch.cuda.reset_peak_memory_stats()
    step, model = make()
    start = time.perf_counter()
    step()
    _wait()
    first = time.perf_counter() - start
    step()
    rates = []
    for _ in range(steps):
        _wait()
        start = time.perf_counter()
        step()
        _wait()
        rates.append(BATCH * LENGTH / (time.perf_counter() - start))
    peak = 0.0 if TINY else torch.cuda.max_memory_allocated() / 1e9
    del step, model
    gc.collect()
    if not TINY:
        torch.cuda.empty_cache()
    torch.compiler.reset()
    return sorted(rates)[len(rates) // 2], max(rates) - min(rates), peak, first


def _wait() -> None:
    if not TINY:
        torch.cuda.synchronize()


def peers(tokens: torch.Tensor) -> Iterator[tuple[str, tuple[float, float, float, float]]]:
    """Each by `timed`, and what fails named with its reason; Liger, which changes transformers for good, last and where
    it is installed."""
    ways = {"transformers eager": False} | ({} if TINY else {"transformers, compiled": True})
    for liger in ("", " + Liger"):
        if liger:
            if importlib.util.find_spec("liger_kernel") is None or TINY:
                return
            from liger_kernel.transformers import apply_liger_kernel_to_llama  # type: ignore[import-not-found]

            apply_liger_kernel_to_llama()
        for name, whole in ways.items():
            try:
                yield name + liger, timed(lambda whole=whole: theirs(tokens, whole))
            except RuntimeError as error:
                print(f"skipped: {name}{liger}: {str(error).splitlines()[0]}", flush=True)
                gc.collect()
                torch.cuda.empty_cache()


def predicted(how: Variant) -> float | None:
    """Peak bytes as preflight counts them; None where Inductor's partition does not come to an end."""
    model = dt.build(SPEC, weights=False).to(torch.bfloat16)
    multiply_in_fp8(model, ["blocks.*"] * how.fp8)
    budget = torch._functorch.config.patch(activation_memory_budget=how.budget)
    with mock.patch.dict(next_token._CHUNK, {"cuda": 2**how.chunk}), budget:
        try:
            return predict(Step(model, BATCH, LENGTH, compiled=how.compiled), "cuda", how.again).peak
        except RuntimeError as error:
            print(f"not predicted: {error}", flush=True)
            return None


def measure(only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """only: names of variants, all unless given. "compiled" and "eager" stand beside every peer, others beside the
    first peer. Ours first: a peer that fails can take the process along."""
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), device=DEVICE)
    flops = flops_per_token(dt.build(SPEC, weights=False), LENGTH, train=True)
    floor = ceilings(DEVICE).bf16_matmul_tflops * 1e12 / flops if not TINY else 0.0
    mine: dict[str, dict[str, Any]] = {}
    for name, how in VARIANTS.items():
        if only and name not in only:
            continue
        try:
            rate, spread, peak, first = timed(lambda how=how: ours(tokens, how))
        except torch.OutOfMemoryError as error:
            print(f"{name}: {error}", flush=True)
            continue
        expected = predicted(how)
        mine[name] = {
            "case": f"Llama-3.2-1B shape, {BATCH} x {LENGTH}, {name}", "metric": "tokens/s", "ours": round(rate),
            "spread": round(spread), "mfu": round(rate * flops / PEAK, 3), "peak_gb": round(peak, 1),
            "predicted_gb": None if expected is None else round(expected / 1e9, 1), "first_step_s": round(first, 1),
            "floor": round(floor), **TARGETS.get(name, {}),
        }  # fmt: skip
        print(mine[name], flush=True)
    beside = None
    for peer, (other, _, peak, _) in peers(tokens):
        beside = beside or peer
        for name, found in mine.items():
            if name in ("compiled", "eager") or peer == beside:
                yield row(**found, theirs=round(other), peer=peer, peer_peak_gb=round(peak, 1))


def profiled(how: Variant, rows: int = 40) -> str:
    """A table of one step's kernels, those of the longest time first, after two steps to warm up."""
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), device=DEVICE)
    step, _ = ours(tokens, how)
    for _ in range(2):
        step()
    _wait()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU] if TINY else [activity.CUDA]) as profile:
        step()
        _wait()
    by = "self_cpu_time_total" if TINY else "self_device_time_total"
    return profile.key_averages().table(sort_by=by, row_limit=rows, max_name_column_width=100)


if __name__ == "__main__":
    chosen = [name for name in sys.argv[1:] if name in VARIANTS]
    if TINY or "--only" in sys.argv or "--profile" in sys.argv:
        torch.manual_seed(0)
        check()
        if "--profile" in sys.argv:
            print(*(profiled(VARIANTS[name]) for name in chosen or ["compiled"]), sep="\n")
        else:
            for found in measure(chosen):
                print(found, flush=True)
    else:
        main(__file__)
