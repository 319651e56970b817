"""Parameters and operations of a built model, counted from its modules (the meta device will do)."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_count(model: nn.Module) -> int:
    """Numbers in all parameters, each tensor once however often it is shared."""
    return sum(p.numel() for p in model.parameters())


def matmul_weights(model: nn.Module) -> int:
    """Weights that every token is multiplied with: those of linear maps, and a tied table once more as the head."""
    total = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    head: Any = getattr(model, "head_part", None)
    if head is not None and head is getattr(model, "embedding", None):
        total += head.table.weight.numel()
    return total


def attention_width(model: nn.Module) -> int:
    """Σ over softmax attentions of heads x (key width + value width): scores and sums cost 2 of these a key seen."""
    total = 0
    for module in model.modules():
        if all(isinstance(getattr(module, name, None), int) for name in ("heads", "head_dim", "value_dim")):
            part: Any = module
            total += part.heads * (part.head_dim + part.value_dim)
    return total


def flops_per_token(model: nn.Module, length: int, *, train: bool = False, causal: bool = True) -> float:
    """Operations a token in rows of `length`, a multiply-add counted as two.

    Forward: 2 · matmul weights + 2 · S · Σ heads (D + Dv), with S = (length + 1) / 2 keys seen on average when
    causal, else `length`. Training: three times that (Kaplan et al. 2020, section 2.1; recomputation by
    activation checkpointing is not counted, so that MFU means useful work). Norms, activations and mixers
    without a softmax beyond their linear maps are not counted.
    """
    seen = (length + 1) / 2 if causal else length
    forward = 2.0 * matmul_weights(model) + 2.0 * seen * attention_width(model)
    return 3.0 * forward if train else forward
