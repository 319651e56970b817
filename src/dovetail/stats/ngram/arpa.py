"""ARPA files: log10 p, the words, log10 of the back-off weight; -99 for a probability of 0 (Stolcke, ngram-format(5))."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dovetail.errors import DataError, UserError
from dovetail.stats.ngram.trie import Ints, Trie
from dovetail.stats.ngram.vocabulary import SPECIAL, Unit, Vocabulary

if TYPE_CHECKING:
    from dovetail.stats.ngram.model import NGram

_ZERO = -99.0
_LINES = 1 << 16  # n-grams written at a time
_LOG10 = math.log(10)


def save(model: NGram, path: Path) -> None:
    """Writes `model` with 10 significant digits. Raises UserError for a form that is not back-off, or for no room."""
    if model.form != "back-off":
        raise UserError(f"{model.form} is no back-off model, which ARPA files hold", remedy="fit another smoothing")
    words = np.array(model.vocabulary.words(), dtype=object)
    try:
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.write("\\data\\\n" + "".join(f"ngram {n}={size}\n" for n, size in enumerate(model.sizes, 1)))
            for n in range(1, model.order + 1):
                file.write(f"\n\\{n}-grams:\n")
                columns, last = model.trie.columns(n), n == model.order
                for start in range(0, model.trie.size(n), _LINES):
                    part = slice(start, start + _LINES)
                    grams = map(" ".join, zip(*words[columns[:, part]].tolist(), strict=True))
                    p, back = _tens(model.logp[n - 1][part]), _tens(model.back[n - 1][part])
                    if last:
                        file.writelines(f"{x:.10g}\t{gram}\n" for x, gram in zip(p, grams, strict=True))
                    else:
                        rows = zip(p, grams, back, strict=True)
                        file.writelines(f"{x:.10g}\t{gram}\t{b:.10g}\n" for x, gram, b in rows)
            file.write("\n\\end\\\n")
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror or error}", where=str(path)) from None


def _tens(nats: NDArray[np.float64]) -> list[float]:
    return (np.where(np.isneginf(nats), _ZERO, nats / _LOG10) + 0.0).tolist()  # + 0.0: no "-0"


def load(path: Path, unit: Unit | None, integers: bool) -> NGram:
    """Reads a file of any order. A file without <unk> gives unknown tokens the probability 0.

    Raises DataError for a file that is cut short, lists an n-gram twice or without its prefix, or a word unknown to
    its unigrams.
    """
    from dovetail.stats.ngram.model import NGram

    try:
        with path.open(encoding="utf-8") as file:
            lines = enumerate(file, 1)
            sizes = _header(lines, path)
            vocabulary, logp, back, rows = _unigrams(_section(lines, 1, sizes[0], path), path, integers)
            ids = dict(zip(vocabulary.words(), range(len(vocabulary)), strict=True))
            trie, all_logp, all_back = Trie(len(vocabulary)), [logp], [back]
            del rows
            for n in range(2, len(sizes) + 1):
                found = _section(lines, n, sizes[n - 1], path)
                columns, logp, back = _columns(found, n, ids, path)
                parents = trie.locate(columns[:-1])
                if len(parents) and int(parents.min()) < 0:
                    raise DataError(f"a {n}-gram stands without its first {n - 1} words", where=str(path))
                keys = parents * len(vocabulary) + columns[-1]
                by = np.argsort(keys)
                trie.add(keys[by])
                all_logp.append(logp[by])
                all_back.append(back[by])
            _end(lines, path)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error.reason}", where=str(path)) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    return NGram(vocabulary, trie, all_logp, all_back, unit=unit)


_Lines = Iterator[tuple[int, str]]
_Found = list[tuple[int, list[str]]]


def _header(lines: _Lines, path: Path) -> list[int]:
    sizes: list[int] = []
    begun = False
    for number, line in lines:
        text = line.strip()
        if text == "\\data\\":
            begun = True
        elif begun and text.startswith("ngram "):
            left, _, right = text.removeprefix("ngram ").partition("=")
            if not right.strip().isdigit() or left.strip() != str(len(sizes) + 1):
                raise DataError(f"{text!r} does not say how many {len(sizes) + 1}-grams", where=f"{path}:{number}")
            sizes.append(int(right))
        elif begun and sizes and not text:
            return sizes
        elif begun and text:
            raise DataError(f"{text[:60]!r} in the header", where=f"{path}:{number}")
    raise DataError("no \\data\\ section", where=str(path), remedy="give an ARPA file")


def _section(lines: _Lines, n: int, size: int, path: Path) -> _Found:
    """(line number, fields) of the n-grams of one order: p, the words, and the back-off weight where it stands."""
    for number, line in lines:
        if line.strip():
            if line.strip() != f"\\{n}-grams:":
                raise DataError(f"{line.strip()[:60]!r} where \\{n}-grams: should be", where=f"{path}:{number}")
            break
    found: _Found = []
    while len(found) < size:
        number, line = next(lines, (0, ""))
        fields = line.split()
        if len(fields) not in (n + 1, n + 2):
            what = f"{line.strip()[:60]!r} is no {n}-gram" if line else "the file ends"
            raise DataError(f"{what}; {size - len(found)} {n}-grams are missing", where=f"{path}:{number}")
        found.append((number, fields))
    return found


def _end(lines: _Lines, path: Path) -> None:
    for number, line in lines:
        if line.strip() == "\\end\\":
            return
        if line.strip():
            raise DataError(f"{line.strip()[:60]!r} beyond what the header says", where=f"{path}:{number}")
    raise DataError("no \\end\\: the file is cut short", where=str(path))


def _numbers(found: _Found, n: int, path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(log p, log weight) in nats."""
    try:
        p = np.array([float(fields[0]) for _, fields in found])
        back = np.array([float(fields[n + 1]) if len(fields) > n + 1 else 0.0 for _, fields in found])
    except ValueError as error:
        raise DataError(f"not a number among the {n}-grams: {error}", where=str(path)) from None
    if np.isnan(p).any() or np.isnan(back).any() or (p > 0).any():
        raise DataError(f"a log probability above 0, or none, among the {n}-grams", where=str(path))
    return tuple(np.where(x <= _ZERO, -np.inf, x * _LOG10) for x in (p, back))  # type: ignore[return-value]


