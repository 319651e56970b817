"""Labelled images: the format's bytes, pixels as sequences, refusals, and a rival without learning."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dovetail.data.labelled import Labelled, LabelledRow, LabelledSet, Pixels, nearest_mean
from dovetail.data.mnist import Mnist, read_idx
from dovetail.data.rows import collate, real_tokens
from dovetail.errors import DataError, SpecError
from dovetail.spec import Spec
from labelled_files import NAMES, idx, write_mnist
from oracles import oracle_for

REAL = Path(__file__).parents[3] / "shared" / "data" / "mnist"


@oracle_for("corpus", "mnist")
@pytest.mark.parametrize("packed", [True, False])
def test_images_are_the_bytes_of_the_files(tmp_path: Path, packed: bool) -> None:
    images, labels = write_mnist(tmp_path, train=7, test=3, side=(4, 5), packed=packed)
    for split, part in (("train", slice(0, 7)), ("test", slice(7, 10))):
        found = Mnist(path=str(tmp_path), split=split).examples()
        assert found.values.shape == (len(images[part]), 1, 4, 5) and found.classes == 10
        np.testing.assert_array_equal(found.values[:, 0], images[part])
        np.testing.assert_array_equal(found.labels, labels[part])
    one = Mnist(path=str(tmp_path), split="train", first=2, count=3, mean=0.5, std=0.25).examples()
    assert len(one) == 3 and one[1].label == labels[3]
    np.testing.assert_allclose(one[1].values[0], (images[3] / 255 - 0.5) / 0.25, rtol=1e-6)


@oracle_for("corpus", "pixels")
def test_pixels_stand_in_one_order(tmp_path: Path) -> None:
    images, _ = write_mnist(tmp_path, train=6, test=2, side=(3, 4))
    of = {"kind": "mnist", "path": str(tmp_path), "split": "train"}
    corpus: Any = Spec.parse("corpus", {"kind": "pixels", "of": of})
    np.testing.assert_array_equal(corpus.examples().values, images[:6].reshape(6, 12, 1))
    order = np.random.default_rng(3).permutation(12)
    shuffled = corpus.replace(permutation=3)
    np.testing.assert_array_equal(shuffled.examples().values[..., 0], images[:6].reshape(6, 12)[:, order])
    held = Spec.parse("corpus", {"kind": "pixels", "permutation": 3, "of": of | {"split": "test"}})
    np.testing.assert_array_equal(held.examples().values[..., 0], images[6:].reshape(2, 12)[:, order])  # type: ignore[attr-defined]
    backwards = Spec.parse("corpus", {"kind": "pixels", "permutation": "bit_reversal", "of": of})
    order = np.array([0, 8, 4, 2, 10, 6, 1, 9, 5, 3, 11, 7])  # of 0, 8, 4, 12, ... of sixteen
    np.testing.assert_array_equal(backwards.examples().values[..., 0], images[:6].reshape(6, 12)[:, order])  # type: ignore[attr-defined]
    corpora = (corpus, shuffled, shuffled.replace(permutation=4), held, backwards)
    marks = [c.fingerprint() for c in corpora]  # type: ignore[attr-defined]
    assert len(set(marks)) == 5 and shuffled.fingerprint() == marks[1]
    with pytest.raises(SpecError, match=r"integer or .bit_reversal.(?s:.*)where: permutation$"):
        Spec.parse("corpus", {"kind": "pixels", "permutation": "reversed", "of": of})


def test_colours_stand_beside_each_other() -> None:
    class Drawn(Labelled):
        def examples(self) -> LabelledSet:
            return LabelledSet(np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2), np.array([0, 1]), 2)

    pixels = Pixels.model_construct(of=Drawn.model_construct(), permutation=None).examples()
    assert pixels.values[0].tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]


def test_batches_of_labelled_rows() -> None:
    rows = [LabelledRow(np.full((5, 2), i, np.float32), 3 - i) for i in range(3)]
    batch = collate(rows)
    assert batch["values"].shape == (3, 5, 2) and batch["values"].dtype == torch.float32
    assert batch["labels"].tolist() == [3, 2, 1] and real_tokens(batch) == 15


def spoil(folder: Path, name: str, data: bytes) -> None:
    (folder / f"{NAMES[name]}.gz").write_bytes(data)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("train images", b"no gzip at all", "cannot be read"),
        ("train images", gzip.compress(b"\0\0\x08"), "not an IDX file"),
        ("train images", gzip.compress(struct.pack(">BBBBI", 0, 0, 8, 1, 2) + b"ab" * 20), "not an IDX file"),
        ("train images", gzip.compress(idx(np.zeros((2, 2, 2), np.uint8)))[:-9], "cannot be read"),
        ("train images", gzip.compress(idx(np.zeros((2, 2, 2), np.uint8))[:-1]), "fewer bytes"),
        ("train images", gzip.compress(idx(np.zeros((2, 2, 2), np.uint8)) + b"x"), "more bytes"),
        ("train images", gzip.compress(struct.pack(">BBBBIII", 0, 0, 8, 3, *[2**32 - 1] * 3)), "the header says"),
        ("train images", gzip.compress(idx(np.zeros((9, 2, 2), np.uint8))), "9 images and 4 labels"),
        ("train labels", gzip.compress(idx(np.full(4, 10, np.uint8))), "a label of 10"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # bytes of gzip hold the time
)
def test_spoilt_files_are_refused(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    write_mnist(tmp_path, train=4, test=1, side=(2, 2))
    spoil(tmp_path, name, data)
    with pytest.raises(DataError, match=said):
        Mnist(path=str(tmp_path), split="train").examples()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file train-images"):
        Mnist(path=str(tmp_path), split="train").examples()
    write_mnist(tmp_path, train=4, test=1, side=(2, 2))
    for part in ({"first": 4}, {"count": 5}, {"first": 2, "count": 3}):
        with pytest.raises(DataError, match="of 4"):
            Mnist(path=str(tmp_path), split="train", **part).examples()  # type: ignore[arg-type]
    of = {"kind": "pixels", "of": {"kind": "mnist", "path": str(tmp_path), "split": "train"}}
    with pytest.raises(DataError, match="no images"):
        Spec.parse("corpus", {"kind": "pixels", "of": of}).examples()  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="no pixels"):
        Spec.parse("corpus", {"kind": "pixels", "of": {"kind": "text", "path": "x"}}).examples()  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="as many of both"):
        LabelledSet(np.zeros((2, 1), np.uint8), np.zeros(3, np.int64), 2)


def test_the_nearest_mean() -> None:
    train = LabelledSet(np.array([[0, 0], [2, 0], [9, 9], [11, 9]], np.uint8), np.array([4, 4, 7, 7]), 10)
    asked = LabelledSet(np.array([[1, 1], [8, 8], [4, 4], [6, 6]], np.uint8), np.array([4, 7, 7, 7]), 10)
    assert nearest_mean(train, asked) == 0.75  # (4, 4) lies nearer to (1, 0)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not here")
def test_the_real_files() -> None:
    found = read_idx(REAL / "t10k-labels-idx1-ubyte.gz", 1)
    assert np.bincount(found).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
