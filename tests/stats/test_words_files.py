"""word2vec's files: gensim reads ours, we read gensim's, and what is broken is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dovetail.errors import DataError
from dovetail.stats import WordVectors

gensim = pytest.importorskip("gensim")
WORDS = ("the", "naïve", "词", "x" * 40, "123")


@pytest.fixture
def vectors() -> WordVectors:
    matrix = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    matrix[0, 0], matrix[1, 2], matrix[2, 3] = 1e-38, 1 / 3, -0.0
    matrix[3, 4] = float(np.frombuffer(b"\n \n ", "<f4")[0])  # a number whose bytes are line breaks and spaces
    return WordVectors(WORDS, matrix)


@pytest.mark.parametrize("name", ["v.txt", "v.bin"])
def test_to_gensim_and_back(vectors: WordVectors, tmp_path: Path, name: str) -> None:
    binary = name.endswith("bin")
    vectors.save(tmp_path / name)
    peer = gensim.models.KeyedVectors.load_word2vec_format(str(tmp_path / name), binary=binary)
    assert tuple(peer.index_to_key) == WORDS
    assert np.array_equal(peer.vectors, vectors.matrix.numpy())
    peer.save_word2vec_format(str(tmp_path / f"peer-{name}"), binary=binary)
    back = WordVectors.load(tmp_path / f"peer-{name}")
    assert back.words == WORDS
    assert torch.equal(back.matrix, vectors.matrix)
    assert torch.equal(WordVectors.load(tmp_path / name).matrix, vectors.matrix)


def test_gloves_text_has_no_header(vectors: WordVectors, tmp_path: Path) -> None:
    vectors.save(tmp_path / "v.txt")
    (tmp_path / "glove.txt").write_bytes((tmp_path / "v.txt").read_bytes().split(b"\n", 1)[1])
    assert torch.equal(WordVectors.load(tmp_path / "glove.txt").matrix, vectors.matrix)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "no vectors"),
        ("a.txt", b"3 2\na 1 2\nb 1 2\n", "promises 3 words, 2 follow"),
        ("a.txt", b"2 2\na 1 2\nb 1\n", "line 3 has 1 numbers, not 2"),
        ("a.txt", b"2 2\na 1 2\nb 1 x\n", "line 3 holds something that is no number"),
        ("a.txt", b"2 2\na 1 2\na 1 3\n", "'a' comes twice"),
        ("a.txt", b"2 2\na 1 2\nb nan 3\n", "'b' is not finite"),
        ("a.txt", b"1 2\n\xff 1 2\n", "not UTF-8"),
        ("a.bin", b"junk", "not 'words width'"),
        ("a.bin", b"99999999999 300\n", "do not fit into 16 bytes"),
        ("a.bin", b"2 1\na \0\0\0\0bbbbbbbbb", "ends in word 2 of 2"),
        ("a.bin", b"1 1\na \0\0\0\0more", "4 bytes are left over"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        WordVectors.load(tmp_path / name)


def test_words_that_the_format_cannot_say(tmp_path: Path) -> None:
    for word in ("two words", "", "line\nbreak", " a"):
        with pytest.raises(DataError, match="white space"):
            WordVectors([word, "b"], torch.zeros(2, 2)).save(tmp_path / "v.txt")
    assert not (tmp_path / "v.txt").exists()
    with pytest.raises(DataError, match="no file"):
        WordVectors.load(tmp_path / "v.txt")
    with pytest.raises(DataError, match="1 distinct"):
        WordVectors(["a", "a"], torch.zeros(2, 2))