def _unigrams(
    found: _Found, path: Path, integers: bool
) -> tuple[Vocabulary, NDArray[np.float64], NDArray[np.float64], Ints]:
    words = [fields[1] for _, fields in found]
    rest = [word for word in words if word not in SPECIAL]
    if integers:
        if not all(word.isdecimal() for word in rest):
            raise DataError("the words are no integers", where=str(path), remedy="leave integers out")
        vocabulary = Vocabulary(max(map(int, rest), default=0) + 1)
    else:
        vocabulary = Vocabulary.of_words(rest)
    ids = {word: i for i, word in enumerate(vocabulary.words())}
    if len(set(words)) < len(words):
        raise DataError("a unigram stands twice", where=str(path))
    rows = np.array([ids[word] for word in words], dtype=np.int64)
    p, b = _numbers(found, 1, path)
    logp, back = np.full(len(vocabulary), -np.inf), np.zeros(len(vocabulary))
    logp[rows], back[rows] = p, b
    return vocabulary, logp, back, rows


def _columns(
    found: _Found, n: int, ids: dict[str, int], path: Path
) -> tuple[Ints, NDArray[np.float64], NDArray[np.float64]]:
    try:
        flat = [ids[word] for _, fields in found for word in fields[1 : n + 1]]
    except KeyError as error:
        raise DataError(f"the word {error} of a {n}-gram is no unigram", where=str(path)) from None
    return np.array(flat, dtype=np.int64).reshape(-1, n).T, *_numbers(found, n, path)
