"""Numbers that depend on (what they are for, seed, split, index) alone: not on the order of access, workers or platform.

numpy promises the stream of a bit generator but not that of `Generator`'s methods (NEP 19), so that only raw bits are
taken from it, and they become numbers by integer arithmetic here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

T = TypeVar("T")
_WORD = (1 << 64) - 1


def mix(word: int) -> int:
    """One word of 64 bits scattered over all words of 64 bits, one to one (SplitMix64: Steele, Lea, Flood 2014)."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def key(*words: int | str) -> int:
    """One word of 64 bits for a few words, of which texts are read as their UTF-8 bytes."""
    found = 0
    for word in words:
        data = int.from_bytes(word.encode() + b"\x01", "little") if isinstance(word, str) else word & _WORD
        while True:  # 64 bits at a time
            found = mix(found ^ (data & _WORD))
            data >>= 64
            if not data:
                break
    return found


class Draws:
    """The stream of draws of `words` (Philox: Salmon et al. 2011)."""

    def __init__(self, *words: int | str):
        first = key(*words)
        self._bits = np.random.Philox(key=np.array([first, mix(first)], np.uint64))

    def below(self, limit: int) -> int:
        """0 .. limit - 1."""
        return (int(self._bits.random_raw()) >> 32) * limit >> 32

    def between(self, low: int, high: int) -> int:
        """low .. high, both included."""
        return low + self.below(high - low + 1)

    def many(self, limits: ArrayLike) -> np.ndarray:
        """One number below each limit (positive, below 2^31): int64 of their shape."""
        most = np.asarray(limits, np.uint64)
        raw = np.asarray(self._bits.random_raw(most.size), np.uint64).reshape(most.shape) >> np.uint64(32)
        return (raw * most >> np.uint64(32)).astype(np.int64)

    def order(self, count: int) -> np.ndarray:
        """A permutation of 0 .. count - 1."""
        return np.argsort(self._bits.random_raw(count), kind="stable")

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    def sample(self, choices: Sequence[T], count: int) -> list[T]:
        """`count` different ones, or all if there are fewer, in a drawn order."""
        return [choices[i] for i in self.order(len(choices))[:count].tolist()]
