"""WordVectors: words with a vector each; how they are made, kept and asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dovetail.errors import DataError, UserError, did_you_mean
from dovetail.stats.words import queries
from dovetail.stats.words.counts import Pmi, pmi_vectors
from dovetail.stats.words.files import load_word2vec, save_word2vec
from dovetail.stats.words.glove import Glove, glove_vectors
from dovetail.stats.words.training import Cbow, SkipGram, Word2Vec, train
from dovetail.stats.words.vocabulary import Corpus

Method = SkipGram | Cbow | Pmi | Glove
METHODS: dict[str, type[Method]] = {"skipgram": SkipGram, "cbow": Cbow, "pmi": Pmi, "glove": Glove}


class WordVectors:
    """V words and their vectors. words: distinct; matrix: (V, d) float32, on the CPU.

    Raises DataError where the two do not fit.
    """

    def __init__(self, words: Sequence[str], matrix: Tensor):
        self.words, self.matrix = tuple(words), matrix.detach().cpu().to(torch.float32)
        self.index = {word: i for i, word in enumerate(self.words)}
        if self.matrix.dim() != 2 or len(self.words) != len(self.matrix) or len(self.index) != len(self.words):
            raise DataError(
                f"{len(self.words)} words ({len(self.index)} distinct) and vectors of shape {tuple(self.matrix.shape)}",
                remedy="give as many distinct words as the matrix has rows",
            )
        self.unit = queries.unit_rows(self.matrix)

    @classmethod
    def fit(
        cls,
        sentences: Iterable[Sequence[str]] | Corpus,
        method: str | Method = "skipgram",
        *,
        min_count: int = 5,
        max_words: int | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> WordVectors:
        """Vectors of the words of a text.

        sentences: lists of words, read once; or a `Corpus` (min_count and max_words are then its own). method:
        "skipgram", "cbow", "pmi", "glove" with its options as keywords, or one of `SkipGram`, `Cbow`, `Pmi`, `Glove`.
        device: of the training ("pmi" runs on the CPU). progress(done, total): called now and then.
        Raises UserError for an unknown method or option, DataError for text that cannot be used.
        """
        chosen = _options(method, options)
        if isinstance(sentences, Corpus):
            if (min_count, max_words) != (5, None):
                raise UserError("a Corpus has its words already", remedy="say min_count and max_words to Corpus.read")
            corpus = sentences
        else:
            corpus = Corpus.read(sentences, min_count, max_words)
        if isinstance(chosen, Word2Vec):
            matrix = train(corpus, chosen, device=device, seed=seed, progress=progress)
        elif isinstance(chosen, Glove):
            matrix = glove_vectors(corpus, chosen, device=device, seed=seed, progress=progress)
        elif torch.device(device).type != "cpu":
            raise UserError("pmi counts and factorises on the CPU", remedy="leave device out")
        else:
            matrix = pmi_vectors(corpus, chosen, seed=seed)
        return cls(corpus.vocabulary.words, matrix)

    @classmethod
    def load(cls, path: str | Path) -> WordVectors:
        """A word2vec file (binary if it ends in .bin) or GloVe's text. Raises DataError."""
        return cls(*load_word2vec(path))

    def save(self, path: str | Path) -> None:
        """word2vec's binary format if the name ends in .bin, else its text. Raises DataError."""
        save_word2vec(path, self.words, self.matrix)

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self.index

    def __getitem__(self, word: str) -> Tensor:
        """(d,). Raises UserError for an unknown word."""
        return self.matrix[self.id(word)]

    def id(self, word: str) -> int:
        """Row of a word. Raises UserError with the closest word that there is."""
        if word not in self.index:
            near = [other for other in self.words[:50_000] if other[:1] == word[:1]]
            remedy = did_you_mean(word, near) if near and len(near) < 5000 else "look for it in .words"
            raise UserError(f"no vector of {word!r} among {len(self)}", remedy=remedy)
        return self.index[word]

    def similarity(self, first: str, second: str) -> float:
        """Cosine of two words' vectors."""
        return float(self.unit[self.id(first)] @ self.unit[self.id(second)])

    def nearest(self, word: str | Tensor, count: int = 10) -> list[tuple[str, float]]:
        """The words of the largest cosine with a word, itself left out, or with a vector (d,)."""
        if isinstance(word, str):
            own = self.id(word)
            scores = self.unit @ self.unit[own]
            scores[own] = -torch.inf
            return self._best(scores, min(count, len(self) - 1))
        return self._best(self.unit @ queries.unit_rows(word.float()[None])[0], count)

    def analogy(
        self, a: str, b: str, c: str, count: int = 10, rule: queries.Rule = "3cosadd"
    ) -> list[tuple[str, float]]:
        """Words x such that a is to b as c is to x, best first; a, b and c left out. rule: 3cosadd or 3cosmul."""
        ids = torch.tensor([[self.id(a), self.id(b), self.id(c)]])
        return self._best(queries.analogy_scores(self.unit, ids, rule)[0], min(count, len(self) - len({a, b, c})))

    def score_analogies(self, path: str | Path, rule: queries.Rule = "3cosadd") -> queries.AnalogyScore:
        """Accuracy on a file like questions-words.txt, by section. Raises DataError."""
        return queries.score_analogies(self.unit, self.index, path, rule)

    def score_similarity(self, path: str | Path) -> tuple[float, int, int]:
        """(Spearman's correlation with people's scores of word pairs, pairs used, pairs left out). Raises DataError."""
        return queries.score_similarity(self.unit, self.index, path)

    def embedding(self, tokens: Sequence[str], missing: Literal["error", "mean"] = "error") -> WordVectors:
        """The vectors in the order of a tokenizer's ids, to start an embedding from: row i is tokens[i].

        missing: what a token without a vector gets: "error" raises DataError with the first ten names, "mean" gives the mean of all
        vectors. Saved, it is the file that `init: {kind: word_vectors, path: ...}` reads.
        """
        if missing not in ("error", "mean"):
            raise UserError(f"missing is {missing!r}", remedy="say error or mean")
        lost = [token for token in tokens if token not in self.index]
        if lost and missing == "error":
            raise DataError(
                f"{len(lost)} of {len(tokens)} tokens have no vector: {', '.join(map(repr, lost[:10]))}",
                remedy="train the vectors on text cut by the same tokenizer, or say missing='mean'",
            )
        table = torch.cat([self.matrix, self.matrix.mean(0, keepdim=True)])
        return WordVectors(tokens, table[[self.index.get(token, len(self)) for token in tokens]])

    def _best(self, scores: Tensor, count: int) -> list[tuple[str, float]]:
        best = scores.topk(min(max(count, 0), len(self)))
        return [(self.words[i], value) for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def _options(method: str | Method, options: dict[str, Any]) -> Method:
    """The method's options, checked. Raises UserError."""
    if not isinstance(method, str):
        if options:
            raise UserError(f"{', '.join(options)} beside {method}", remedy="say them inside it")
        return method
    if method not in METHODS:
        raise UserError(f"no method {method!r} for word vectors", remedy=did_you_mean(method, METHODS))
    known = {field.name for field in fields(METHODS[method])}
    for name in options:
        if name not in known:
            raise UserError(f"{method} has no option {name!r}", remedy=did_you_mean(name, known))
    return METHODS[method](**options)
