"""Counting rows larger than memory: sorted runs on disk, merged block by block (Knuth, TAOCP 3, section 5.4).

A row is an n-gram of token ids, packed into `limbs`: one or several non-negative int64, compared from the first on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dovetail.errors import DataError, RunError

Ints = NDArray[np.int64]
_RANK = 26  # bits kept free in later limbs for the rank of what stands before them: 2**26 rows at a time at most
MOST_ROWS = 2 ** (_RANK - 1)  # of a block: a merge may hold half as many again


@dataclass(frozen=True)
class Packing:
    """How `order` ids of `bits` bits each go into limbs. words: ids in each limb, most significant first."""

    order: int
    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 63 - _RANK:
            raise DataError(f"ids of {self.bits} bits", remedy=f"give a vocabulary below 2**{63 - _RANK}")

    @property
    def words(self) -> tuple[int, ...]:
        first = min(self.order, 63 // self.bits)
        later, rest = (63 - _RANK) // self.bits, self.order - first
        return (first, *(min(later, rest - at) for at in range(0, rest, later)))

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits in each limb."""
        return tuple(count * self.bits for count in self.words)

    def pack(self, columns: Iterable[Ints]) -> Ints:
        """`order` columns of ids (M,) -> limbs (L, M)."""
        given = iter(columns)
        limbs = []
        for count in self.words:
            limb = next(given).astype(np.int64)
            for column in itertools.islice(given, count - 1):
                limb <<= self.bits
                limb |= column
            limbs.append(limb)
        return np.stack(limbs)

    def unpack(self, limbs: Ints) -> Ints:
        """Limbs (L, M) -> ids (order, M)."""
        mask = (1 << self.bits) - 1
        return np.stack(
            [
                (limb >> (self.bits * (count - 1 - at))) & mask
                for limb, count in zip(limbs, self.words, strict=True)
                for at in range(count)
            ]
        )


def collapse(limbs: Ints, widths: tuple[int, ...], values: Ints | None) -> tuple[Ints, Ints]:
    """Rows (L, M) in any order -> distinct rows in order (L, U), and the sums of their values (C, U).

    values: (C, M), or None for 1 a row. Two limbs become one sortable number by the rank of the first among its like,
    so that every sort is of plain int64.
    """
    if len(limbs) > 1 and limbs.shape[1] > 2**_RANK:
        raise RunError(f"{limbs.shape[1]} rows to sort at once", remedy="give less memory: counts go to disk sooner")
    key, tables, order = limbs[0], [], None
    for limb, width in zip(limbs[1:], widths[1:], strict=True):
        by = np.argsort(key)
        key = key[by]
        new = _changes(key)
        tables.append((key[new], width))
        order = by if order is None else order[by]
        key = ((np.cumsum(new) - 1) << width) | limb[order]
    if values is None:
        key = np.sort(key)
        starts = np.flatnonzero(_changes(key))
        sums = np.diff(starts, append=len(key))[None]
    else:
        by = np.argsort(key)
        key = key[by]
        starts = np.flatnonzero(_changes(key))
        sums = np.add.reduceat(values[:, by if order is None else order[by]], starts, axis=1)
    key, out = key[starts], []
    for table, width in reversed(tables):
        out.append(key & ((1 << width) - 1))
        key = table[key >> width]
    return np.stack([key, *reversed(out)]), sums


def _changes(key: Ints) -> NDArray[np.bool_]:
    new = np.ones(len(key), dtype=bool)
    np.not_equal(key[1:], key[:-1], out=new[1:])
    return new


