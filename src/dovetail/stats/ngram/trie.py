"""N-grams of all orders as tables of whole numbers: a row is found from the row of its prefix and its last id.

The row of an n-gram has the key (row of its first n - 1 ids in the table before) * vocabulary + last id. Keys are exact,
8 bytes an n-gram whatever its order, and sorted; the continuations of a context lie side by side. Many are looked up
at once, in a hash table with linear probing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dovetail.errors import DataError

Ints = NDArray[np.int64]
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: multiplicative hashing (Knuth, TAOCP 3, section 6.4)


class Index:
    """Where each of some distinct keys stands. keys: (M,) int64, not negative."""

    def __init__(self, keys: Ints):
        bits = max(4, int(4 * len(keys)).bit_length())  # at most a quarter of the slots is taken: few collisions
        self._shift = np.uint64(64 - bits)
        self._mask = (1 << bits) - 1
        self._keys = keys if len(keys) else np.array([-1])
        self._rows = np.full(1 << bits, -1, dtype=np.int32 if len(keys) < 2**31 else np.int64)
        rows = np.arange(len(keys), dtype=self._rows.dtype)
        slots = self._slots(keys)
        while len(rows):
            free = self._rows[slots] < 0
            self._rows[slots[free]] = rows[free]  # of several that want a slot, one stays
            lost = self._rows[slots] != rows
            rows, slots = rows[lost], (slots[lost] + 1) & self._mask

    def find(self, keys: Ints) -> Ints:
        """The place of each key (M,), -1 where it is not among them or negative."""
        slots = self._slots(keys)
        rows = self._rows.take(slots)
        hit = self._keys.take(rows, mode="wrap") == keys  # an empty slot's row, -1, reads a key that is not there
        found = np.where(hit, rows, -1).astype(np.int64)
        left = np.flatnonzero((rows >= 0) & ~hit)
        slots, wanted = slots.take(left), keys.take(left)
        while len(left):
            slots = (slots + 1) & self._mask
            rows = self._rows.take(slots)
            hit = self._keys.take(rows, mode="wrap") == wanted
            found[left[hit]] = rows[hit]
            on = np.flatnonzero((rows >= 0) & ~hit)
            left, slots, wanted = left.take(on), slots.take(on), wanted.take(on)
        return found

    def _slots(self, keys: Ints) -> Ints:
        return ((keys.view(np.uint64) * _MIX) >> self._shift).view(np.int64)


class Trie:
    """keys[n - 2]: of the n-grams, n >= 2, sorted. Unigrams need none: there is a row for every id of the vocabulary."""

    def __init__(self, vocab: int):
        self.vocab = vocab
        self.keys: list[Ints] = []
        self._indexes: list[Index] = []

    @property
    def order(self) -> int:
        return len(self.keys) + 1

    def size(self, n: int) -> int:
        """Rows of order n."""
        return self.vocab if n == 1 else len(self.keys[n - 2])

    def add(self, keys: Ints) -> None:
        """Puts the sorted keys of the next order on top. Raises DataError for an n-gram that stands twice."""
        if len(keys) and bool((keys[1:] == keys[:-1]).any()):
            raise DataError(f"a {self.order + 1}-gram stands twice")
        self.keys.append(keys)
        self._indexes.append(Index(keys))

    def find(self, n: int, parents: Ints, ids: Ints) -> Ints:
        """Rows of the n-grams whose prefixes have the rows `parents` (M,) (-1: none); -1 where there is none."""
        return self._indexes[n - 2].find(np.where(parents >= 0, parents * self.vocab + ids, -1))

    def locate(self, columns: Ints) -> Ints:
        """Rows (M,) of the n-grams with ids (n, M); -1 where there is none."""
        rows = columns[0]
        for n, ids in enumerate(columns[1:], 2):
            rows = self.find(n, rows, ids)
        return rows

    def ends(self, ids: Ints, first: NDArray[np.bool_]) -> Iterator[tuple[Ints, Ints, Ints, Ints]]:
        """For n = 2, 3, ...: which n-grams end where in a stream of ids (T,). first: (T,) where a row begins.

        Yields (places (P,) whose n - 1 ids before are a known n-1-gram, its row (P,), which of them (Q,) of 0..P-1 end a
        known n-gram, its row (Q,)).
        """
        at = np.flatnonzero(~first)
        before = ids.take(at - 1)
        for n in range(2, self.order + 1):
            rows = self._indexes[n - 2].find(before * self.vocab + ids.take(at))
            hit = np.flatnonzero(rows >= 0)
            rows = rows.take(hit)
            yield at, before, hit, rows
            at = at.take(hit) + 1  # a longer n-gram ends at t only where one ends at t - 1
            inside = np.flatnonzero(~first.take(at, mode="clip") & (at < len(ids)))
            at, before = at.take(inside), rows.take(inside)

    def children(self, n: int, row: int) -> slice:
        """The rows of order n + 1 that continue a row of order n."""
        if n >= self.order:
            return slice(0, 0)
        bounds = np.array([row * self.vocab, (row + 1) * self.vocab])
        return slice(*np.searchsorted(self.keys[n - 1], bounds).tolist())

    def columns(self, n: int) -> Ints:
        """Ids (n, M) of all n-grams, in the order of their rows."""
        rows, out = np.arange(self.size(n)), []
        for m in range(n, 1, -1):
            key = self.keys[m - 2][rows]
            out.append(key % self.vocab)
            rows = key // self.vocab
        return np.stack([rows, *reversed(out)])

    def parents(self, n: int) -> Ints:
        """For each n-gram, n >= 2, the row of its first n - 1 ids."""
        return self.keys[n - 2] // self.vocab

    def suffixes(self, n: int) -> Ints:
        """For each n-gram, n >= 2, the row of its last n - 1 ids; -1 where that is none."""
        return self.locate(self.columns(n)[1:])


def of_columns(vocab: int, orders: Sequence[Ints]) -> Trie:
    """The trie of n-grams with ids (n, M), n = 2, 3, ..., in lexicographic order.

    Raises DataError for an n-gram without its prefix.
    """
    trie = Trie(vocab)
    for n, columns in enumerate(orders, 2):
        parents = trie.locate(columns[:-1])
        if len(parents) and int(parents.min()) < 0:
            raise DataError(f"a {n}-gram stands without its first {n - 1} words")
        trie.add(parents * vocab + columns[-1])
    return trie
