"""Parameters and operations of a built model, counted from its modules (the meta device will do)."""

from __future__ import annotations

from typing import Any

from torch import nn

from dovetail.models.build import is_causal
from dovetail.parts.storage.base import Stored


def parameter_count(model: nn.Module) -> int:
    """Numbers in all parameters, each tensor once however often it is shared, and those that are kept in codes."""
    coded = sum(m.shape.numel() for m in model.modules() if isinstance(m, Stored))
    return coded + sum(p.numel() for p in model.parameters())


def matmul_weights(model: nn.Module) -> int:
    """Weights that every token is multiplied with: those of linear maps, and a tied table once more as the head."""
    return sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear)) + _tied(model)


def head_weights(model: nn.Module) -> int:
    """Those of them that are the head's."""
    head = getattr(model, "head_part", None)
    linear = head.modules() if isinstance(head, nn.Module) else ()
    return sum(m.in_features * m.out_features for m in linear if isinstance(m, nn.Linear)) + _tied(model)


def _tied(model: nn.Module) -> int:
    """Entries of the embedding's table where the head reads it, by itself or behind a layer of its own."""
    head, table = getattr(model, "head_part", None), getattr(model, "embedding", None)
    tied: Any = table if table is not None and table in (head, getattr(head, "output", None)) else None
    return 0 if tied is None else tied.table.weight.numel()


def attention_width(model: nn.Module) -> int:
    """Σ over softmax attentions of heads x (key width + value width): scores and sums cost 2 of these a key seen."""
    total = 0
    for module in model.modules():
        sizes = all(isinstance(getattr(module, name, None), int) for name in ("heads", "head_dim", "value_dim"))
        if sizes and hasattr(module, "rule"):  # mixers with a matrix state have heads too, and no mask
            part: Any = module
            total += part.heads * (part.head_dim + part.value_dim)
    return total


def flops_per_token(
    model: nn.Module, length: int, *, train: bool = False, causal: bool | None = None, asked: float = 1.0
) -> float:
    """Operations a token in rows of `length`, a multiply-add counted as two.

    Forward: 2 · matmul weights + 2 · S · Σ heads (D + Dv), with S = (length + 1) / 2 keys seen on average when
    causal (as the model is unless given), else `length`. asked: share of the tokens that reach the head. Training: three times that (Kaplan et al. 2020, section 2.1; recomputation by
    activation checkpointing is not counted, so that MFU means useful work). Norms, activations and mixers
    without a softmax beyond their linear maps are not counted.
    """
    seen = (length + 1) / 2 if (is_causal(model) if causal is None else causal) else length
    forward = 2.0 * (matmul_weights(model) - (1.0 - asked) * head_weights(model)) + 2.0 * seen * attention_width(model)
    return 3.0 * forward if train else forward
