"""Options that leave a model nothing to choose, or name what it does not have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dovetail as dt
from dovetail.errors import SpecError, UserError

TOKENS = torch.tensor([[1, 2, 3]])


def decoder(vocab: int = 16) -> Any:
    return dt.build({"kind": "decoder", "vocab": vocab, "dim": 16, "depth": 1, "blocks": {"mixer": "attention"}})


@pytest.mark.parametrize(
    "options", [{"suppress": (16,)}, {"suppress": (-1,)}, {"eos": (99,)}, {"suppress": tuple(range(16))}]
)
def test_ids_that_the_model_does_not_have_are_refused_before_decoding(options: dict[str, Any]) -> None:
    for beams in (1, 2):
        with pytest.raises(UserError, match=r"vocabulary|suppressed"):
            dt.generate(decoder(), None, TOKENS, max_new_tokens=2, beams=beams, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_no_token_left_is_an_error_and_not_token_zero(temperature: float) -> None:
    options = {"no_repeat_ngram": 1, "temperature": temperature}
    assert sorted(dt.generate(decoder(8), None, TOKENS, max_new_tokens=5, **options)[0].tolist()) == [0, 4, 5, 6, 7]
    with pytest.raises(UserError, match="leaves no token to choose after 5"):
        dt.generate(decoder(8), None, TOKENS, max_new_tokens=6, **options)


@pytest.mark.parametrize("more", [{"max_new_tokens": 6}, {"max_new_tokens": 1, "suppress": (0, 4, 5, 6, 7)}], ids=str)
def test_beams_with_no_token_left_are_an_error_too(more: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="nothing is left to choose"):
        dt.generate(decoder(8), None, TOKENS, beams=2, no_repeat_ngram=1, **more)


def test_a_temperature_that_no_score_can_be_divided_by_is_refused() -> None:
    """The scores would be infinite, and the draw the last id of all."""
    with pytest.raises(SpecError, match="set 0 for the likeliest"):
        dt.generate(decoder(), None, TOKENS, max_new_tokens=2, temperature=1e-45, seed=1)
    cold = dt.generate(decoder(), None, TOKENS, max_new_tokens=4, temperature=1e-30, seed=1)
    assert torch.equal(cold, dt.generate(decoder(), None, TOKENS, max_new_tokens=4))
