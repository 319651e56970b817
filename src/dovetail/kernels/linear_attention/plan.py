"""Which form of linear attention runs, and why: decided from static facts."""

from __future__ import annotations

import torch

from dovetail.kernels import twins
from dovetail.kernels.installed import TRITON
from dovetail.kernels.linear_attention.spans import WIDEST
from dovetail.kernels.plan import Plan


def plan(
    tokens: int,
    *,
    causal: bool,
    segments: bool,
    state: bool,
    device: str = "cpu",
    widest: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Plan:
    """tokens: at once. segments: whether rows are padded or packed. state: whether decoding. widest: features or values
    of a head, whichever are more. dtype: the widest of the inputs'."""
    if twins.asked() and not state:
        return Plan("reference", twins.WHY)
    if state and tokens == 1:
        return Plan("recurrent", "one token: its outer product onto the state, one product with it")
    if causal and device == "cuda" and widest <= WIDEST and dtype != torch.float64 and TRITON:
        return Plan("triton", "causal on CUDA: spans of a row side by side, their states in registers")
    if causal:
        return Plan(
            "chunked", "causal: products inside chunks, a state from chunk to chunk, made again in the backward"
        )
    if segments:
        return Plan("chunked", "documents apart: chunks from left to right and back")
    return Plan("products", "nothing is masked: keys times values, then queries times that")
