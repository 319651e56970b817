"""From sentences to numbers: words by descending count, their ids, and what is drawn by count.

One-hot is where word vectors start: word i is the i-th row of the identity, and `one_hot(i) @ matrix == matrix[i]`,
so every lookup here takes the row and no product is formed (`one_hot` is there to show and to test it).
"""

from __future__ import annotations

import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dovetail.errors import DataError, UserError

# A Han character is a word by itself (no spaces say where words end); other letters join, apostrophes inside too.
_WORD = re.compile(r"[㐀-鿿豈-﫿]|(?:(?![㐀-鿿豈-﫿])[^\W\d_])+(?:['’](?:(?![㐀-鿿豈-﫿])[^\W\d_])+)*")  # fmt: skip
_END = re.compile(r"[.!?;。！？；]+|\n\s*\n")


def sentences_of(text: str) -> Iterator[list[str]]:
    """Lower-cased words of each sentence of a text; a sentence ends at . ! ? ; (or 。！？；) or an empty line."""
    for sentence in _END.split(text.lower()):
        words = _WORD.findall(sentence)
        if words:
            yield words


@dataclass(frozen=True)
class Vocabulary:
    """Words by descending count (ties by first appearance). counts: (V,) int64."""

    words: tuple[str, ...]
    counts: Tensor
    index: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", {word: i for i, word in enumerate(self.words)})

    def __len__(self) -> int:
        return len(self.words)

    def id(self, word: str) -> int:
        """The number of a word. Raises UserError for one that is not in the vocabulary."""
        if word not in self.index:
            raise UserError(
                f"{word!r} is not in the vocabulary of {len(self)} words",
                remedy="try it in lower case, or train with a smaller min_count",
            )
        return self.index[word]

    def kept(self, sample: float) -> Tensor:
        """(V,) float64: the chance that an occurrence survives the subsampling of frequent words.

        min(1, (sqrt(f/t) + 1) t/f) with f the word's share of all tokens and t = sample, as word2vec's code has it
        (Mikolov et al. 2013b, eq. 5, has 1 - sqrt(t/f) for the chance to be dropped). sample 0 keeps everything.
        """
        share = self.counts.double() / self.counts.sum()
        if sample == 0:
            return torch.ones_like(share)
        return (((share / sample).sqrt() + 1) * sample / share).clamp(max=1.0)

    def noise(self, power: float = 0.75) -> Tensor:
        """(V,) float64: the unigram distribution to the power, sums to 1 (Mikolov et al. 2013b, section 2.2)."""
        weight = self.counts.double() ** power
        return weight / weight.sum()


@dataclass(frozen=True)
class Corpus:
    """Sentences as one row of ids. ids: (N,) int64. sentence: (N,) int64, the number of each token's sentence.

    raw: how many tokens were read, rare ones too.
    """

    vocabulary: Vocabulary
    ids: Tensor
    sentence: Tensor
    raw: int

    @classmethod
    def read(cls, sentences: Iterable[Sequence[str]], min_count: int = 5, max_words: int | None = None) -> Corpus:
        """Counts and encodes in one pass over the sentences. Words seen less than min_count times are dropped.

        max_words: keep the most frequent ones only. Raises DataError for text instead of sentences, or if fewer
        than two words remain; UserError for a min_count or max_words below 1.
        """
        if min_count < 1 or (max_words is not None and max_words < 1):
            raise UserError("min_count and max_words start at 1", where=f"min_count {min_count}, max_words {max_words}")
        seen: defaultdict[str, int] = defaultdict()
        seen.default_factory = seen.__len__
        found, lengths = array("q"), array("q")
        for sentence in sentences:
            if isinstance(sentence, str):
                raise DataError(
                    "a sentence is a list of words, not one string",
                    where=repr(sentence[:40]),
                    remedy="split it, for example with dovetail.stats.sentences_of(text)",
                )
            found.extend(map(seen.__getitem__, sentence))
            lengths.append(len(sentence))
        flat = np.frombuffer(found, np.int64) if found else np.zeros(0, np.int64)
        counts = np.bincount(flat, minlength=len(seen))
        order = np.argsort(-counts, kind="stable")
        order = order[: int((counts >= min_count).sum())][:max_words]
        if len(order) < 2:
            raise DataError(
                f"{len(order)} words were seen at least {min_count} times among {len(flat)} tokens",
                remedy="give more text, or a smaller min_count",
            )
        known = list(seen)
        new = np.full(len(seen), -1, np.int64)
        new[order] = np.arange(len(order))
        ids = new[flat]
        keep = ids >= 0
        sentence = np.repeat(np.arange(len(lengths)), np.frombuffer(lengths, np.int64))
        vocabulary = Vocabulary(tuple(known[i] for i in order), torch.from_numpy(counts[order]))
        return cls(vocabulary, torch.from_numpy(ids[keep]), torch.from_numpy(sentence[keep]), len(flat))


def one_hot(ids: Tensor, vocab: int) -> Tensor:
    """(...,) int64 -> (..., vocab) float32, a single 1 each: times a (vocab, d) matrix it gives the matrix's rows."""
    return torch.nn.functional.one_hot(ids, vocab).float()
