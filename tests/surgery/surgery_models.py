"""Small random models in fp64, with weights large enough that every path matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dovetail as dt

VOCAB, DIM, DEPTH, CONTEXT = 41, 24, 3, 16
EXACT = 1e-10  # of fp64


def llama(**changes: Any) -> Any:
    """RMSNorm, grouped heads with RoPE, a gated feed-forward, a head of its own."""
    mixer = {"kind": "attention", "heads": 4, "kv_heads": 2}
    block = {"mixer": mixer, "feedforward": {"kind": "glu", "hidden": 20}, "norm": {"kind": "rms"}}
    return made({"norm": {"kind": "rms"}, "blocks": block} | changes)


def gpt2(tied: bool = True, block: dict[str, Any] | None = None, **changes: Any) -> Any:
    """LayerNorm, heads with biases, an MLP, learned positions, a tied head."""
    mixer = {"kind": "attention", "heads": 4, "bias": "all", "position": "none"}
    inside = {"kind": "pre", "mixer": mixer, "feedforward": {"kind": "mlp", "hidden": 20}, "norm": {"kind": "layer"}}
    head = {"kind": "ref", "path": "embedding"} if tied else {"kind": "linear"}
    whole = {"position": {"kind": "learned"}, "norm": {"kind": "layer"}, "blocks": inside | (block or {}), "head": head}
    return made(whole | changes)


def linear() -> Any:
    """Linear attentions with grouped heads."""
    return made({"blocks": {"mixer": {"kind": "linear", "heads": 4, "kv_heads": 2}}})


def gau() -> Any:
    """Gated attention units alone."""
    return made({"blocks": {"mixer": {"kind": "gau", "key_dim": 6, "hidden": 20}, "feedforward": None}})


def made(spec: dict[str, Any], seed: int = 1) -> Any:
    base = {"kind": "decoder", "vocab": VOCAB, "dim": DIM, "depth": DEPTH, "context": CONTEXT}
    model = dt.build(base | spec, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = 0.3 if p.dim() == 1 else 1.0 if "table" in name else p.shape[-1] ** -0.5
            centre = 1.0 if p.dim() == 1 and name.endswith("weight") else 0.1
            p.copy_(centre + spread * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def tokens(length: int = CONTEXT, rows: int = 2, vocab: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def gap(a: Any, b: Any, length: int = CONTEXT) -> float:
    """Largest difference of the logits, as a share of the largest logit."""
    x, y = a(tokens(length)).logits, b(tokens(length)).logits
    return float((x - y).abs().max() / x.abs().max())
