"""The trivial rival of a language model: an n-gram model of the same tokens, asked the same questions."""

from __future__ import annotations

from typing import Any

from dovetail.errors import DataError
from dovetail.report.text import encoded, text_hash
from dovetail.stats import NGram


def ngram_rival(tokenizer: Any, reference: str, text: str, order: int = 3) -> dict[str, Any]:
    """Fits modified Kneser-Ney n-grams on the tokens of `reference` and scores what `evaluate` scores of `text`.

    Returns nats_per_token over every token of `text` but the first id (the tokenizer's BOS where it has one), order,
    reference_tokens, reference_sha256, and notes of the smoothing. Raises DataError where the two are the same text,
    or one has nothing to predict.
    """
    if reference == text:
        raise DataError("the n-gram model would be scored on the text that it is fitted on", remedy="give another text")
    known, asked = encoded(tokenizer, reference)[0], encoded(tokenizer, text)[0]
    if len(known) < 2 or len(asked) < 2:
        raise DataError("a text without a token to predict", remedy="give a longer one")
    model = NGram.fit(known, order, vocab=int(max(known.max(), asked.max())) + 1)
    values = model.score(model.encode(asked))[1:]
    return {
        "nats_per_token": -float(values.mean()),
        "order": order,
        "reference_tokens": len(known),
        "reference_sha256": text_hash(reference),
        "notes": list(model.notes),
    }
