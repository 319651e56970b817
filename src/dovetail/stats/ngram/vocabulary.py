"""Tokens and their ids: words, characters, bytes, or the integers of a tokenizer; text files to ids, in blocks."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dovetail.errors import DataError, UserError, did_you_mean
from dovetail.stats.ngram.lookup import Words

Ints = NDArray[np.int64]
Unit = Literal["word", "character", "byte"]
UNITS: tuple[Unit, ...] = ("word", "character", "byte")
UNK, BOS, EOS = 0, 1, 2  # ids of "<unk>", "<s>", "</s>" in every vocabulary
SPECIAL = ("<unk>", "<s>", "</s>")
_BLOCK = 1 << 22  # bytes of text read at a time
_BLANK = re.compile(r"[\x00-\x20\x7f]|\s")  # what would end a word of an ARPA file
_ESCAPE = re.compile(r"<U\+([0-9A-F]{4})>")


class _Growing(dict[Any, int]):
    """Token -> id, and the next free id for what is new."""

    def __missing__(self, token: Any) -> int:
        self[token] = made = len(self)
        return made


class Vocabulary:
    """Which token has which id. Strings are listed; of integers (a tokenizer's ids) there are `size`: i has id i + 3.

    Ids 0, 1, 2 are <unk>, <s> and </s>. `len` counts them.
    """

    def __init__(self, tokens: Iterable[str] | int):
        self.integers = isinstance(tokens, int)
        self._words: Words | None = None
        if isinstance(tokens, int):
            if tokens < 1:
                raise DataError(f"a vocabulary of {tokens} integers", remedy="give at least 1")
            self.size, self.names, self._ids = tokens, list(SPECIAL), {}
            return
        self.names = [*SPECIAL, *tokens]
        self.size = len(self.names) - 3
        self._ids = {name: i for i, name in enumerate(self.names)}
        if len(self._ids) < len(self.names):
            twice = next(name for i, name in enumerate(self.names) if self._ids[name] != i)
            raise DataError(f"the token {twice!r} stands twice in a vocabulary", remedy="give each token once")

    def __len__(self) -> int:
        return self.size + 3

    def __contains__(self, token: Any) -> bool:
        return int(self.encode([token])[0]) != UNK or token == SPECIAL[UNK]

    def encode(self, tokens: Any) -> Ints:
        """Ids (..., T) of a sequence of tokens, or of an array or tensor of integers of any shape. Unknown ones: 0.

        Raises UserError for strings where the tokens are integers and the other way round.
        """
        if isinstance(tokens, torch.Tensor):
            tokens = tokens.detach().cpu().numpy()
        if isinstance(tokens, np.ndarray) and tokens.dtype.kind not in "iu":
            tokens = tokens.tolist()
        if not self.integers:
            if isinstance(tokens, str) or (len(tokens) and not isinstance(tokens[0], str)):
                raise UserError(
                    "this model's tokens are strings, in a sequence",
                    remedy="give a list of strings; ids that model.encode gave go to model.score",
                )
            return np.fromiter(map(self._ids.get, tokens, itertools.repeat(UNK)), np.int64, len(tokens))
        try:
            found = np.asarray(tokens if len(tokens) else np.empty(0, np.int64))
        except (TypeError, ValueError):
            found = np.empty(0, object)
        if found.dtype.kind not in "iu":
            raise UserError("this model's tokens are integers", remedy="give the ids that its tokenizer gives")
        found = found.astype(np.int64)
        return np.where((found >= 0) & (found < self.size), found + 3, UNK)

    def lines(self, text: str) -> tuple[Ints, Ints] | None:
        """(ids of the words of a text (T,), where its lines begin): `lookup.Words.of`. None for integers too."""
        if self.integers:
            return None
        if self._words is None:
            self._words = Words(self.names, UNK)
        return self._words.of(text)

    def decode(self, ids: Iterable[int]) -> list[Any]:
        """Tokens of ids: strings, or integers with the three special ones as their names."""
        if not self.integers:
            return [self.names[i] for i in ids]
        return [int(i) - 3 if i > EOS else SPECIAL[i] for i in ids]

    def words(self) -> list[str]:
        """Every token as the word that an ARPA file has for it, in the order of ids."""
        if self.integers:
            return [*SPECIAL, *map(str, range(self.size))]
        if "" in self._ids:
            raise DataError("an empty token has no name in an ARPA file")
        return [_BLANK.sub(lambda found: f"<U+{ord(found[0]):04X}>", name) for name in self.names]

    @staticmethod
    def of_words(words: Sequence[str]) -> Vocabulary:
        """The vocabulary that an ARPA file lists, without the three special tokens. The other half of `words`."""
        return Vocabulary([_ESCAPE.sub(lambda found: chr(int(found[1], 16)), word) for word in words])


def tokenise(text: str, unit: Unit) -> list[list[str]]:
    """Sentences of tokens. word: a line is a sentence, split at white space, blank lines left out. character, byte:
    the text is one sentence, its line ends tokens like others; bytes of its UTF-8 are named <0x00> to <0xFF>.

    Raises UserError for another unit.
    """
    check_unit(unit)
    if unit == "word":
        return [words for line in text.split("\n") if (words := line.split())]
    return [list(text)] if unit == "character" else [[_BYTES[b] for b in text.encode()]]


def check_unit(unit: str) -> None:
    if unit not in UNITS:
        raise UserError(f"no unit {unit!r}", remedy=did_you_mean(unit, UNITS))


_BYTES = tuple(f"<0x{b:02X}>" for b in range(256))


def bytes_of(tokens: Sequence[str]) -> bytes:
    """The bytes that byte tokens stand for."""
    return bytes(int(token[3:5], 16) for token in tokens)


def text_of(tokens: Sequence[str], unit: Unit | None) -> str:
    """The text that tokens make up: words with a blank between."""
    if unit == "byte":
        return bytes_of([token for token in tokens if token not in SPECIAL]).decode(errors="replace")
    return ("" if unit == "character" else " ").join(tokens)


def read_blocks(path: Path) -> Iterator[str]:
    """A UTF-8 file in blocks that end where a line ends, or the file. Raises DataError."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")(), ""
    try:
        with path.open("rb") as file:
            while data := file.read(_BLOCK):
                text = rest + decoder.decode(data)
                cut = text.rfind("\n") + 1
                if cut:
                    yield text[:cut]
                rest = text[cut:]
            rest += decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error.reason}", where=str(path), remedy="convert it first") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    if rest:
        yield rest


