"""A compiler follows every plan: what is chosen on a GPU too is a constant of the graph, which does not break there."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from dovetail.kernels import (
    adamw,
    attention,
    contrastive,
    cross_entropy,
    delta_rule,
    gate,
    gated_linear,
    legs_recurrence,
    linear_attention,
    mixed_chunk,
    quantise,
    ssm_convolution,
    ssm_scan,
)

BF16 = torch.bfloat16
PLANS: dict[str, Callable[[], object]] = {
    "AdamW": lambda: adamw.plan("cuda", BF16),
    "attention": lambda: attention.plan(device="cuda", dtype=BF16, queries=512, width=64, mask=None, score=None),
    "contrastive": lambda: contrastive.plan("cuda", BF16),
    "cross-entropy": lambda: cross_entropy.plan("cuda", BF16),
    "delta rule": lambda: delta_rule.plan(512, device="cuda", dtype=BF16),
    "gate": lambda: gate.plan("silu", "cuda", BF16),
    "gated linear": lambda: gated_linear.plan(512, "cuda", BF16, 64),
    "HiPPO": lambda: legs_recurrence.plan(512, 64, plain=True, device="cuda"),
    "linear attention": lambda: linear_attention.plan(
        512, causal=True, segments=False, state=False, device="cuda", widest=64, dtype=BF16
    ),
    "mixed chunk": lambda: mixed_chunk.plan(
        512, chunk=64, causal=True, segments=False, state=False, device="cuda", width=64, dtype=BF16
    ),
    "codes": lambda: quantise.plan("cuda"),
    "products with codes": lambda: quantise.plan_linear("cuda", 1, BF16, 64, 512),
    "scan": lambda: ssm_scan.plan(512, 16, device="cuda"),
    "convolution": lambda: ssm_convolution.plan(512, "cuda"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_a_constant_of_a_compiled_graph(name: str) -> None:
    plan = PLANS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.compile(lambda x: x + len(plan().why), backend="eager", fullgraph=True)(torch.zeros(()))  # type: ignore[attr-defined]
    torch.compiler.reset()
    assert int(found) > 0
