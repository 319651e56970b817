"""A LoRA step of the Llama-3-8B shape on one GPU against transformers + peft: rank 16 on all linear maps, 4 x 2048 tokens.

`python bench/lora_gpu.py --only CASE ...` prints some of the cases, beside the peer, and writes nothing. Frozen bf16 weights, fp32 adapters, AdamW; one process, medians; random weights and data. Before anything is timed, a
small model gives the same loss and the same adapter gradients as peft's.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from common import main, row

import dovetail as dt
from dovetail.adapters import adapt, adapters, load_adapter, trainable
from dovetail.objectives.next_token import NextToken
from dovetail.parts.containers import StackModule
from dovetail.surgery import quantise
from dovetail.training.device import compiled
from dovetail.training.optim import adamw, clip

BENCHMARK = {"device": "cuda", "packages": {"transformers": "transformers", "peft": "peft"}, "minutes": 6}
VOCAB, BATCH, LENGTH, RANK = 128_256, 4, 2048, 16
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": LENGTH, "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
}  # fmt: skip
SPEC = {
    "kind": "decoder", "vocab": VOCAB, "dim": 4096, "depth": 32, "context": LENGTH,
    "blocks": {
        "mixer": {"kind": "attention", "heads": 32, "kv_heads": 8, "position": {"kind": "rope", "theta": 500_000.0}},
        "feedforward": {"kind": "glu", "hidden": 14336},
    },
}  # fmt: skip
PEER = "transformers + peft, checkpointing"
AUTOCAST = f"{PEER}, fp32 adapters under autocast"
TARGETS = {"compiled, checkpointing": 1.25, "compiled, memory free": 1.8}  # ratios
Step = Callable[[], torch.Tensor]


def peft_model(config: dict[str, Any], dtype: torch.dtype, wide: bool = True) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    was = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            base = LlamaForCausalLM(LlamaConfig(**config))
    finally:
        torch.set_default_dtype(was)
    options = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, options, autocast_adapter_dtype=wide)


def theirs(tokens: torch.Tensor, autocast: bool) -> Step:
    model = peft_model(SHAPE, torch.bfloat16, wide=autocast).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    learn = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learn, lr=1e-4, fused=True)

    def step() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learn, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def ours(tokens: torch.Tensor, compile: bool = False, checkpointing: bool = True, storage: str | None = None) -> Step:
    model = dt.build(SPEC, device="cuda", dtype=torch.bfloat16).train()
    if storage is not None:
        quantise(model, storage)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # of training; the shape here is drawn dense, a checkpoint is not
    adapt(model, {"kind": "lora", "rank": RANK})
    for module in model.modules():
        if isinstance(module, StackModule):
            module.checkpointing = checkpointing
    run = compiled(model, checkpointing) if compile else model
    optimizer = adamw(model, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    learn = list(trainable(model).values())
    labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)
    objective, batch = NextToken(), {"tokens": tokens, "labels": labels}
    counts = objective.counts(batch)

    def step() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = objective(run, batch).total(counts)
        loss.backward()
        clip(learn, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def check() -> None:
    """A small model in fp32: equal loss and adapter gradients, or SystemExit."""
    small = SHAPE | {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    theirs = peft_model(small, torch.float32).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.05)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(f"{folder}/adapter")
        theirs.get_base_model().save_pretrained(f"{folder}/unused")
        weights = {
            n.replace(".base_layer", ""): p for n, p in theirs.get_base_model().named_parameters() if "lora_" not in n
        }
        from safetensors.torch import save_file

        save_file({n: p.detach().cpu().contiguous() for n, p in weights.items()}, f"{folder}/unused/model.safetensors")
        model = dt.load(f"{folder}/unused", device="cuda")
        load_adapter(model, f"{folder}/adapter")
    for name, p in model.named_parameters():
        p.requires_grad_("adapters" in name)
    tokens = torch.randint(0, 512, (2, 96), device="cuda")
    labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)
    mine = NextToken()(model, {"tokens": tokens, "labels": labels}).total()
    other = theirs(input_ids=tokens, labels=tokens).loss
    mine.backward()
    other.backward()
    live = adapters(model)["default"].peft_tensors(model, "default")
    worst = float((mine - other).detach().abs())
    norm_mine = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    norm_theirs = torch.stack([p.grad.norm() for n, p in theirs.named_parameters() if "lora_" in n]).norm()
    print(
        f"check: loss {float(mine):.6f} against {float(other):.6f}; gradient norm {norm_mine:.6f} against {norm_theirs:.6f}"
    )
    if worst > 1e-4 or abs(float(norm_mine / norm_theirs) - 1) > 1e-3 or not live:
        raise SystemExit("ours and peft's differ")


def timed(make: Callable[[], Step], steps: int = 5) -> tuple[float, float, float]:
    """(tokens/s, peak GB, seconds of the first step)."""
    torch.cuda.reset_peak_memory_stats()
    step = make()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    step()
    times = []
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    assert torch.isfinite(loss)
    peak = torch.cuda.max_memory_allocated() / 1e9
    del step
    gc.collect()
    torch.cuda.empty_cache()
    return BATCH * LENGTH / sorted(times)[len(times) // 2], peak, first


def measure(only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """only: names of cases, all unless given; the peer is measured always."""
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), device="cuda")
    ways: dict[str, Callable[[], Step]] = {
        PEER: lambda: theirs(tokens, autocast=False),
        AUTOCAST: lambda: theirs(tokens, autocast=True),
        "eager, checkpointing": lambda: ours(tokens),
        "nf4, eager, checkpointing": lambda: ours(tokens, storage="nf4"),
        "compiled, checkpointing": lambda: ours(tokens, compile=True),
        "compiled, memory free": lambda: ours(tokens, compile=True, checkpointing=False),
        "nf4, compiled, checkpointing": lambda: ours(tokens, compile=True, storage="nf4"),
    }
    if only:
        ways = {n: w for n, w in ways.items() if n == PEER or n in only}
    other, other_peak, _ = timed(ways.pop(PEER))
    print(f"{PEER}: {other:,.0f} tokens/s, {other_peak:.1f} GB", flush=True)
    for name, make in ways.items():
        try:
            rate, peak, first = timed(make)
        except torch.OutOfMemoryError as error:
            print(f"{name}: {error}", flush=True)
            continue
        if name == AUTOCAST:
            print(f"{name}: {rate:,.0f} tokens/s, {peak:.1f} GB", flush=True)
            continue
        yield row(
            f"LoRA r{RANK}, Llama-3-8B shape, {BATCH} x {LENGTH}, {name}", "tokens/s", round(rate), round(other), PEER,
            peak_gb=round(peak, 1), peer_peak_gb=round(other_peak, 1), first_step_s=round(first, 1),
            target_ratio=TARGETS.get(name),
        )  # fmt: skip


if __name__ == "__main__":
    if "--only" in sys.argv:
        torch.manual_seed(0)
        check()
        print(*measure(sys.argv[sys.argv.index("--only") + 1 :]), sep="\n")
    else:
        main(__file__)
