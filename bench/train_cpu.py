"""A training step on CPU against transformers' default, a LLaMA of 10 M parameters on 8 x 512 tokens, tokens a second.

The weights are the same in both. The peer is what transformers does by default (fp32, eager, AdamW, clipping); ours is
what `dovetail train` does (bf16 autocast where the processor multiplies it). A peer under the same bf16 autocast stands
beside it, so that what the precision gives is told apart.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import interleaved, main, row
from transformers import LlamaConfig, LlamaForCausalLM

import dovetail as dt
from dovetail.errors import RunError
from dovetail.objectives.next_token import NextToken
from dovetail.training.device import autocast, precision
from dovetail.training.optim import adamw, clip

BENCHMARK = {"threads": 2, "packages": {"transformers": "transformers"}, "minutes": 3}
VOCAB, BATCH, LENGTH, ROUNDS = 8192, 8, 512, 5
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": LENGTH,
}  # fmt: skip


def models() -> tuple[Any, Any]:
    """(transformers' model, ours) with equal weights."""
    torch.manual_seed(0)
    peer = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        return peer, dt.load(folder).train()


def next_tokens(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"tokens": tokens, "labels": torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)}


def peer_step(tokens: torch.Tensor, bf16: bool) -> Callable[[], None]:
    model = models()[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(tokens: torch.Tensor, compiled: bool) -> Callable[[], None]:
    model = models()[1]
    run = torch.compile(model) if compiled else model
    optimizer = adamw(model, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    objective, how, device = NextToken(), precision("auto", torch.device("cpu")), torch.device("cpu")
    batch = next_tokens(tokens)

    def step() -> None:
        counts = objective.counts(batch)
        with autocast(how, device):
            loss = objective(run, batch).total(counts)
        loss.backward()
        clip(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def check() -> None:
    """In fp32 the same loss and norm of the gradients. Raises RunError otherwise."""
    peer, model = models()
    tokens = torch.randint(0, VOCAB, (2, 64))
    losses = [peer(input_ids=tokens, labels=tokens).loss, NextToken()(model, next_tokens(tokens)).total()]
    norms = []
    for loss, of in zip(losses, (peer, model), strict=True):
        loss.backward()
        norms.append(torch.stack([p.grad.norm() for p in of.parameters() if p.grad is not None]).norm())
    for name, (theirs, ours) in {"loss": losses, "gradient's norm": norms}.items():
        if abs(float((ours / theirs).detach()) - 1) > 1e-4:
            raise RunError(f"{name} {float(ours):.6f}, transformers' {float(theirs):.6f}", where="bench/train_cpu.py")


def measure() -> Iterator[dict[str, Any]]:
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH))
    cases = {
        "ours": our_step(tokens, compiled=False),
        "fp32": peer_step(tokens, bf16=False),
        "bf16": peer_step(tokens, bf16=True),
        "compiled": our_step(tokens, compiled=True),
    }
    start = time.perf_counter()
    cases["compiled"]()
    first = round(time.perf_counter() - start, 1)
    times = interleaved(cases, rounds=ROUNDS)
    rate = {name: round(BATCH * LENGTH / seconds, 1) for name, (seconds, _) in times.items()}
    spread = {name: round(rate[name] * width / seconds, 1) for name, (seconds, width) in times.items()}
    case, default = f"10M LLaMA, {BATCH} x {LENGTH} tokens", "transformers fp32 (its default)"
    yield row(case, "tokens/s", rate["ours"], rate["fp32"], default, spread=spread["ours"], target_ratio=2.0)
    yield row(case, "tokens/s", rate["ours"], rate["bf16"], "transformers, bf16 autocast", spread=spread["ours"])
    yield row(
        f"{case}, compiled", "tokens/s", rate["compiled"], rate["fp32"], default, spread=spread["compiled"],
        target_ratio=2.8, compile_s=first,
    )  # fmt: skip


if __name__ == "__main__":
    main(__file__)
