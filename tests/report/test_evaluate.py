"""One text, scored: totals by hand, units, and texts that cannot be scored."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import torch

import dovetail as dt
from dovetail.errors import DataError
from dovetail.report.evaluate import evaluate
from dovetail.report.text import encoded


def test_a_short_text_is_one_window_and_every_byte_counts(model: Any, tokenizer: Any) -> None:
    text = "the joint holds: 准确"
    ids = torch.tensor([tokenizer.encode(text)])
    assert int(ids[0, 0]) == tokenizer.bos_id
    with torch.no_grad():
        log_p = model(ids[:, :-1]).logits.log_softmax(-1)
    total = -float(log_p.gather(-1, ids[:, 1:, None]).double().sum())
    found = evaluate(model, tokenizer, text)
    questions = ids.shape[1] - 1
    assert found["tokens"] == questions and found["windows"] == 1
    assert found["nats_per_token"] == pytest.approx(total / questions, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / questions), rel=1e-4)
    assert found["bytes"] == len(text.encode())
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)
    assert found["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_windows_cover_a_long_text_once(model: Any, tokenizer: Any, texts: dict[str, str]) -> None:
    text = texts["held_out"]
    ids = tokenizer.encode(text)
    total, first = 0.0, 0
    with torch.no_grad():
        for begin in (*range(0, len(ids) - 1 - 32, 8), len(ids) - 1 - 32):
            window = torch.tensor([ids[begin : begin + 33]])
            log_p = model(window[:, :-1]).logits[0].log_softmax(-1)
            for i in range(first - begin, 32):
                total -= float(log_p[i, window[0, i + 1]])
            first = begin + 32
    assert first == len(ids) - 1
    found = evaluate(model, tokenizer, text, stride=8)
    assert found["length"] == 32 and found["stride"] == 8
    assert found["nats_per_token"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)


def test_without_a_begin_token_the_first_token_is_not_counted(model: Any, tokenizer: Any) -> None:
    tokenizer.bos_id = None
    tokenizer.fast.post_processor = None
    found = evaluate(model, tokenizer, "the dovetail joint")
    ids, before = encoded(tokenizer, "the dovetail joint")
    assert found["tokens"] == len(ids) - 1
    assert before == len(tokenizer.decode(ids[:1].tolist()).encode()) > 0
    assert found["bytes"] == len("the dovetail joint") - before


def test_texts_that_cannot_be_scored(model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="first is never predicted"):
        evaluate(model, tokenizer, "")
    with pytest.raises(DataError, match="stride of 40"):
        evaluate(model, tokenizer, "the joint", length=20, stride=40)
    assert dt.evaluate is evaluate
