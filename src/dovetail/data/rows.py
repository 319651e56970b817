"""Rows of training: documents packed end to end, or one piece of a document a row; and batches of them.

Labels stand beside the token that predicts them (labels[t] is tokens[t + 1]); -100 where the next token
belongs to another document, or is not there. Segments number the documents of a row, -1 for padding.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dovetail.data.sampler import Sampler
from dovetail.data.tokens import TokenSet

IGNORED = -100


class Row(NamedTuple):
    """tokens (T,), labels (T,), segments (T,), int64."""

    tokens: np.ndarray
    labels: np.ndarray
    segments: np.ndarray


class Rows(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def longest(self) -> int: ...


class PackedRows:
    """The corpus as one stream cut every `length` tokens: no padding but in the last row, and nothing left out.

    Documents do not see each other (segments), and no label crosses a seam. A label that lies beyond the row's
    end is kept: rows overlap by one token.
    """

    def __init__(self, tokens: TokenSet, length: int):
        self.set, self.length = tokens, length

    def __len__(self) -> int:
        return -(-(len(self.set) - 1) // self.length)

    def longest(self) -> int:
        """Index of a row that costs the most."""
        return 0

    def __getitem__(self, index: int) -> Row:
        start = index * self.length
        stream = self.set.tokens[start : start + self.length + 1].astype(np.int64)
        at = np.arange(start, start + len(stream))
        document = np.searchsorted(self.set.offsets, at, side="right") - 1
        tokens, labels, segments = _row(stream, document - document[0])
        return Row(
            *(
                _padded(x[: self.length], self.length, fill)
                for x, fill in ((tokens, 0), (labels, IGNORED), (segments, -1))
            )
        )


class DocumentRows:
    """A piece of at most `length` tokens of one document a row; ragged, padded on the right by the batch."""

    def __init__(self, tokens: TokenSet, length: int):
        self.set, self.length = tokens, length
        starts, stops = tokens.offsets[:-1], tokens.offsets[1:]
        pieces = np.maximum(1, -(-(stops - starts - 1) // length))  # a piece's last label may lie one beyond
        first = np.cumsum(pieces) - pieces
        number = np.arange(pieces.sum()) - np.repeat(first, pieces)
        self.starts = np.repeat(starts, pieces) + number * length
        self.stops = np.minimum(self.starts + length + 1, np.repeat(stops, pieces))

    def __len__(self) -> int:
        return len(self.starts)

    def longest(self) -> int:
        return int(np.argmax(self.stops - self.starts))

    def __getitem__(self, index: int) -> Row:
        stream = self.set.tokens[self.starts[index] : self.stops[index]].astype(np.int64)
        return Row(*(x[: self.length] for x in _row(stream, np.zeros(len(stream), np.int64))))


class Batches:
    """Batches of `size` rows in the sampler's order: {"tokens", "labels"} (B,T), and "segments" where needed.

    Segments are left out when every row is one document without padding, so that the plain causal kernel runs.
    pin: page-locked memory, for copies that do not wait.
    """

    def __init__(self, rows: Rows, sampler: Sampler, size: int, pin: bool = False):
        self.rows, self.sampler, self.size, self.pin = rows, sampler, size, pin

    def next(self) -> dict[str, Tensor]:
        return collate([self.rows[i] for i in self.sampler.take(self.size)], self.pin)


def collate(rows: list[Row], pin: bool = False) -> dict[str, Tensor]:
    """Rows padded on the right to the longest."""
    length = max(len(row.tokens) for row in rows)
    tokens, labels, segments = (
        np.stack([_padded(row[i], length, fill) for row in rows]) for i, fill in enumerate((0, IGNORED, -1))
    )
    batch = {"tokens": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}
    if segments.any():
        batch["segments"] = torch.from_numpy(segments)
    return {name: t.pin_memory() for name, t in batch.items()} if pin else batch


def _row(stream: np.ndarray, segments: np.ndarray) -> Row:
    """A row from a stretch of the stream: its labels are the tokens that follow in the same document."""
    labels = np.full(len(stream), IGNORED, np.int64)
    same = segments[1:] == segments[:-1]
    labels[:-1][same] = stream[1:][same]
    return Row(stream, labels, segments)


def _padded(x: np.ndarray, length: int, fill: int) -> np.ndarray:
    return x if len(x) == length else np.concatenate([x, np.full(length - len(x), fill, np.int64)])
