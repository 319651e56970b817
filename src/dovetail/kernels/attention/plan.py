"""Which kernel runs an attention, and why: decided from static facts, never from data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dovetail.kernels.attention.coords import BoundMask
from dovetail.kernels.attention.score import Score


@dataclass(frozen=True)
class Plan:
    """The path taken ("sdpa", "flex", "bands", "tiled", "regions") and the reason, for people."""

    path: str
    why: str


_BAND = 64  # queries from which bands win on a CPU


def plan(
    *, device: str, dtype: torch.dtype, queries: int, mask: BoundMask | None, score: Score | None, dropout: float = 0.0
) -> Plan:
    """Chooses the path for one attention call. All arguments are static in a built model."""
    plain = score is None or score.plain
    hides = mask is not None and not mask.full
    if plain and device == "cpu" and dtype == torch.bfloat16 and queries >= _BAND and not dropout:
        return Plan("bands", "bf16 on CPU: bands of queries over a scratch that all layers use")
    if plain and not hides:
        return Plan("sdpa", "nothing is masked: fused attention without a mask")
    if plain and mask is not None and mask.causal:
        return Plan("sdpa", "plain causal over aligned tokens: fused attention, is_causal")
    if score is not None and score.value_terms is not None:
        return Plan("tiled", "value terms need the probabilities: plain attention in tiles of queries")
    if plain and device == "cuda" and queries >= 128 and not dropout:
        return Plan("flex", "a mask beyond causal on CUDA: FlexAttention skips the empty tiles")
    if plain:
        return Plan("sdpa", "a mask beyond causal: fused attention with the mask as booleans")
    if score is not None and score.cap is None:
        return Plan("sdpa", "additive terms: fused attention with the terms as a bias")
    return Plan("tiled", "a soft cap is not additive: plain attention in tiles of queries, recomputed in the backward")
