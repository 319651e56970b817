"""A training step on CPU against transformers' default: one process, interleaved, medians.

    python bench/train_cpu.py [--rounds 5] [--compile] [--out docs/results]

The model is a LLaMA of 10 M parameters, the same shape in both. The peer is what transformers does by default (fp32,
eager, AdamW, clipping); ours is what `dovetail train` does (bf16 autocast where the processor multiplies it). A peer
under the same bf16 autocast stands beside it, so that what the precision gives is told apart.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import interleaved, row, write

import dovetail as dt
from dovetail.objectives.next_token import NextToken
from dovetail.training.device import autocast, precision
from dovetail.training.optim import adamw, clip

VOCAB, BATCH, LENGTH = 8192, 8, 512
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": LENGTH,
}  # fmt: skip


def peer_step(tokens: torch.Tensor, bf16: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(tokens: torch.Tensor, compiled: bool) -> Any:
    attention = {"kind": "attention", "heads": 8, "kv_heads": 4}
    model = dt.build(
        {"kind": "decoder", "vocab": VOCAB, "dim": 256, "depth": 8, "context": LENGTH,
         "blocks": {"mixer": attention, "feedforward": {"kind": "glu", "hidden": 688}}}
    ).train()  # fmt: skip
    run = torch.compile(model) if compiled else model
    optimizer = adamw(model, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    objective, how, device = NextToken(), precision("auto", torch.device("cpu")), torch.device("cpu")
    labels = torch.cat([tokens[:, 1:], torch.full((tokens.shape[0], 1), -100)], 1)
    batch = {"tokens": tokens, "labels": labels}

    def step() -> None:
        counts = objective.counts(batch)
        with autocast(how, device):
            loss = objective(run, batch).total(counts)
        loss.backward()
        clip(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="also our step under torch.compile")
    parser.add_argument("--profile", action="store_true", help="print where our step's time goes, and stop")
    parser.add_argument("--out", type=Path, help="folder for train_cpu.json; nothing is written without it")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH))
    ours = our_step(tokens, compiled=False)
    if given.profile:
        ours()
        with torch.profiler.profile() as profile:
            ours()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=48))
        return
    cases = {"ours": ours, "fp32": peer_step(tokens, bf16=False), "bf16": peer_step(tokens, bf16=True)}
    more: dict[str, Any] = {}
    if given.compile:
        cases["compiled"] = our_step(tokens, compiled=True)
        start = time.perf_counter()
        cases["compiled"]()
        more = {"compile_s": round(time.perf_counter() - start, 1)}
    times = interleaved(cases, rounds=given.rounds)
    rate = {name: round(BATCH * LENGTH / seconds, 1) for name, (seconds, _) in times.items()}
    spread = round(times["ours"][1] / times["ours"][0], 3)
    case = f"10M LLaMA, {BATCH} x {LENGTH} tokens"
    rows = [
        row(case, "tokens/s", rate["ours"], rate["fp32"], "transformers fp32 (its default)", spread=spread, target=2.0),
        row(case, "tokens/s", rate["ours"], rate["bf16"], "transformers, bf16 autocast"),
    ]
    if given.compile:
        compiled = f"{case}, compiled"
        rows.append(row(compiled, "tokens/s", rate["compiled"], rate["fp32"], rows[0]["peer"], target=2.8, **more))
    for r in rows:
        print(r)
    if given.out:
        write("train_cpu", rows, f"python {' '.join(['bench/train_cpu.py', *sys.argv[1:]])}", given.out)


if __name__ == "__main__":
    main()
