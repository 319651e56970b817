"""How often each n-gram stands in a text of any size, for all orders up to the highest: on disk where memory ends.

The highest order is counted from the text. Each lower order comes from the next higher one by dropping the first word
(Heafield et al. 2013, Scalable Modified Kneser-Ney Language Model Estimation): raw counts add up, and the number of
distinct words before an n-gram is the number of rows that fall together.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dovetail.errors import DataError
from dovetail.stats.ngram.sorting import MOST_ROWS, Ints, Packing, Rows, count_rows
from dovetail.stats.ngram.vocabulary import BOS, EOS, Unit, Vocabulary, encode_file

_ROW, _ID = 96, 16  # bytes of a row while a block is sorted (limbs, values, an order, copies), and of each of its ids
MOST_ORDER = 12


@dataclass
class Counts:
    """Counts of all orders of a text of `vocab` ids. A context manager: leaving it deletes what lies on disk.

    Every n-gram has two values: how often it stands in the text, and its adjusted count (Kneser and Ney 1995): after
    how many different words; the count itself for the highest order and for what begins a sentence. None predicts <s>.
    rows[n - 1]: as they were counted, where several <s> before the first word of a sentence fill the rows.
    tokens: predicted tokens, </s> among them.
    """

    order: int
    vocab: int
    packing: tuple[Packing, ...]
    rows: tuple[Rows, ...]
    tokens: int
    folder: Path

    def blocks(self, n: int, size: int = 2**20) -> Iterator[tuple[Ints, Ints, Ints]]:
        """Order n in lexicographic order of ids, about `size` rows at a time: ids (n, M), counts (M,), adjusted (M,)."""
        packing = self.packing[n - 1]
        for limbs, values in self.rows[n - 1].blocks(size):
            ids = packing.unpack(limbs)
            keep = ids[min(1, n - 1)] != BOS  # the rows that padding filled have a shorter one that says the same
            yield ids[:, keep], values[0, keep], values[-1, keep]

    def columns(self, n: int) -> tuple[Ints, Ints, Ints]:
        """`blocks` at once, in memory."""
        parts = list(self.blocks(n))
        return tuple(np.concatenate(column, axis=-1) for column in zip(*parts, strict=True))  # type: ignore[return-value]

    def __enter__(self) -> Counts:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def count(
    chunks: Iterable[Ints], order: int, vocab: int, *, memory: int = 2**30, folder: str | Path | None = None
) -> Counts:
    """Counts of every n-gram up to `order` in a stream of ids, in which id 2 (</s>) ends a sentence.

    chunks: pieces (T,) of the stream, each up to any size. vocab: ids are below it. memory: bytes that sorting may
    use, about; what goes beyond lies in a temporary folder inside `folder` (the system's unless given) until the
    result is left. Raises DataError for ids outside the vocabulary or a stream with nothing in it, RunError for a full
    disk.
    """
    if not 1 <= order <= MOST_ORDER:
        raise DataError(f"n-grams of order {order}", remedy=f"give 1 to {MOST_ORDER}")
    size = max(4096, min(MOST_ROWS, memory // (_ROW + _ID * order)))
    packing = tuple(Packing(n, max(1, int(vocab - 1).bit_length())) for n in range(1, order + 1))
    scratch = Path(tempfile.mkdtemp(prefix="ngram-", dir=folder))
    seen = _Seen()
    try:
        top = packing[-1]
        windows = ((top.pack(w), None) for w in _windows(_resized(chunks, size, vocab, seen), order))
        raw = count_rows(windows, top.widths, 1, size, scratch / f"order{order}")
        if seen.tokens == 0:
            raise DataError("there are no tokens to count")
        found = [raw]
        for n in range(order - 1, 0, -1):
            shorter = _shortened(found[0], packing[n], packing[n - 1], size)
            found.insert(0, count_rows(shorter, packing[n - 1].widths, 2, size, scratch / f"order{n}"))
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return Counts(order, vocab, packing, tuple(found), seen.tokens, scratch)


def count_file(
    path: str | Path, order: int, unit: Unit = "word", *, memory: int = 2**30, folder: str | Path | None = None
) -> tuple[Vocabulary, Counts]:
    """`count` of a UTF-8 text file of any size. unit: what a token is, see `tokenise`.

    Beside `memory` the vocabulary is held. The ids lie in a temporary file, 4 bytes each, while they are counted.
    """
    with tempfile.TemporaryDirectory(prefix="ngram-ids-", dir=folder) as scratch:
        ids = Path(scratch) / "ids"
        vocabulary = encode_file(Path(path), unit, ids)
        return vocabulary, count(_from_file(ids), order, len(vocabulary), memory=memory, folder=folder)


def _from_file(path: Path) -> Iterator[Ints]:
    with path.open("rb") as file:
        while len(part := np.fromfile(file, dtype=np.int32, count=2**20)):
            yield part.astype(np.int64)


@dataclass
class _Seen:
    tokens: int = 0


def _resized(chunks: Iterable[Ints], size: int, vocab: int, seen: _Seen) -> Iterator[Ints]:
    """The same stream in pieces of `size` ids at most, small ones joined; counted and checked."""
    held: list[Ints] = []
    room = size
    for chunk in chunks:
        ids = np.asarray(chunk)
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < vocab):
            raise DataError(f"ids from {int(ids.min())} to {int(ids.max())}", remedy=f"give 0 to {vocab - 1}")
        if len(ids) and bool((ids == BOS).any()):
            raise DataError("<s> inside the text", remedy="leave it out: it is put before every sentence")
        seen.tokens += len(ids)
        while len(ids):
            held.append(ids[:room])
            room -= len(held[-1])
            ids = ids[len(held[-1]) :]
            if room == 0:
                yield np.concatenate(held)
                held, room = [], size
    if held:
        yield np.concatenate(held)


def _windows(chunks: Iterable[Ints], order: int) -> Iterator[Ints]:
    """Columns (order, T) of ids: every token with what stands before it in its sentence, <s> where nothing does."""
    before = np.full(order, EOS, dtype=np.int64)
    for chunk in chunks:
        ids = np.concatenate([before, chunk.astype(np.int64)])
        at = np.arange(len(ids))
        begin = np.maximum.accumulate(np.where(ids == EOS, at + 1, 0))  # where the sentence after each place begins
        begin = np.concatenate([begin[:1], begin[:-1]])[order:]
        columns = np.empty((order, len(chunk)), dtype=np.int64)
        for back in range(order):
            inside = at[order:] - back >= begin
            columns[order - 1 - back] = np.where(inside, ids[order - back : len(ids) - back], BOS)
        before = ids[-order:]
        yield columns


def _shortened(rows: Rows, packing: Packing, shorter: Packing, size: int) -> Iterator[tuple[Ints, Ints]]:
    """Rows without their first word; of the two values the second is 1, or the count where <s> pads."""
    for limbs, values in rows.blocks(size):
        ids = packing.unpack(limbs)
        padded = ids[1] == BOS
        yield shorter.pack(ids[1:]), np.stack([values[0], np.where(padded, values[0], 1)])
