"""A training step of the Llama-3.2-1B shape on one GPU against transformers: bf16 weights, AdamW, 4 x 4096 tokens.

    python bench/train_gpu.py [OUT]

One process, interleaved, medians; random weights and data. MFU counts 6 FLOPs a parameter and token and the
attention's causal half, against 990 TFLOP/s.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import row, write

import dovetail as dt
from dovetail.objectives.next_token import NextToken
from dovetail.training.flops import flops_per_token
from dovetail.training.optim import adamw, clip

VOCAB, BATCH, LENGTH, PEAK = 128_256, 4, 4096, 990e12
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


def ours(tokens: torch.Tensor, compiled: bool) -> tuple[Callable[[], None], Any]:
    model = dt.build(SPEC, device="cuda", dtype=torch.bfloat16).train()
    run = torch.compile(model) if compiled else model
    optimizer = adamw(model, lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)
    objective, batch = NextToken(), {"tokens": tokens, "labels": labels}
    counts = objective.counts(batch)

    def step() -> None:
        objective(run, batch).total(counts).backward()
        clip(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, model


def theirs(tokens: torch.Tensor, compiled: bool) -> tuple[Callable[[], None], Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).train()
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        run(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def measure(make: Callable[[], tuple[Callable[[], None], Any]], steps: int = 6) -> tuple[float, float, float]:
    """(tokens/s, peak GB, seconds of the first step)."""
    torch.cuda.reset_peak_memory_stats()
    step, model = make()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    step()
    times = []
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 1e9
    del step, model
    gc.collect()
    torch.cuda.empty_cache()
    return BATCH * LENGTH / sorted(times)[len(times) // 2], peak, first


def main(out: Path | None) -> None:
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), device="cuda")
    ways: dict[str, Callable[[], tuple[Callable[[], None], Any]]] = {
        "ours, compiled": lambda: ours(tokens, True),
        "transformers eager": lambda: theirs(tokens, False),
        "ours, eager": lambda: ours(tokens, False),
    }
    flops = flops_per_token(dt.build(SPEC, weights=False), LENGTH, train=True)
    found: dict[str, tuple[float, float, float]] = {}
    for name, make in ways.items():
        found[name] = measure(make)
        rate, peak, first = found[name]
        print(
            f"{name}: {rate:,.0f} tokens/s, MFU {rate * flops / PEAK:.1%}, {peak:.1f} GB, first step {first:.0f} s",
            flush=True,
        )
        rows = [
            row(
                f"Llama-3.2-1B shape, {BATCH} x {LENGTH}, {a.split(', ')[1]}", "tokens/s", round(found[a][0]), round(found[b][0]), b,
                mfu=round(found[a][0] * flops / PEAK, 3), peak_gb=round(found[a][1], 1), peer_peak_gb=round(found[b][1], 1),
            )
            for a in found for b in found if a.startswith("ours") and b.startswith("transformers")
        ]  # fmt: skip
        if rows:
            write("train_gpu", rows, "python bench/train_gpu.py", out)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
