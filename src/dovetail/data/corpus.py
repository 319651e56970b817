"""Corpora: where text comes from, one document at a time, always in the same order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from dovetail.errors import DataError
from dovetail.spec import Spec, register


class Corpus(Spec):
    """Base: `documents()` yields the text of each document, unchanged and in a fixed order."""

    def documents(self) -> Iterator[str]:
        """Raises DataError for files that are missing, empty or unreadable."""
        raise TypeError(f"{self.kind} does not say where its text is")

    def fingerprint(self) -> str:
        """SHA-256 of the documents, each with its length: what a report says it measured."""
        digest = hashlib.sha256()
        for text in self.documents():
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()


@register("corpus", "text", oracle="formula: the file's text", source="plain text")
class TextFile(Corpus):
    """A UTF-8 text file: one document, or several where `separator` stands between them (it is left out).

    In a file whose lines end in \\r\\n, the separator's do too.
    """

    path: str
    separator: str | None = None

    def documents(self) -> Iterator[str]:
        text = read_text(Path(self.path))
        between = self.separator or ""
        between = between if between in text else between.replace("\n", "\r\n")
        yield from text.split(between) if between else (text,)


@register("corpus", "files", oracle="formula: each file's text", source="plain text")
class Files(Corpus):
    """A list of UTF-8 text files, a document each."""

    paths: tuple[str, ...] = Field(strict=False)

    def documents(self) -> Iterator[str]:
        for path in self.paths:
            yield read_text(Path(path))


@register("corpus", "folder", oracle="formula: each file's text", source="plain text")
class Folder(Corpus):
    """Every file under a folder that matches `glob`, in the order of its relative path, a document each."""

    path: str
    glob: str = "**/*.txt"

    def documents(self) -> Iterator[str]:
        root = Path(self.path)
        if not root.is_dir():
            raise DataError("no such folder", where=self.path)
        try:
            found = sorted(
                (p for p in root.glob(self.glob) if p.is_file()), key=lambda p: p.relative_to(root).as_posix()
            )
        except (ValueError, NotImplementedError, IndexError) as error:  # as Python versions have it
            raise DataError(
                f"the pattern {self.glob!r} cannot be searched: {error}",
                where=self.path,
                remedy="set glob to one below the folder, e.g. '**/*.py'",
            ) from None
        if not found:
            raise DataError(f"no file matches {self.glob!r}", where=self.path, remedy="set glob, e.g. '**/*.py'")
        for path in found:
            yield read_text(path)


@register("corpus", "jsonl", oracle="formula: the field of each line", source="JSON Lines")
class JsonLines(Corpus):
    """A file with a JSON object a line; `field` holds the document."""

    path: str
    field: str = "text"

    def documents(self) -> Iterator[str]:
        for where, row in json_objects(Path(self.path)):
            text = row.get(self.field)
            if not isinstance(text, str):
                raise no_text(self.field, row, where, "set field to one of")
            yield text


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(FILE:LINE, object) of every line of a JSON Lines file; blank lines are passed over. Raises DataError."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:  # numbers and nestings beyond Python's limits, too
                    raise DataError(f"not JSON: {error}", where=where, remedy="give one JSON object a line") from None
                if not isinstance(row, dict):
                    raise DataError("not a JSON object", where=where, remedy="give objects with a text field")
                if "\\u" in line:
                    _check_encodable(row, where)
                yield where, row
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def _check_encodable(row: dict[str, Any], where: str) -> None:
    """Raises DataError for half a surrogate pair, which JSON can say and no text holds."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"half a surrogate pair, {error.object[error.start]!a}, is no character",
            where=where,
            remedy="write both halves, or the character itself",
        ) from None


def no_text(field: str, row: dict[str, Any], where: str, remedy: str) -> DataError:
    """The error for a row whose `field` holds no text; it names the fields that do."""
    known = ", ".join(name for name, value in row.items() if isinstance(value, str))
    return DataError(
        f"no text in field {field!r}",
        where=where,
        remedy=f"{remedy}: {known}" if known else "give objects with a text field",
    )


def read_text(path: Path) -> str:
    """The file as UTF-8, its line ends as they are. Raises DataError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> DataError:
    """The error for a file that the system or the UTF-8 decoder refused."""
    if isinstance(error, UnicodeDecodeError):
        return DataError(f"not UTF-8: {error.reason} at byte {error.start}", where=str(path), remedy="convert it first")
    return DataError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=str(path))
