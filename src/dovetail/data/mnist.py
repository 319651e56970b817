"""MNIST and what comes in its format: IDX files of images and labels, gzipped or not."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Literal

import numpy as np

from dovetail.data.labelled import Labelled, LabelledSet
from dovetail.errors import DataError
from dovetail.spec import register
from dovetail.spec.ranges import Count, Natural, Positive

_MOST = 2**31  # bytes of one file, unpacked: a header may claim anything
_FILES = {"train": "train", "test": "t10k"}


@register(
    "corpus",
    "mnist",
    oracle="formula: the bytes of the files",
    source="LeCun et al. 1998; the format: yann.lecun.com/exdb/mnist (IDX)",
)
class Mnist(Labelled):
    """Images (1,H,W) of ten classes from a folder with train-images-idx3-ubyte[.gz] and its three companions.

    first, count: only `count` images (all that follow, unless given) from number `first` on, in the order of the file:
    a part of `train` that is held out for choosing, or a small piece. mean, std: of all training pixels, in 0..1.
    """

    path: str
    split: Literal["train", "test"]
    first: Natural = 0
    count: Count | None = None
    mean: float = 0.1307
    std: Positive = 0.3081

    def examples(self) -> LabelledSet:
        name, folder = _FILES[self.split], Path(self.path)
        images = read_idx(_file(folder, f"{name}-images-idx3-ubyte"), 3)
        labels = read_idx(_file(folder, f"{name}-labels-idx1-ubyte"), 1)
        if len(images) != len(labels):
            raise DataError(f"{len(images)} images and {len(labels)} labels", where=f"{folder}, {self.split}")
        if labels.max(initial=0) > 9:
            raise DataError(f"a label of {labels.max()}, and there are ten classes", where=f"{folder}, {self.split}")
        stop = len(images) if self.count is None else self.first + self.count
        if self.first >= len(images) or stop > len(images):
            raise DataError(
                f"images {self.first} to {stop - 1} of {len(images)}", where=f"{folder}, {self.split}",
                remedy="lower first or count",
            )  # fmt: skip
        part = slice(self.first, stop)
        return LabelledSet(images[part, None], labels[part].astype(np.int64), 10, self.mean, self.std)


def read_idx(path: Path, axes: int) -> np.ndarray:
    """The uint8 array of an IDX file with so many axes, unpacked where it ends in .gz. Raises DataError."""
    head = 4 + 4 * axes
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(head)
            if len(start) < head or start[:4] != bytes([0, 0, 8, axes]):
                raise DataError(f"not an IDX file of bytes with {axes} ax{'i' if axes == 1 else 'e'}s", where=str(path))
            shape = tuple(int(n) for n in np.frombuffer(start[4:], ">u4"))
            size = int(np.prod(np.asarray(shape, dtype=object)))
            if not 0 < size <= _MOST:
                raise DataError(f"the header says {shape}", where=str(path))
            data = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        said = getattr(error, "strerror", None) or error
        raise DataError(f"cannot be read: {said}", where=str(path), remedy="fetch it again") from None
    if len(data) != size:
        more = "more" if len(data) > size else "fewer"
        raise DataError(f"{more} bytes than the {shape} of its header", where=str(path), remedy="fetch it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _file(folder: Path, name: str) -> Path:
    """NAME.gz or NAME, whichever is there."""
    found = [path for path in (folder / f"{name}.gz", folder / name) if path.is_file()]
    if not found:
        raise DataError(
            f"no file {name}[.gz]", where=str(folder), remedy="give the folder of the four IDX files as path"
        )
    return found[0]
