"""Word vectors: predicted (skip-gram, CBOW), counted (PMI with SVD) or fitted to counts (GloVe)."""

from __future__ import annotations

from dovetail.stats.words.counts import Pmi, cooccurrences, ppmi
from dovetail.stats.words.glove import Glove
from dovetail.stats.words.queries import AnalogyScore, spearman
from dovetail.stats.words.training import Cbow, SkipGram
from dovetail.stats.words.vectors import WordVectors
from dovetail.stats.words.vocabulary import Corpus, Vocabulary, one_hot, sentences_of

__all__ = [
    "AnalogyScore", "Cbow", "Corpus", "Glove", "Pmi", "SkipGram", "Vocabulary", "WordVectors",
    "cooccurrences", "one_hot", "ppmi", "sentences_of", "spearman",
]  # fmt: skip
