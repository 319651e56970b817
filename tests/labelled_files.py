"""Tiny files in the format of MNIST."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

NAMES = {
    "train images": "train-images-idx3-ubyte", "train labels": "train-labels-idx1-ubyte",
    "test images": "t10k-images-idx3-ubyte", "test labels": "t10k-labels-idx1-ubyte",
}  # fmt: skip


def idx(data: np.ndarray) -> bytes:
    """An array of bytes as an IDX file."""
    return struct.pack(f">BBBB{data.ndim}I", 0, 0, 8, data.ndim, *data.shape) + data.tobytes()


def write_mnist(
    folder: Path, *, train: int, test: int, side: tuple[int, int], packed: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """The four files; all images (N,H,W) and labels (N,), training ones first. An image is bright in its label's row."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, train + test).astype(np.uint8)
    images = rng.integers(0, 60, (train + test, *side)).astype(np.uint8)
    images[np.arange(train + test), labels % side[0]] += 150
    for split, part in (("train", slice(0, train)), ("test", slice(train, None))):
        for what, data in (("images", images[part]), ("labels", labels[part])):
            name, written = NAMES[f"{split} {what}"], idx(data)
            (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(written) if packed else written)
    return images, labels
