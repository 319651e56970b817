"""How well a model predicts a text."""

from __future__ import annotations

import math
from typing import Any

from dovetail.errors import DataError
from dovetail.report.measure import spans, token_nats
from dovetail.report.text import encoded, text_hash


def evaluate(
    model: Any, tokenizer: Any, text: str, length: int | None = None, stride: int | None = None
) -> dict[str, Any]:
    """Scores every token of `text` once, in windows of `length` tokens that step by `stride`.

    length: the model's trained context unless given (the whole text when it has none). stride: half of it. The
    tokenizer's BOS, where there is one, begins the text, so that its first token is scored too. The model is run as it
    is, in its own dtype (bf16 on a CPU is slow: load it with dtype="float32").

    Returns nats_per_token (mean of -log p), perplexity (its exponential), bits_per_byte (None where no byte was
    scored), tokens and bytes (UTF-8) that were scored, windows, length and stride (in tokens), text_sha256.
    Raises DataError for a text with nothing to predict, a stride beyond the length or ids outside the vocabulary,
    UserError for what is no language model of one stream, RunError for losses that are not finite.
    """
    ids, before = encoded(tokenizer, text)
    questions = ids.shape[0] - 1
    if questions < 1:
        raise DataError(
            f"the text has {ids.shape[0]} token{'s' * (ids.shape[0] != 1)}, and the first is never predicted",
            remedy="give a longer text",
        )
    length = int(length or getattr(model.spec, "context", None) or questions)
    stride = stride or max(1, length // 2)
    if not 1 <= stride <= length:
        raise DataError(f"a stride of {stride} over windows of {length}", remedy=f"give 1 to {length}")
    length = min(length, questions)  # a shorter text is one window
    stride = min(stride, length)
    total = float(token_nats(model, ids[None], see=length, stride=stride).double().sum())
    size = len(text.encode("utf-8")) - before
    mean = total / questions
    return {
        "nats_per_token": mean,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "bits_per_byte": total / math.log(2) / size if size else None,
        "tokens": questions,
        "bytes": size,
        "windows": len(spans(questions, length, stride)),
        "length": length,
        "stride": stride,
        "text_sha256": text_hash(text),
    }
