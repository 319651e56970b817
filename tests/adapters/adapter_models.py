"""Small models that every adapter is tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dovetail as dt

VOCAB = 61


def decoder(tied: bool = False, seed: int = 0, depth: int = 2, **attention: Any) -> Any:
    """LLaMA blocks with grouped keys, two unless said."""
    mixer = {"kind": "attention", "heads": 4, "kv_heads": 2} | attention
    spec: dict[str, Any] = {
        "kind": "decoder", "vocab": VOCAB, "dim": 32, "depth": depth, "context": 64,
        "blocks": {"mixer": mixer, "feedforward": {"kind": "glu", "hidden": 48}},
    }  # fmt: skip
    if tied:
        spec["head"] = {"kind": "ref", "path": "embedding"}
    return dt.build(spec, seed=seed).eval()


def peers(folder: Path, kind: str = "llama", tied: bool = False) -> tuple[Any, Any]:
    """(transformers' model, ours) of one random checkpoint."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "llama":
        theirs: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
            )
        )  # fmt: skip
    else:
        theirs = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    theirs.save_pretrained(folder)
    return theirs.eval(), dt.load(folder)


def stir(model: Any, spread: float = 0.2, seed: int = 1) -> None:
    """What trains, moved away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator))


def tokens(rows: int = 2, length: int = 12, seed: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
