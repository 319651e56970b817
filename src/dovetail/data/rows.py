"""Rows of training: documents packed end to end, one piece of a document a row, or whole pairs; and batches of them.

Labels stand beside the token that predicts them (labels[t] is tokens[t + 1]); -100 where the next token
belongs to another document, to a prompt, or is not there. Segments number the documents of a row, -1 for padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dovetail.data.labelled import LabelledRow
from dovetail.data.sampler import Sampler
from dovetail.data.source_rows import SourceRow, SourceRows
from dovetail.data.tokens import TokenSet

IGNORED = -100
_PADDING = (0, IGNORED, -1)  # of tokens, labels, segments


class Row(NamedTuple):
    """tokens (T,), labels (T,), segments (T,), int64."""

    tokens: np.ndarray
    labels: np.ndarray
    segments: np.ndarray


class RankedRow(NamedTuple):
    """A row whose labels stand where they are asked, and ranks (T,) int64: when each token comes in a factorisation."""

    tokens: np.ndarray
    labels: np.ndarray
    segments: np.ndarray
    ranks: np.ndarray


class Rows(Protocol):
    """Rows by number. Those that are random, and other in every epoch, have `drawn(index, epoch)` besides."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row | RankedRow | SourceRow | LabelledRow: ...

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
            *(_padded(x[: self.length], self.length, fill) for x, fill in zip((tokens, labels, segments), _PADDING))
        )


