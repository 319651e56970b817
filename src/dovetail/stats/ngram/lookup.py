"""The ids of a text's words, all at once: a trie that takes eight bytes a step, each found by its exact key."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dovetail.stats.ngram.trie import Index, Ints

_BLANKS = [character.encode() for character in map(chr, range(128, 2**16)) if character.isspace()]  # of 2 or 3 bytes
_TWO, _THREE = (np.array([int.from_bytes(b) for b in _BLANKS if len(b) == n]) for n in (2, 3))
_IS_WORD = np.ones(256, dtype=bool)
_IS_WORD[[9, 10, 11, 12, 13, 28, 29, 30, 31, 32]] = False  # where str.split cuts
_FIRST = np.array([(1 << 8 * n) - 1 for n in range(9)], dtype=np.uint64)  # masks of the first n bytes


class Words:
    """The words of a text and which of them are known. names: the vocabulary, in the order of its ids; unknown: an id."""

    def __init__(self, names: Sequence[str], unknown: int):
        known = [(name, i) for i, name in enumerate(names) if name and "\0" not in name and name.split() == [name]]
        data, starts, lengths = _words("\n".join(name for name, _ in known))
        ids, nodes = np.array([i for _, i in known], dtype=np.int64), np.zeros(len(known), dtype=np.int64)
        self.unknown = unknown
        self._steps: list[
            tuple[Index, int, Index, Ints]
        ] = []  # of the pieces, how many, of (node, piece), ids of nodes
        while len(starts):
            piece = _pieces(data, starts, lengths)
            pieces, number = np.unique(piece, return_inverse=True)
            keys, nodes = np.unique(nodes * len(pieces) + number, return_inverse=True)
            end = np.full(len(keys), unknown, dtype=np.int64)
            end[nodes[lengths <= 8]] = ids[lengths <= 8]
            self._steps.append((Index(pieces), len(pieces), Index(keys), end))
            longer = lengths > 8
            starts, lengths = starts[longer] + 8, lengths[longer] - 8
            nodes, ids = nodes[longer], ids[longer]

    def of(self, text: str) -> tuple[Ints, Ints] | None:
        """(ids of the text's words (T,), where those of each line that is not blank begin (lines,)): `str.split`'s words.

        None for a text with zero bytes, or with blanks that are not ASCII.
        """
        if "\0" in text:
            return None
        data, starts, lengths = _words(text)
        if _cut_elsewhere(np.frombuffer(data, np.uint8)):
            return None
        ends = np.searchsorted(starts, np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")))
        begins = np.unique(np.append(0, ends))
        out, nodes, at = np.empty(0, dtype=np.int64), None, None
        for pieces, count, keys, end in self._steps:
            found = pieces.find(_pieces(data, starts, lengths))
            if nodes is not None:
                found = keys.find(np.where(found >= 0, nodes * count + found, -1))
            known, last = found >= 0, lengths <= 8
            ids = np.where(known & last, end.take(found, mode="wrap"), self.unknown)
            if at is None:
                out = ids
            else:
                out[at] = ids
            on = np.flatnonzero(known & ~last)
            at, nodes = on if at is None else at.take(on), found.take(on)
            starts, lengths = starts.take(on) + 8, lengths.take(on) - 8
        return out, begins[begins < len(out)]


def _cut_elsewhere(data: NDArray[np.uint8]) -> bool:
    """Whether there is a blank that is not ASCII in UTF-8 bytes with two ASCII bytes behind them."""
    wide = np.flatnonzero(data >= 0xC2)  # where a character of two bytes or more begins
    first, second, third = (data.take(wide + i).astype(np.int64) for i in range(3))
    two = (first << 8) + second
    return bool(np.isin(two, _TWO).any() or np.isin((two << 8) + third, _THREE).any())


def _words(text: str) -> tuple[bytes, Ints, Ints]:
    """UTF-8 bytes with blanks behind them, where words begin (T,), and how many bytes they have (T,)."""
    data = text.encode("utf-8", "surrogatepass") + b" " * 9
    inside = _IS_WORD.take(np.frombuffer(data, np.uint8))
    turns = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, ends = (np.append(0, turns[1::2]), turns[::2]) if inside[0] else (turns[::2], turns[1::2])
    return data, starts, ends - starts


def _pieces(data: bytes, starts: Ints, lengths: Ints) -> Ints:
    """The next eight bytes of each word (T,) as one number, zeros behind its end."""
    eight = np.ndarray((len(data) - 8,), "<u8", data, strides=(1,))
    return (eight[starts] & _FIRST.take(lengths, mode="clip")).view(np.int64)
