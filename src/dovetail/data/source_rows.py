"""Rows for encoder-decoders: the prompt of a pair is what the encoder reads, its completion what the decoder writes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dovetail.data.tokens import TokenSet
from dovetail.errors import DataError


class SourceRow(NamedTuple):
    """source (S,), decoder (T,) and labels (T,), int64: labels[t] is what the decoder says after decoder[: t + 1]."""

    source: np.ndarray
    decoder: np.ndarray
    labels: np.ndarray


class SourceRows:
    """Prompt-completion pairs, one a row: decoder = [start, completion less its last], labels = completion.

    length: most tokens on either side. What is longer loses its end, of a prompt as of a completion; cut: how many
    pairs that befell. Raises DataError for a corpus of plain documents.
    """

    def __init__(self, tokens: TokenSet, length: int, start: int):
        if tokens.prompts is None:
            raise DataError(
                "an encoder-decoder is trained on pairs, and this corpus has none",
                where="data.train",
                remedy="give a corpus of pairs: {kind: pairs, path: FILE.jsonl}",
            )
        self.set, self.length, self.start = tokens, length, start
        self.begins, self.ends = np.asarray(tokens.offsets[:-1]), np.asarray(tokens.offsets[1:])
        self.completions = self.begins + tokens.prompts.astype(np.int64)
        sizes = np.maximum(self.completions - self.begins, self.ends - self.completions)
        self.cut = int((sizes > length).sum())
        self.sizes = np.minimum(sizes, length)

    def __len__(self) -> int:
        return len(self.begins)

    def longest(self) -> int:
        """Index of a row with the longest side."""
        return int(np.argmax(self.sizes))

    def __getitem__(self, index: int) -> SourceRow:
        begin, at, end = self.begins[index], self.completions[index], self.ends[index]
        source = self.set.tokens[begin : min(at, begin + self.length)].astype(np.int64)
        labels = self.set.tokens[at : min(end, at + self.length)].astype(np.int64)
        return SourceRow(source, np.concatenate([[self.start], labels[:-1]]).astype(np.int64), labels)