class DocumentRows:
    """A piece of at most `length` tokens of one document a row; ragged, padded on the right by the batch.

    Documents of one token or none have nothing to predict, and no row.
    """

    def __init__(self, tokens: TokenSet, length: int):
        self.set, self.length = tokens, length
        starts, stops = tokens.offsets[:-1], tokens.offsets[1:]
        pieces = -(-np.maximum(0, stops - starts - 1) // length)  # a piece's last label may lie one beyond
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


class PairRows:
    """Prompt-completion pairs, whole: as many in a row as `length` tokens hold (packed), or one (padded by the batch).

    Packed rows are padded to `length`, so that all have one shape; their pairs keep their order and do not see each
    other. Of a pair that is longer than a row the prompt is cut from the left; only of a completion that is longer by
    itself the end is cut, behind one token of the prompt. cut: how many pairs that befell. The last label of a full
    row may lie one beyond it.
    """

    def __init__(self, tokens: TokenSet, length: int, packed: bool = True):
        assert tokens.prompts is not None
        self.set, self.length, self.packed = tokens, length, packed
        starts, stops = np.asarray(tokens.offsets[:-1]), np.asarray(tokens.offsets[1:])
        self.completions = starts + tokens.prompts.astype(np.int64)  # where each begins
        over = stops - starts - (length + 1)
        room = np.maximum(self.completions - starts - 1, 0)  # a token that predicts the first label stays
        self.starts = starts + np.clip(over, 0, room)
        self.stops = np.minimum(self.starts + length + 1, stops)
        self.cut = int((over > 0).sum())
        self.sizes = np.minimum(self.stops - self.starts, length)
        self.first = self._rows() if packed else np.arange(len(starts) + 1)

    def _rows(self) -> np.ndarray:
        """The first pair of each row, and the number of pairs."""
        first, used = [0], 0
        for pair, size in enumerate(self.sizes.tolist()):
            if used + size > self.length:
                first.append(pair)
                used = 0
            used += size
        return np.asarray([*first, len(self.sizes)])

    def __len__(self) -> int:
        return len(self.first) - 1

    def longest(self) -> int:
        """Index of a row with the most tokens."""
        return int(np.argmax(np.add.reduceat(self.sizes, self.first[:-1])))

    def __getitem__(self, index: int) -> Row:
        pairs = range(self.first[index], self.first[index + 1])
        parts = [self._pair(pair, segment) for segment, pair in enumerate(pairs)]
        row = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
        return Row(*(_padded(x, self.length, fill) for x, fill in zip(row, _PADDING))) if self.packed else Row(*row)

    def _pair(self, pair: int, segment: int) -> Row:
        start, stop = self.starts[pair], self.stops[pair]
        stream = self.set.tokens[start:stop].astype(np.int64)
        row = _row(stream, np.full(len(stream), segment))
        row.labels[: max(0, self.completions[pair] - start - 1)] = IGNORED
        return Row(*(x[: self.length] for x in row))


def rows_of(tokens: TokenSet, length: int, pack: str, start: int | None = None) -> Rows:
    """The rows of a token set; pack: as in a recipe ("documents" or "none"). start: what an encoder-decoder begins
    with, which takes a pair a row. Raises DataError."""
    if start is not None:
        return SourceRows(tokens, length, start)
    if tokens.prompts is not None:
        return PairRows(tokens, length, packed=pack == "documents")
    return PackedRows(tokens, length) if pack == "documents" else DocumentRows(tokens, length)


class Batches:
    """Batches of `size` rows in the sampler's order: {"tokens", "labels"} (B,T), and "segments" where needed.

    Segments are left out when every row is one document without padding, so that the plain causal kernel runs.
    pin: page-locked memory, for copies that do not wait. length: as in `collate`.
    """

    def __init__(self, rows: Rows, sampler: Sampler, size: int, pin: bool = False, length: int | None = None):
        self.rows, self.sampler, self.size, self.pin, self.length = rows, sampler, size, pin, length

    def next(self) -> dict[str, Tensor]:
        drawn = getattr(self.rows, "drawn", lambda index, epoch: self.rows[index])
        return collate(
            [drawn(index, epoch) for index, epoch in self.sampler.draw(self.size)], self.pin, length=self.length
        )


def collate(
    given: Sequence[Row | RankedRow | SourceRow | LabelledRow], pin: bool = False, *, length: int | None = None
) -> dict[str, Tensor]:
    """Rows padded on the right to the longest; with "ranks" where they have some; those of an encoder-decoder with
    masks of both sides where they need them: {"tokens", "decoder_tokens", "labels", "attention_mask",
    "decoder_attention_mask"}; labelled ones, which are of one shape, as {"values" (B,...), "labels" (B)}. length: rows of one text are padded to it, for compiled code, which wants one shape.
    """
    rows: Sequence[Any] = given  # all of one sort
    if isinstance(rows[0], LabelledRow):
        labels = torch.tensor([row.label for row in rows])
        batch = {"values": torch.from_numpy(np.stack([row.values for row in rows])), "labels": labels}
    elif isinstance(rows[0], SourceRow):
        source, decoder, labels = (_stacked([row[i] for row in rows], p) for i, p in enumerate((0, 0, IGNORED)))
        batch = {"tokens": source, "decoder_tokens": decoder, "labels": labels}
        for name, lengths in (("tokens", [len(r[0]) for r in rows]), ("decoder_tokens", [len(r[1]) for r in rows])):
            real = torch.arange(batch[name].shape[1]) < torch.tensor(lengths)[:, None]
            if not real.all():
                batch["attention_mask" if name == "tokens" else "decoder_attention_mask"] = real
    else:
        tokens, labels, segments = (
            _stacked([row[i] for row in rows], padding, length or 0) for i, padding in enumerate(_PADDING)
        )
        batch = {"tokens": tokens, "labels": labels}
        if segments.any():
            batch["segments"] = segments
        ranks = [row.ranks for row in rows if isinstance(row, RankedRow)]
        if ranks:
            batch["ranks"] = _stacked(ranks, 0, length or 0)
    return {name: t.pin_memory() for name, t in batch.items()} if pin else batch


def real_tokens(batch: dict[str, Tensor]) -> int:
    """Tokens of a batch that are not padding, on both sides of an encoder-decoder; places of labelled rows."""
    if "values" in batch:
        return batch["values"][..., 0].numel()
    if "segments" in batch:
        return int((batch["segments"] >= 0).sum())
    sides = (("tokens", "attention_mask"), ("decoder_tokens", "decoder_attention_mask"))
    return sum(int(batch[m].sum()) if m in batch else batch[t].numel() for t, m in sides if t in batch)


def _stacked(rows: list[np.ndarray], fill: int, least: int = 0) -> Tensor:
    length = max(least, *(len(row) for row in rows))
    return torch.from_numpy(np.stack([_padded(row, length, fill) for row in rows]))


def _row(stream: np.ndarray, segments: np.ndarray) -> Row:
    """A row from a stretch of the stream: its labels are the tokens that follow in the same document."""
    labels = np.full(len(stream), IGNORED, np.int64)
    same = segments[1:] == segments[:-1]
    labels[:-1][same] = stream[1:][same]
    return Row(stream, labels, segments)


def _padded(x: np.ndarray, length: int, fill: int) -> np.ndarray:
    return x if len(x) == length else np.concatenate([x, np.full(length - len(x), fill, np.int64)])
