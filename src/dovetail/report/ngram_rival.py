"""The trivial rival of a language model: n-grams of the training text in the same tokens, asked the same questions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dovetail.data import Corpus, prepare, rows_of
from dovetail.data.generated import Generated
from dovetail.data.rows import IGNORED, Row, Rows
from dovetail.errors import DataError, SpecError
from dovetail.report.arms import STAGES, Trial, Verdict, judge
from dovetail.report.measure import Quality, quality
from dovetail.report.recipe import Arm, NGrams, NGramsOf
from dovetail.report.text import encoded, text_hash
from dovetail.stats import NGram
from dovetail.training.recipe import Recipe
from dovetail.training.setup import load_tokenizer


@dataclass(frozen=True)
class NGramScore:
    """What n-grams make of the rows of one length, in tokens."""

    length: int
    quality: Quality


@dataclass(frozen=True)
class NGramResult:
    """N-grams beside the arms of a comparison. corpus, text_sha256: what was counted, of `tokens` tokens.

    sizes: different n-grams of each order. notes: of the smoothing. verdicts: how every arm stands to them.
    """

    name: str
    corpus: Mapping[str, Any]
    text_sha256: str
    tokens: int
    sizes: tuple[int, ...]
    notes: tuple[str, ...]
    scores: tuple[NGramScore, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def said(self) -> str:
        """What it is, for people."""
        return _said(self.name, self.tokens, sum(self.sizes), self.notes)

    def at(self, length: int) -> Quality:
        """What they make of rows of so many tokens."""
        return next(score.quality for score in self.scores if score.length == length)


@dataclass(frozen=True)
class Counted:
    """An n-gram model of a corpus in the tokens of a tokenizer."""

    name: str
    model: NGram
    tokens: int
    text_sha256: str

    @property
    def said(self) -> str:
        """What it is, for people."""
        return _said(self.name, self.tokens, sum(self.model.sizes), self.model.notes)

    def nats(self, rows: Tensor) -> Tensor:
        """-log p of every token but the first, rows (R,T) int64 -> (R,T-1) float64; a row is all that it sees."""
        return -torch.from_numpy(self.model.score(self.model.encode(rows))[:, 1:])

    def held_out(self, rows: Rows, limit: int | None = None) -> tuple[float, int]:
        """Mean nats/token over the labels of training's rows (the first `limit` of them), and how many labels there are.

        Documents that do not see each other here do not either. Raises SpecError for rows that are no text.
        """
        total, count = 0.0, 0
        for index in range(min(len(rows), limit or len(rows))):
            row = rows[index]
            if not isinstance(row, Row):
                raise SpecError("these rows are not read from left to right", where="ngram", remedy="leave it out")
            real = row.labels != IGNORED
            stream = np.append(row.tokens, row.labels[-1] if real[-1] else row.tokens[-1])
            begins = np.diff(row.segments, prepend=-2, append=row.segments[-1]) != 0
            values = self.model.score(self.model.encode(stream), begins)[1:]
            total, count = total - float(values[real].sum()), count + int(real.sum())
        return total / count, count


def count_ngrams(asked: NGrams, corpus: Corpus, tokenizer: Any, cache: str | None = None) -> Counted:
    """N-grams of a corpus, each document by itself between the marks that training puts around it.

    cache: folder for token sets, as in training recipes. Raises DataError for an empty corpus.
    """
    tokens = prepare(corpus, tokenizer, cache)
    documents = [tokens.tokens[a:b] for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]
    model = NGram.fit(documents, asked.order, vocab=tokenizer.vocab_size)
    return Counted(asked.name, model, len(tokens), tokens.meta["text_sha256"])


def ngrams_beside(
    asked: NGramsOf, tokenizer: Any, rows: Mapping[int, Tensor], trials: Sequence[Trial], text_sha256: str
) -> NGramResult:
    """N-grams on the rows (R, length + 1) of every length, and how each trial stands to them at each of its stages.

    text_sha256: of the scored corpus. Raises DataError where that is the one that was counted.
    """
    corpus: Any = asked.data
    counted = count_ngrams(asked, corpus, tokenizer)
    if counted.text_sha256 == text_sha256:
        raise DataError("the n-grams were counted on the text that is scored", remedy="set ngram.data to another text")
    rivals = {length: _trial(asked, length, counted.nats(some)) for length, some in rows.items()}
    return NGramResult(
        name=asked.name,
        corpus=corpus.to_dict(),
        text_sha256=counted.text_sha256,
        tokens=counted.tokens,
        sizes=counted.model.sizes,
        notes=counted.model.notes,
        scores=tuple(NGramScore(n, rival.quality["as it is"][0]) for n, rival in sorted(rivals.items())),
        verdicts=tuple(judge(t, rivals[t.length], stage) for t in trials for stage in STAGES if stage in t.nats),
    )


def ngram_of_training(asked: NGrams, recipe: Recipe) -> tuple[str, float, str]:
    """(name, nats/token, what it is) of n-grams of a recipe's training text, on what its held-out evaluation reads.

    The recipe trains by next_token on texts, and holds one out. Raises SpecError for corpora that are no text.
    """
    data, t, tokenizer = recipe.data, recipe.train, load_tokenizer(recipe)
    train: Any = data.train
    held_out: Any = data.held_out
    if isinstance(train, Generated) or isinstance(held_out, Generated):
        raise SpecError("rows that are generated hold no text", where="ngram", remedy="leave it out")
    counted = count_ngrams(asked, train, tokenizer, data.cache)
    rows = rows_of(prepare(held_out, tokenizer, data.cache), t.length, data.pack)
    nats, labels = counted.held_out(rows, t.eval_batches * t.batch or None)
    return counted.name, nats, f"{counted.said} It was scored on the same {labels:,} tokens."


def ngram_rival(tokenizer: Any, reference: str, text: str, order: int = 3) -> dict[str, Any]:
    """Fits modified Kneser-Ney n-grams on the tokens of `reference` and scores what `evaluate` scores of `text`.

    Returns nats_per_token over every token of `text` but the first id (the tokenizer's BOS where it has one), order,
    bits_per_byte (None where no byte was scored), reference_tokens, reference_sha256, and notes of the smoothing.
    Raises DataError where the two are the same text, or one has nothing to predict.
    """
    if reference == text:
        raise DataError("the n-gram model would be scored on the text that it is fitted on", remedy="give another text")
    known, (asked, before) = encoded(tokenizer, reference)[0], encoded(tokenizer, text)
    if len(known) < 2 or len(asked) < 2:
        raise DataError("a text without a token to predict", remedy="give a longer one")
    model = NGram.fit(known, order, vocab=int(max(known.max(), asked.max())) + 1)
    values = model.score(model.encode(asked))[1:]
    size = len(text.encode("utf-8")) - before
    return {
        "nats_per_token": -float(values.mean()),
        "bits_per_byte": -float(values.sum()) / math.log(2) / size if size else None,
        "order": order,
        "reference_tokens": len(known),
        "reference_sha256": text_hash(reference),
        "notes": list(model.notes),
    }


def _trial(asked: NGrams, length: int, nats: Tensor) -> Trial:
    """The n-grams as a trial that is the same at every stage, and with every seed."""
    trial = Trial(Arm(name=asked.name, length=length), length, asked.order - 1, None, None)
    for stage in STAGES:
        trial.nats[stage] = [nats]
        trial.quality[stage] = [quality(nats, context=(asked.order - 1, asked.order - 1))]
        trial.random[stage] = False
    return trial


def _said(name: str, tokens: int, ngrams: int, notes: Iterable[str]) -> str:
    more = "".join(f" {note}." for note in notes)
    return (
        f"{name}: the trivial rival, interpolated modified Kneser-Ney counted on {tokens:,} tokens of training text in "
        f"the same vocabulary, {ngrams:,} n-grams.{more}"
    )