def encode_file(path: Path, unit: Unit, out: Path) -> Vocabulary:
    """Writes the ids of a text file's tokens to `out` (int32), </s> after each sentence; what is new gets the next id.

    Holds a block of text and the vocabulary in memory. Raises DataError for a file that is empty or not UTF-8.
    """
    check_unit(unit)
    ids = _Growing((name, i) for i, name in enumerate(SPECIAL))
    if unit == "byte":
        ids.update((name, i + 3) for i, name in enumerate(_BYTES))
    empty = True
    with out.open("wb") as file:
        for text in read_blocks(path):
            part = _ids_of(text, unit, ids)
            empty &= len(part) == 0
            file.write(part.astype(np.int32).tobytes())
        if unit != "word" and not empty:
            file.write(np.int32(EOS).tobytes())
    if empty:
        raise DataError("there is no text in the file", where=str(path))
    return Vocabulary(list(ids)[3:])


def _ids_of(text: str, unit: Unit, ids: dict[str, int]) -> Ints:
    """Ids of a block of text."""
    if unit == "byte":
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64) + 3
    if unit == "character":
        codes, inverse = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True)
        return np.array([ids[chr(code)] for code in codes], np.int64)[inverse]
    lines = [words for line in text.split("\n") if (words := line.split())]
    flat: list[str] = []
    for words in lines:
        flat += words
        flat.append(SPECIAL[EOS])
    found = np.fromiter(map(ids.__getitem__, flat), np.int64, len(flat))
    if np.count_nonzero((found == BOS) | (found == EOS)) > len(lines):
        raise DataError("<s> or </s> stands in the text", remedy="take them out: a line is a sentence")
    return found
