"""N-gram models: counting, smoothing, ARPA files, queries; and n-grams as features of a text."""

from __future__ import annotations

from dovetail.stats.ngram.counts import Counts, count, count_file
from dovetail.stats.ngram.model import NGram, SentenceScore
from dovetail.stats.ngram.smoothing import (
    NAMES,
    AddK,
    GoodTuring,
    KneserNey,
    MaximumLikelihood,
    Smoothing,
    StupidBackoff,
    WittenBell,
)
from dovetail.stats.ngram.vocabulary import UNITS, Unit, Vocabulary, tokenise

__all__ = [
    "NAMES", "UNITS", "AddK", "Counts", "GoodTuring", "KneserNey", "MaximumLikelihood", "NGram", "SentenceScore",
    "Smoothing", "StupidBackoff", "Unit", "Vocabulary", "WittenBell", "count", "count_file", "tokenise",
]  # fmt: skip
