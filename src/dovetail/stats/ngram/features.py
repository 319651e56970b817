"""N-grams of characters, bytes or words as feature vectors of a text: counted by hashing or by a vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dovetail.errors import DataError, UserError
from dovetail.stats.ngram.vocabulary import Unit, check_unit

Ints = NDArray[np.int64]
Codes = NDArray[np.uint64]


@dataclass
class NGramFeatures:
    """How often each n-gram of `shortest` to `longest` tokens stands in a text, as a row of a sparse matrix.

    unit: characters, UTF-8 bytes, or words (split at white space). lower: case is dropped. columns: so many, chosen by
    a hash of the n-gram (Weinberger et al. 2009; a second bit of it is the sign, so that collisions cancel in the
    mean); None for a vocabulary, which `fit` learns: the n-grams that stand in at least `least` texts, in the order of
    their first. scale: counts as they are, 1 for what is there, or rows of Euclidean length 1 ("l2").
    The hash does not depend on the machine or the run. Raises UserError for options that contradict each other.
    """

    unit: Unit = "character"
    shortest: int = 1
    longest: int = 3
    columns: int | None = None
    least: int = 1
    lower: bool = False
    scale: Literal["count", "binary", "l2"] = "count"
    names: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        check_unit(self.unit)
        if not 1 <= self.shortest <= self.longest:
            raise UserError(
                f"n-grams of {self.shortest} to {self.longest} tokens", remedy="give 1 <= shortest <= longest"
            )
        if self.columns is not None and (self.columns < 1 or self.least != 1):
            raise UserError(
                f"columns={self.columns} with least={self.least}",
                remedy="hashing takes columns >= 1 and no threshold; a vocabulary takes least and columns=None",
            )
        if self.least < 1 or self.scale not in ("count", "binary", "l2"):
            raise UserError(f"least={self.least}, scale={self.scale!r}", remedy='least >= 1; "count", "binary" or "l2"')
        self._known: Codes = np.empty(0, np.uint64)  # hashes of the vocabulary, sorted
        self._column: Ints = np.empty(0, np.int64)
        self._words: dict[str, int] = {}

    @property
    def width(self) -> int:
        """Columns of the matrix. Raises UserError for a vocabulary before `fit`."""
        if self.columns is not None:
            return self.columns
        if not self.names:
            raise UserError("the vocabulary of these features is not known yet", remedy="call fit first")
        return len(self.names)

    def fit(self, texts: Sequence[str]) -> NGramFeatures:
        """Learns the vocabulary from texts; returns itself. Raises UserError with hashing, DataError where no n-gram is
        frequent enough."""
        if self.columns is not None:
            raise UserError("hashing has no vocabulary to fit", remedy="call transform alone, or give columns=None")
        first: dict[int, str] = {}
        seen: dict[int, int] = {}
        for text in texts:
            tokens = self._tokens(text)
            codes, starts, lengths = self._grams(tokens)
            codes, at = np.unique(codes, return_index=True)
            at = np.sort(at) if len(at) else at
            for code, start, length in zip(*(x[at].tolist() for x in (self._grams(tokens)[0], starts, lengths))):
                seen[code] = seen.get(code, 0) + 1
                if code not in first:
                    first[code] = self._name(tokens, start, length)
        kept = [code for code, times in seen.items() if times >= self.least]
        if not kept:
            raise DataError(f"no n-gram stands in {self.least} texts", remedy="lower least, or give more texts")
        self.names = [first[code] for code in kept]
        known = np.array(kept, np.uint64)
        self._column = np.argsort(known)
        self._known = known[self._column]
        return self

    def transform(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts -> sparse CSR matrix (texts, width), float32; n-grams outside the vocabulary are left out."""
        width = self.width
        rows, columns, values = [], [], []
        for row, text in enumerate(texts):
            codes = self._grams(self._tokens(text))[0]
            found, signs = self._place(codes)
            at, inverse = np.unique(found, return_inverse=True)
            sums = np.bincount(inverse, weights=signs, minlength=len(at))
            if self.scale == "binary":
                sums = np.sign(sums)
            if self.scale == "l2":
                sums = sums / (np.linalg.norm(sums) or 1.0)
            rows.append(np.full(len(at), row))
            columns.append(at)
            values.append(sums)
        at = np.stack([np.concatenate([*rows, []]), np.concatenate([*columns, []])]).astype(np.int64)
        data = torch.from_numpy(np.concatenate([*values, []])).float()
        return torch.sparse_coo_tensor(
            torch.from_numpy(at), data, (len(texts), width), is_coalesced=True
        ).to_sparse_csr()

    def _place(self, codes: Codes) -> tuple[Ints, NDArray[np.float64]]:
        """(columns, signs) of the n-grams that have one."""
        if self.columns is not None:
            sign = np.where(codes >> np.uint64(63), -1.0, 1.0)
            return ((codes & np.uint64(2**62 - 1)) % np.uint64(self.columns)).astype(np.int64), sign
        at = np.minimum(np.searchsorted(self._known, codes), len(self._known) - 1)
        known = self._known[at] == codes
        return self._column[at[known]], np.ones(int(known.sum()))

    def _tokens(self, text: str) -> str | bytes | list[str]:
        text = text.lower() if self.lower else text
        return text.split() if self.unit == "word" else text.encode() if self.unit == "byte" else text

    def _codes(self, tokens: str | bytes | list[str]) -> Codes:
        """A number for each token: its byte, its code point, or 64 bits of the BLAKE2 of the word."""
        if isinstance(tokens, bytes):
            return np.frombuffer(tokens, np.uint8).astype(np.uint64)
        if isinstance(tokens, str):
            return np.frombuffer(tokens.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
        for word in tokens:
            if word not in self._words:
                self._words[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return np.fromiter(map(self._words.__getitem__, tokens), np.uint64, len(tokens))

    def _grams(self, tokens: str | bytes | list[str]) -> tuple[Codes, Ints, Ints]:
        """(64-bit hashes, where they begin, their lengths) of all n-grams, the shortest first."""
        codes = self._codes(tokens)
        hashes, starts, lengths = [], [], []
        rolled = np.zeros(len(codes), np.uint64)
        for n in range(1, self.longest + 1):
            if len(codes) < n:
                break
            rolled = _mixed(rolled[: len(codes) - n + 1] ^ _mixed(codes[n - 1 :] + np.uint64(n)))
            if n >= self.shortest:
                hashes.append(rolled)
                starts.append(np.arange(len(rolled)))
                lengths.append(np.full(len(rolled), n))
        none = np.empty(0, np.int64)
        return (
            np.concatenate([*hashes, none.astype(np.uint64)]),
            np.concatenate([*starts, none]),
            np.concatenate([*lengths, none]),
        )

    def _name(self, tokens: str | bytes | list[str], start: int, length: int) -> str:
        part = tokens[start : start + length]
        if isinstance(part, bytes):
            return "".join(f"<0x{b:02X}>" for b in part)
        return part if isinstance(part, str) else " ".join(part)


def _mixed(x: Codes) -> Codes:
    """A bijection of 64 bits in which every bit of x moves every bit (SplitMix64; Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
