"""A training step of the Llama-3.2-1B shape on one GPU against transformers, 4 x 4096 tokens, tokens a second.

bf16 weights, AdamW, random weights and data, one process, medians. MFU counts 6 FLOPs a parameter and token and the
attention's causal half, against 990 TFLOP/s; the floor is these at the measured rate of products.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import ceilings, main, row
from transformers import LlamaConfig, LlamaForCausalLM

import dovetail as dt
from dovetail.errors import RunError
from dovetail.objectives.next_token import NextToken
from dovetail.training.flops import flops_per_token
from dovetail.training.optim import adamw, clip

BENCHMARK = {"device": "cuda", "packages": {"transformers": "transformers"}, "minutes": 4}
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
TARGETS = {"compiled": {"target": 68_000, "target_peak_gb": 26}}
Made = tuple[Callable[[], None], Any]


def next_tokens(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"tokens": tokens, "labels": torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)}


def ours(tokens: torch.Tensor, compiled: bool) -> Made:
    model = dt.build(SPEC, device="cuda", dtype=torch.bfloat16).train()
    run = torch.compile(model) if compiled else model
    optimizer = adamw(model, lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    objective, batch = NextToken(), next_tokens(tokens)
    counts = objective.counts(batch)

    def step() -> None:
        objective(run, batch).total(counts).backward()
        clip(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, model


def theirs(tokens: torch.Tensor, compiled: bool) -> Made:
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


def check(device: str = "cuda") -> None:
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
    for name, (expected, found) in {"loss": losses, "gradient's norm": norms}.items():
        if abs(float(found / expected) - 1) > 1e-3:
            raise RunError(
                f"{name} {float(found):.6f}, transformers' {float(expected):.6f}", where="bench/train_gpu.py"
            )


def timed(make: Callable[[], Made], steps: int = 6) -> tuple[float, float, float, float]:
    """(tokens/s, its spread, peak GB, seconds of the first step)."""
    torch.cuda.reset_peak_memory_stats()
    step, model = make()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    step()
    rates = []
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        rates.append(BATCH * LENGTH / (time.perf_counter() - start))
    peak = torch.cuda.max_memory_allocated() / 1e9
    del step, model
    gc.collect()
    torch.cuda.empty_cache()
    torch.compiler.reset()
    return sorted(rates)[len(rates) // 2], max(rates) - min(rates), peak, first


def measure() -> Iterator[dict[str, Any]]:
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), device="cuda")
    flops = flops_per_token(dt.build(SPEC, weights=False), LENGTH, train=True)
    floor = ceilings("cuda").bf16_matmul_tflops * 1e12 / flops
    peers = {
        name: timed(lambda how=how: theirs(tokens, how == "compiled"))
        for name, how in {"transformers eager": "eager", "transformers, compiled": "compiled"}.items()
    }
    for how in ("compiled", "eager"):
        rate, spread, peak, first = timed(lambda how=how: ours(tokens, how == "compiled"))
        for peer, (other, _, peer_peak, _) in peers.items():
            yield row(
                f"Llama-3.2-1B shape, {BATCH} x {LENGTH}, {how}", "tokens/s", round(rate), round(other), peer,
                spread=round(spread), mfu=round(rate * flops / PEAK, 3), peak_gb=round(peak, 1),
                peer_peak_gb=round(peer_peak, 1), first_step_s=round(first, 1), floor=round(floor), **TARGETS.get(how, {}),
            )  # fmt: skip


if __name__ == "__main__":
    main(__file__)
