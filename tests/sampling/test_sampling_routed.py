"""Rows routed to different adapters: each is decoded as it would be alone, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dovetail as dt
from dovetail.adapters import adapt, off, route, use
from dovetail.errors import UserError
from dovetail.sampling import PromptLookup

PROMPTS = [[1, 2, 3, 1, 2, 3, 4], [5, 6, 5, 6, 5]]


@pytest.fixture
def model() -> Any:
    """Two adapters on the head, under which the rows say quite different things."""
    spec = {"kind": "decoder", "vocab": 12, "dim": 32, "depth": 1, "context": 64, "blocks": {"mixer": "attention"}}
    made = dt.build(spec, seed=1).eval()
    for seed, name in enumerate("ab"):
        adapt(made, {"kind": "lora", "rank": 4, "targets": ["head_part.linear"]}, name=name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, p in made.named_parameters():
                if f"adapters.{name}." in key:
                    p.normal_(0.0, 0.6, generator=generator)
    return made


@pytest.mark.parametrize("drafted", [1, 3])
def test_a_draft_is_scored_by_the_adapter_of_its_row(model: Any, drafted: int) -> None:
    alone = []
    for prompt, name in zip(PROMPTS, "ab", strict=True):
        use(model, name)
        alone.append(dt.generate(model, None, [prompt], max_new_tokens=16)[0].tolist())
    assert alone[0] != alone[1]
    with route(model, ["a", "b"]):
        rows = dt.generate(model, None, PROMPTS, max_new_tokens=16, draft=PromptLookup(tokens=drafted)).tolist()
    assert rows == alone
    end = alone[1][0]  # the second row ends at once, so that later rounds score one row of the two
    with route(model, ["a", "b"]):
        wanted = dt.generate(model, None, PROMPTS, max_new_tokens=16, eos=end)
        drawn = dt.generate(model, None, PROMPTS, max_new_tokens=16, eos=end, draft=PromptLookup(tokens=drafted))
    assert torch.equal(drawn, wanted)


def test_beams_are_refused_while_rows_are_routed(model: Any) -> None:
    with route(model, ["a", "b"]):
        with pytest.raises(UserError, match="beams, which change rows, while rows are routed"):
            dt.generate(model, None, PROMPTS, max_new_tokens=4, beams=2)
        with off(model):
            assert dt.generate(model, None, PROMPTS, max_new_tokens=4, beams=2).shape == (2, 4)
