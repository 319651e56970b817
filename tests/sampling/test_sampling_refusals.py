"""Options that leave a model nothing to choose, or name what it does not have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dovetail as dt
from dovetail.errors import UserError

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
