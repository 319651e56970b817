"""Corpora that are drawn by a formula: rows of ids without a text behind them, as many as are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers

from dovetail.data.corpus import Corpus
from dovetail.data.rows import Row
from dovetail.data.tokenizer import save_whole
from dovetail.errors import DataError, SpecError
from dovetail.hub import Tokenizer
from dovetail.spec.ranges import Count

Drawn = tuple[np.ndarray, np.ndarray]  # tokens and labels


class Generated(Corpus):
    """Base. A row depends on (what the corpus says, seed, epoch, index) alone; training draws other rows in every epoch.

    examples: rows of an epoch; of a held-out corpus all there are. An id is written as its number: `documents()` gives
    the rows of seed 0 and epoch 0 so, and a model is prompted with "17 300 4". Rows are of one length.
    """

    examples: Count = 1024

    @property
    def ids(self) -> int:
        """How many ids there are, 0 .. ids - 1."""
        raise TypeError(f"{self.kind} does not say its ids")

    @property
    def tokens(self) -> int:
        """How many of them a row has."""
        raise TypeError(f"{self.kind} does not say how long its rows are")

    def draw(self, seed: int, epoch: int) -> Drawn:
        """(tokens, labels) of all rows of an epoch, each (examples, tokens) int64; labels as in every row."""
        raise TypeError(f"{self.kind} does not say how its rows are drawn")

    def documents(self) -> Iterator[str]:
        for row in self.draw(0, 0)[0].tolist():
            yield " ".join(map(str, row))


@dataclass(frozen=True)
class GeneratedSet:
    """Stands where a token set stands. meta: {"text_sha256"} of the rows of seed 0 and epoch 0."""

    corpus: Generated
    meta: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(corpus: Generated, tokenizer: Tokenizer) -> GeneratedSet:
        """Raises SpecError for a tokenizer of other ids."""
        if numbers(tokenizer) != corpus.ids:
            raise SpecError(
                f"the corpus {corpus.kind!r} is made of the ids 0 .. {corpus.ids - 1}, and this tokenizer writes others",
                where="tokenizer",
                remedy="leave tokenizer out: a generated corpus brings its own",
            )
        return GeneratedSet(corpus, {"text_sha256": corpus.fingerprint()})


class GeneratedRows:
    """The rows of a generated corpus. Raises DataError where they are longer than `length`."""

    def __init__(self, corpus: Generated, length: int, seed: int):
        if corpus.tokens > length:
            raise DataError(
                f"the corpus {corpus.kind!r} draws rows of {corpus.tokens} tokens",
                where=f"train.length: {length}",
                remedy=f"set train.length to {corpus.tokens}, or the corpus to shorter rows",
            )
        self.corpus, self.seed = corpus, seed
        self._epochs: dict[int, Drawn] = {}

    def __len__(self) -> int:
        return self.corpus.examples

    def longest(self) -> int:
        """Index of a row with the most tokens."""
        return 0

    def __getitem__(self, index: int) -> Row:
        return self.drawn(index, 0)

    def drawn(self, index: int, epoch: int) -> Row:
        """Row `index` as it is in that epoch."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # a batch may lie in two epochs
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = self.corpus.draw(self.seed, epoch)
        tokens, labels = (of_all[index] for of_all in self._epochs[epoch])
        return Row(tokens, labels, np.zeros(len(tokens), np.int64))


def write_numbers(ids: int, folder: Path) -> None:
    """A tokenizer of the words "0" .. "ids - 1" into `folder`; an id is its number."""
    fast = FastTokenizer(models.WordLevel({str(i): i for i in range(ids)}))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    save_whole(fast, config, folder)


def numbers(tokenizer: Tokenizer) -> int | None:
    """How many numbers a tokenizer of numbers writes; None for another one."""
    vocab = tokenizer.fast.get_vocab(with_added_tokens=True)
    return len(vocab) if all(vocab.get(str(i)) == i for i in range(len(vocab))) else None


def generator(split: str, seed: int, epoch: int) -> np.random.Generator:
    """What an epoch is drawn with; training and held-out rows are of different streams."""
    return np.random.default_rng([0 if split == "train" else 1, seed, epoch])
