"""Small random models of transformers, with ours loaded from their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import dovetail as dt

VOCAB = 97


def llama(folder: Path, **changes: Any) -> tuple[Any, Any]:
    """(transformers' model, ours) with equal random weights, spread enough that no two logits tie."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    settings = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.4,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    peer = LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()
    peer.save_pretrained(folder)
    return peer, dt.load(folder)
