"""The word2vec formats, text and binary, in and out; GloVe's text (no header) in.

Text: a line "V d", then a line a word, its d numbers behind it. Binary: the same first line, then a word, a space and
d little-endian float32, with or without a line break. Read strictly: every count is checked against the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dovetail.errors import DataError


def save_word2vec(path: str | Path, words: Sequence[str], vectors: Tensor) -> None:
    """Binary if the name ends in .bin, else text with as many digits as float32 needs.

    words: V strings; vectors: (V, d). Raises DataError for a word that is empty or holds white space, which the
    format cannot say.
    """
    bad = next((word for word in words if not word or len(word.split()) != 1 or word.strip() != word), None)
    if bad is not None:
        raise DataError(f"the word {bad!r} is empty or holds white space", where=str(path), remedy="rename the word")
    rows = vectors.detach().cpu().to(torch.float32).contiguous().numpy()
    with Path(path).open("wb") as file:
        file.write(f"{len(words)} {rows.shape[1]}\n".encode())
        for word, row in zip(words, rows, strict=True):
            if Path(path).suffix == ".bin":
                file.write(word.encode() + b" " + row.astype("<f4").tobytes() + b"\n")
            else:
                file.write(f"{word} {' '.join(map(str, row))}\n".encode())


def load_word2vec(path: str | Path) -> tuple[list[str], Tensor]:
    """(V words, (V, d) float32) of a word2vec file, binary if the name ends in .bin, or of GloVe's text.

    Raises DataError for a missing file, a header that does not fit, a row of another width, a number that is none or
    not finite, or a word that comes twice.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"no file of word vectors {str(path)!r}")
    try:
        words, rows = _binary(file) if file.suffix == ".bin" else _text(file)
    except UnicodeDecodeError as error:
        raise _broken(file, f"a word is not UTF-8 ({error.reason} at byte {error.start})") from None
    if not np.isfinite(rows).all():
        raise _broken(file, f"the vector of {words[int((~np.isfinite(rows)).any(1).argmax())]!r} is not finite")
    if len(set(words)) != len(words):
        seen: set[str] = set()
        twice = next(word for word in words if word in seen or seen.add(word))
        raise _broken(file, f"the word {twice!r} comes twice")
    return words, torch.from_numpy(rows)


def _binary(file: Path) -> tuple[list[str], np.ndarray]:
    data = file.read_bytes()
    end = data.find(b"\n", 0, 100)
    header = data[: max(end, 0)].split()
    if len(header) != 2 or not all(field.isdigit() for field in header):
        raise _broken(file, "the first line is not 'words width'")
    count, dim = map(int, header)
    if dim < 1 or count < 1 or count * (4 * dim + 2) > len(data):
        raise _broken(file, f"{count} words of width {dim} do not fit into {len(data)} bytes")
    words, rows, at = [], np.empty((count, dim), np.float32), end + 1
    for i in range(count):
        space = data.find(b" ", at)
        if space < 0 or space + 1 + 4 * dim > len(data):
            raise _broken(file, f"it ends in word {i + 1} of {count}")
        words.append(data[at:space].lstrip(b"\n").decode())
        rows[i] = np.frombuffer(data, "<f4", dim, space + 1)
        at = space + 1 + 4 * dim
    if data[at:].strip(b"\n"):
        raise _broken(file, f"{len(data) - at} bytes are left over after word {count}")
    return words, rows


def _text(file: Path) -> tuple[list[str], np.ndarray]:
    words: list[str] = []
    rows: list[np.ndarray] = []
    expected: tuple[int, int] | None = None
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.rstrip(b" \r\n").split(b" ")
            if number == 1 and len(fields) == 2 and all(field.isdigit() for field in fields):
                expected = int(fields[0]), int(fields[1])
                continue
            try:
                row = np.array(fields[1:], dtype="S").astype(np.float32)
            except ValueError:
                raise _broken(file, f"line {number} holds something that is no number") from None
            width = expected[1] if expected else len(rows[0]) if rows else len(row)
            if len(row) != width or not width:
                raise _broken(file, f"line {number} has {len(row)} numbers, not {width}")
            words.append(fields[0].decode())
            rows.append(row)
    if not rows:
        raise _broken(file, "it holds no vectors")
    if expected and expected[0] != len(rows):
        raise _broken(file, f"the first line promises {expected[0]} words, {len(rows)} follow")
    return words, np.stack(rows)


def _broken(file: Path, what: str) -> DataError:
    return DataError(what, where=str(file), remedy="give word2vec's text, its binary form as NAME.bin, or GloVe's text")