class Rows:
    """Distinct sorted rows with their values, in memory or on disk, read front to back in blocks."""

    def __init__(self, limbs: int, values: int, size: int, held: Ints | None = None, files: tuple[Path, ...] = ()):
        self.limbs, self.values, self.size = limbs, values, size
        self._held, self._files = held, files

    @staticmethod
    def of(limbs: Ints, values: Ints) -> Rows:
        """In memory: limbs (L, M), values (C, M)."""
        return Rows(len(limbs), len(values), limbs.shape[1], held=np.concatenate([limbs, values]))

    @property
    def on_disk(self) -> bool:
        return self._held is None

    def read(self, start: int, stop: int) -> Ints:
        """Rows start..stop-1 as (L + C, stop - start). Raises RunError for a file cut short."""
        if self._held is not None:
            return self._held[:, start:stop]
        out = np.empty((len(self._files), stop - start), dtype=np.int64)
        for i, path in enumerate(self._files):
            part = np.fromfile(path, dtype=np.int64, count=stop - start, offset=8 * start)
            if len(part) < stop - start:
                raise RunError("a temporary file of counts is cut short", where=str(path), remedy="count again")
            out[i] = part
        return out

    def blocks(self, size: int) -> Iterator[tuple[Ints, Ints]]:
        """(limbs, values), `size` rows at a time."""
        for start in range(0, self.size, size):
            part = self.read(start, min(start + size, self.size))
            yield part[: self.limbs], part[self.limbs :]

    def load(self) -> tuple[Ints, Ints]:
        """(limbs (L, M), values (C, M)), all at once."""
        part = self.read(0, self.size)
        return part[: self.limbs], part[self.limbs :]

    def remove(self) -> None:
        """Deletes the files."""
        for path in self._files:
            path.unlink(missing_ok=True)


def count_rows(
    chunks: Iterable[tuple[Ints, Ints | None]], widths: tuple[int, ...], columns: int, rows: int, folder: Path
) -> Rows:
    """All rows of all chunks, each distinct one once, its values added up.

    chunks: (limbs (L, M), values (columns, M) or None for 1 a row) with M up to `rows`. rows: how many are held at a
    time. folder: where runs are kept once there is more than one. Raises RunError for a full disk.
    """
    first: Rows | None = None
    runs: list[Rows] = []
    try:
        for limbs, values in chunks:
            if limbs.shape[1] == 0:
                continue
            block = collapse(limbs, widths, values)
            if first is None and not runs:
                first = Rows.of(*block)
                continue
            if first is not None:
                runs.append(_written(iter([first.load()]), first.limbs, columns, folder))
                first = None
            runs.append(_written(iter([block]), len(widths), columns, folder))
        if first is not None:
            return first
        if not runs:
            return Rows.of(np.empty((len(widths), 0), np.int64), np.empty((columns, 0), np.int64))
        merged = _written(_merged(runs, widths, rows), len(widths), columns, folder)
    except OSError as error:
        raise RunError(
            f"counts cannot be written: {error.strerror or error}", where=str(folder), remedy="give a folder with room"
        ) from None
    for run in runs:
        run.remove()
    return merged


def _written(blocks: Iterator[tuple[Ints, Ints]], limbs: int, columns: int, folder: Path) -> Rows:
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    while (folder / f"{number}.0").exists():
        number += 1
    paths = tuple(folder / f"{number}.{i}" for i in range(limbs + columns))
    files = [path.open("wb") for path in paths]
    size = 0
    try:
        for left, right in blocks:
            size += left.shape[1]
            for file, column in zip(files, itertools.chain(left, right), strict=True):
                file.write(np.ascontiguousarray(column).data)
    finally:
        for file in files:
            file.close()
    return Rows(limbs, columns, size, files=paths)


def _merged(runs: list[Rows], widths: tuple[int, ...], rows: int) -> Iterator[tuple[Ints, Ints]]:
    """One sorted sequence from several. Rows below the least last first limb of all heads are complete in every head.

    Memory grows beyond `rows` only where one first limb has more continuations than that.
    """
    size = max(1024, rows // len(runs))
    heads = [run.read(0, min(size, run.size)) for run in runs]
    at = [head.shape[1] for head in heads]

    def more(i: int) -> None:
        stop = min(at[i] + size, runs[i].size)
        heads[i] = np.concatenate([heads[i], runs[i].read(at[i], stop)], axis=1)
        at[i] = stop

    limbs = len(widths)
    while True:
        unfinished = [i for i, run in enumerate(runs) if at[i] < run.size]
        bound = min((int(heads[i][0, -1]) for i in unfinished), default=None)
        cuts = [head.shape[1] if bound is None else int(np.searchsorted(head[0], bound)) for head in heads]
        if sum(cuts):
            taken = np.concatenate([head[:, :cut] for head, cut in zip(heads, cuts)], axis=1)
            heads = [head[:, cut:].copy() for head, cut in zip(heads, cuts)]
            yield collapse(taken[:limbs], widths, taken[limbs:])
        if bound is None:
            return
        for i in unfinished:
            if heads[i].shape[1] < size // 2 or int(heads[i][0, -1]) == bound:
                more(i)
