"""The plain twin: torch's own cross-entropy over all logits at once, differentiated by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # a label that nobody is asked to predict


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float, z: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, Σ nats, hits), each (), of logits (N,V) against labels (N,), in fp32 (fp64 if the logits are)."""
    logits, real = logits.to(torch.promote_types(logits.dtype, torch.float32)), labels != IGNORED
    known: dict[str, Any] = {"ignore_index": IGNORED, "reduction": "sum"}
    total = F.cross_entropy(logits, labels, label_smoothing=smoothing, **known)
    if z:
        total = total + z * torch.logsumexp(logits[real], -1).square().sum()
    hits = ((logits.argmax(-1) == labels) & real).sum()
    return total, F.cross_entropy(logits.detach(), labels, **known), hits
