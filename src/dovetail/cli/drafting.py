"""--draft of `dovetail generate`: from what is written there to a draft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dovetail.errors import UserError

ORDER, SMOOTHING = 4, "witten-bell"  # of n-grams that are counted on the spot


def draft_of(text: str, tokens: int | None, model: Any, tokenizer: Any, **how: Any) -> Any:
    """The draft for `model` that text names: "lookup", "ngram:FILE", or a model's directory or hub id.

    FILE is an ARPA file over the tokenizer's ids (.arpa), or a text to count n-grams of its ids in. tokens: proposed at a
    time; the draft's own number unless given. how: what a draft model is loaded with. Raises UserError.
    """
    from dovetail.data.corpus import read_text
    from dovetail.hub import load
    from dovetail.hub.remote import resolve
    from dovetail.sampling import DraftModel, NgramDraft, PromptLookup
    from dovetail.stats import NGram

    more = {} if tokens is None else {"tokens": tokens}
    if text == "lookup":
        return PromptLookup(**more)
    if not text.startswith("ngram:"):
        return DraftModel(load(resolve(text), **how), **more)
    file = Path(text.removeprefix("ngram:"))
    if not file.exists() or file.is_dir():
        raise UserError(f"no file {str(file)!r}", where="--draft", remedy="give ngram: and an ARPA file or a text")
    if file.suffix == ".arpa":
        return NgramDraft(NGram.load_arpa(file, integers=True), **more)
    return NgramDraft(NGram.fit(tokenizer.encode(read_text(file)), ORDER, SMOOTHING, vocab=model.spec.vocab), **more)
