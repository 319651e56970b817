"""Labelled examples: arrays of numbers (images, signals) with one class each, and the rows that they make."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from dovetail.errors import DataError
from dovetail.spec import Spec, register
from dovetail.spec.categories import CorpusPart
from dovetail.spec.ranges import Natural


class LabelledRow(NamedTuple):
    """values (T,F) or (C,H,W), float32; label: the class, from 0."""

    values: np.ndarray
    label: int


@dataclass(frozen=True)
class LabelledSet:
    """values (N,...) uint8 and labels (N,) int64, below `classes`; a value v is read as (v / 255 - mean) / std."""

    values: np.ndarray
    labels: np.ndarray
    classes: int
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if len(self.values) != len(self.labels) or not len(self.labels):
            raise DataError(f"{len(self.values)} examples and {len(self.labels)} labels", remedy="give as many of both")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> LabelledRow:
        values = self.values[index].astype(np.float32)
        return LabelledRow((values / 255 - self.mean) / self.std, int(self.labels[index]))

    def longest(self) -> int:
        """Index of a row that costs the most: all are of one shape."""
        return 0

    @cached_property
    def meta(self) -> dict[str, Any]:
        """text_sha256: of values, labels and how they are read; what a report says it measured."""
        digest = hashlib.sha256(f"{self.values.shape} {self.classes} {self.mean} {self.std}".encode())
        digest.update(np.ascontiguousarray(self.values).data)
        digest.update(self.labels.astype("<i8").data)
        return {"text_sha256": digest.hexdigest()}


class Labelled(Spec):
    """Base of the corpora whose examples have a class each: what the objective `classification` learns from."""

    def examples(self) -> LabelledSet:
        """Raises DataError for files that are missing or are not what they should be."""
        raise TypeError(f"{self.kind} does not say where its examples are")

    def documents(self) -> Iterator[str]:
        """Raises DataError: whoever reads documents wants a text."""
        raise DataError(
            f"a corpus {self.kind!r} has labelled examples, and no text", remedy="give a corpus of texts: {kind: text}"
        )

    def fingerprint(self) -> str:
        """SHA-256 of the examples."""
        return self.examples().meta["text_sha256"]


@register(
    "corpus",
    "pixels",
    oracle="formula: row by row, in the order of a numpy permutation, and with the bits of places reversed",
    source="Le et al. 2015 (IRNN), section 4.2; the order of reversed bits: Gu et al. 2022 (S4), released code",
)
class Pixels(Labelled):
    """Images (C,H,W) as sequences of their pixels (H·W,C), row by row.

    permutation: seed of one fixed order of the pixels for all images (permuted MNIST); "bit_reversal": by the binary
    digits of a pixel's number read backwards, so that coarse samples of the image come first (what S4's published
    figures are of); null: as they stand.
    """

    of: CorpusPart
    permutation: Natural | Literal["bit_reversal"] | None = None

    def examples(self) -> LabelledSet:
        if not isinstance(self.of, Labelled):
            raise DataError(
                f"a corpus {self.of.kind!r} has no pixels", where="of", remedy="give labelled images: mnist"
            )
        images = self.of.examples()
        if images.values.ndim != 4:
            raise DataError(f"examples of shape {images.values.shape[1:]} are no images", where="of")
        pixels = np.moveaxis(images.values, 1, -1).reshape(len(images), -1, images.values.shape[1])
        if self.permutation == "bit_reversal":
            pixels = pixels[:, bit_reversal(pixels.shape[1])]
        elif self.permutation is not None:
            pixels = pixels[:, np.random.default_rng(self.permutation).permutation(pixels.shape[1])]
        return replace(images, values=np.ascontiguousarray(pixels))


def bit_reversal(count: int) -> np.ndarray:
    """0..count-1 by their binary digits read backwards, as many digits as the largest has."""
    digits = (count - 1).bit_length()
    return np.array(sorted(range(count), key=lambda number: f"{number:0{digits}b}"[::-1]))


def nearest_mean(train: LabelledSet, asked: LabelledSet) -> float:
    """Share of `asked` that is nearest, by Euclid, to the mean of its own class in `train`: a rival without learning."""
    known = np.unique(train.labels)
    means = np.stack([train.values[train.labels == k].mean(0, dtype=np.float64).ravel() for k in known])
    hits = 0
    for start in range(0, len(asked), 1000):
        values = asked.values[start : start + 1000].reshape(-1, means.shape[1]).astype(np.float64)
        distance = (means**2).sum(1) - 2 * values @ means.T  # less |values|², which changes no order
        hits += int((known[distance.argmin(1)] == asked.labels[start : start + 1000]).sum())
    return hits / len(asked)
