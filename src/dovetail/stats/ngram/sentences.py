"""What a caller gives as tokens: one sentence, several, or a text; strings, or the integers of a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from dovetail.errors import DataError, UserError
from dovetail.stats.ngram.trie import Ints
from dovetail.stats.ngram.vocabulary import BOS, EOS, SPECIAL, UNK, Unit, Vocabulary, tokenise

_PIECE = 1 << 20  # ids read from a mapped file at a time


def sentences_of(tokens: Any, unit: Unit | None) -> Sequence[Any]:
    """One or several sentences, as several. Raises UserError for a text without a unit, DataError for nothing."""
    if isinstance(tokens, str):
        if unit is None:
            raise UserError("a text, but no unit says what its tokens are", remedy='give unit="word", or tokens')
        found: Sequence[Any] = tokenise(tokens, unit)
    elif isinstance(tokens, (np.ndarray, torch.Tensor)):
        if tokens.ndim not in (1, 2):
            raise UserError(f"tokens of shape {tuple(tokens.shape)}", remedy="give (T,) or (sentences, T)")
        found = [tokens] if tokens.ndim == 1 else list(tokens)
    else:
        listed = tokens if isinstance(tokens, (list, tuple)) else list(tokens)
        found = [listed] if listed and isinstance(listed[0], (str, int, np.integer)) else listed
    if not found or not any(len(sentence) for sentence in found):
        raise DataError("there are no tokens")
    return found


def vocabulary_of(sentences: Sequence[Any], vocab: int | Sequence[str] | None) -> Vocabulary:
    """What is given, or what the sentences hold."""
    if isinstance(vocab, int):
        return Vocabulary(vocab)
    if vocab is not None:
        return Vocabulary(vocab)
    sample = next(s for s in sentences if len(s))
    if not isinstance(sample[0], str):
        return Vocabulary(1 + max(int(max(p.max() for p in _pieces(s))) for s in sentences if len(s)))
    return Vocabulary([t for t in dict.fromkeys(t for s in sentences for t in s) if t != SPECIAL[UNK]])


def _pieces(sentence: Any) -> Iterator[Any]:
    """An integer sentence as arrays, a piece at a time, so that a memory-mapped one is never read at once."""
    sentence = sentence if isinstance(sentence, (np.ndarray, torch.Tensor)) else np.asarray(sentence)
    return (sentence[i : i + _PIECE] for i in range(0, len(sentence), _PIECE))


def stream_of(sentences: Iterable[Any], vocabulary: Vocabulary) -> Iterator[Ints]:
    """Ids of the sentences in pieces, </s> after each. Raises DataError for <s> or </s> among the tokens."""
    for sentence in sentences:
        for piece in _pieces(sentence) if vocabulary.integers else [sentence]:
            ids = vocabulary.encode(piece)
            if bool(((ids == BOS) | (ids == EOS)).any()):
                raise DataError("<s> or </s> among the tokens", remedy="leave them out: fit puts them there")
            yield ids
        yield np.array([EOS])


def marked(ids: Ints, begins: Ints) -> tuple[Ints, Ints]:
    """Ids of sentences that begin at `begins` (S,), none of them empty, each from its <s> to its </s>; and where the <s>
    are. Raises DataError for nothing, UserError for <s> or </s> among the ids."""
    if not len(ids):
        raise DataError("there are no tokens")
    if bool(((ids == BOS) | (ids == EOS)).any()):
        raise marks_inside()
    number = np.arange(len(begins))
    flat = np.empty(len(ids) + 2 * len(begins), dtype=np.int64)
    flat[np.arange(len(ids)) + np.repeat(2 * number + 1, np.diff(begins, append=len(ids)))] = ids
    first = begins + 2 * number
    flat[first], flat[np.append(first[1:], len(flat)) - 1] = BOS, EOS
    return flat, first


def marks_inside() -> UserError:
    return UserError("<s> or </s> among the tokens", remedy="leave them out: bos and eos say what is put there")
