"""Rows that are computed when they are asked for, behind the interface of `datasets.Dataset`."""

from __future__ import annotations

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar, overload

import numpy as np

from dovetail.data.scenes.draws import Draws
from dovetail.errors import DataError, UserError, did_you_mean

Split = Literal["train", "validation", "test"]
Language = Literal["en", "zh"]
COUNTS: dict[str, int] = {"train": 10_000, "validation": 1_000, "test": 1_000}


@dataclass(frozen=True)
class Feature:
    """What a column holds. shape: of one row's value, None where it varies; () for one value. dtype: of numpy, "string"
    or the fields of a record. names: of classes."""

    dtype: str | dict[str, str]
    shape: tuple[int | None, ...] = ()
    what: str = ""
    names: tuple[str, ...] = ()


class Row(Mapping[str, Any]):
    """A mapping from column to value, and the same as attributes; each is computed when it is first asked for."""

    columns: ClassVar[tuple[str, ...]] = ()

    def __getitem__(self, name: str) -> Any:
        if name not in self.columns:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


R = TypeVar("R", bound=Row)


class Table(ABC, Generic[R]):
    """Base. Row i depends on (the class, seed, split, size, i) alone: not on `count`, what was read before, the worker
    that reads it, or the platform. `language` changes texts alone.

    count: how many rows there are, unless given 10,000 of "train" and 1,000 of the other splits, which are of different
    streams. Raises DataError for a split, language, size or count that is none.
    """

    row: ClassVar[type[Row]]
    least: ClassVar[int] = 64  # pixels a side

    def __init__(
        self,
        size: int = 128,
        seed: int = 0,
        language: Language = "en",
        count: int | None = None,
        split: Split = "train",
    ):
        if split not in COUNTS:
            raise DataError(f"there is no split {split!r}", where="split", remedy=did_you_mean(split, COUNTS))
        if language not in ("en", "zh"):
            raise DataError(f"texts are in 'en' or 'zh', not in {language!r}", where="language")
        if not self.least <= size <= 4096:
            raise DataError(f"images of {size} pixels a side", where="size", remedy=f"give {self.least} to 4096")
        if count is not None and count < 1:
            raise DataError(f"{count} rows", where="count", remedy="give at least 1")
        self.size, self.seed, self.split = size, seed, split
        self.language: Language = language
        self.indices: Sequence[int] = range(COUNTS[split] if count is None else count)

    @abstractmethod
    def draw(self, index: int) -> R:
        """The row of that number. Only `__getitem__` calls it."""

    @property
    @abstractmethod
    def features(self) -> dict[str, Feature]:
        """What each column holds."""

    @property
    def column_names(self) -> list[str]:
        return list(self.row.columns)

    @property
    def num_rows(self) -> int:
        return len(self.indices)

    def draws(self, index: int, use: str) -> Draws:
        """What row `index` is drawn with; `use` sets texts apart from pictures, so that a language changes no picture."""
        return Draws(self.row.__name__, use, self.seed, self.split, self.size, index)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[R]:
        return (self.draw(index) for index in self.indices)

    @overload
    def __getitem__(self, at: int) -> R: ...
    @overload
    def __getitem__(self, at: str | slice) -> Any: ...
    def __getitem__(self, at: int | str | slice) -> Any:
        """A row; the list of a column's values; or for a slice, as `datasets` has it, {column: list of values}.

        Raises IndexError beyond the rows, and DataError for a column that is none.
        """
        if isinstance(at, str):
            return [row[self._known(at)] for row in self]
        if isinstance(at, slice):
            rows = [self.draw(index) for index in self.indices[at]]
            return {name: [row[name] for row in rows] for name in self.column_names}
        if not -len(self) <= at < len(self):
            raise IndexError(f"row {at} of {len(self)}")
        return self.draw(self.indices[at])

    def select(self, rows: Iterable[int]) -> Table[R]:
        """The same with these rows alone, in this order. Raises IndexError beyond the rows."""
        chosen = [int(at) for at in rows]
        for at in chosen:
            if not 0 <= at < len(self):
                raise IndexError(f"row {at} of {len(self)}")
        found = copy(self)
        found.indices = [self.indices[at] for at in chosen]
        return found

    def to_hf(self, columns: Sequence[str] | None = None, cache_dir: str | None = None) -> Any:
        """A `datasets.Dataset` of these columns (all, unless given), written to its cache. Raises UserError where the
        package `datasets` is not installed, and DataError for a column that is none."""
        try:
            datasets: Any = importlib.import_module("datasets")
        except ImportError:
            raise UserError(
                "the package datasets is not installed", where="to_hf", remedy="pip install datasets"
            ) from None
        chosen = [self._known(name) for name in columns] if columns is not None else self.column_names
        features = datasets.Features({name: _hf(datasets, self.features[name]) for name in chosen})

        def rows() -> Iterator[dict[str, Any]]:
            for row in self:
                yield {name: _plain(row[name], self.features[name]) for name in chosen}

        mark = (
            f"{type(self).__name__}-{self.size}-{self.seed}-{self.language}-{self.split}-{list(self.indices)}-{chosen}"
        )
        fingerprint = hashlib.sha256(mark.encode()).hexdigest()[:16]
        return datasets.Dataset.from_generator(
            rows, features=features, cache_dir=cache_dir, split=self.split, fingerprint=fingerprint
        )

    def __repr__(self) -> str:
        said = f"size={self.size}, seed={self.seed}, language={self.language!r}, split={self.split!r}"
        return f"{type(self).__name__}({said}, {len(self)} rows)"

    def _known(self, name: str) -> str:
        if name not in self.row.columns:
            raise DataError(
                f"there is no column {name!r}", where=repr(self), remedy=did_you_mean(name, self.row.columns)
            )
        return name


def _hf(datasets: Any, feature: Feature) -> Any:
    """The feature in the terms of `datasets`: arrays of at least two axes are arrays, shorter ones lists."""
    if isinstance(feature.dtype, dict):
        inner: Any = {name: datasets.Value(dtype) for name, dtype in feature.dtype.items()}
    elif feature.names:
        inner = datasets.ClassLabel(names=list(feature.names))
    else:
        inner = datasets.Value(feature.dtype)
    sizes = feature.shape
    if isinstance(feature.dtype, str) and 2 <= len(sizes) <= 4 and None not in sizes[1:]:
        return getattr(datasets, f"Array{len(sizes)}D")(sizes, feature.dtype)
    for _ in sizes:
        inner = datasets.List(inner)
    return inner


def _plain(value: Any, feature: Feature) -> Any:
    """A value as `datasets` takes it."""
    if isinstance(feature.dtype, dict):
        if feature.shape:
            return [_plain(item, Feature(feature.dtype)) for item in value]
        return {name: getattr(value, name) for name in feature.dtype}
    if isinstance(value, tuple):
        return [item.tolist() if isinstance(item, np.ndarray) else item for item in value]
    return value
