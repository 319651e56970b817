"""A column of numbers or times from a file: one a line, or one field of JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import DataError


def read_numbers(path: str | Path, field: str | None = None) -> Tensor:
    """(N,) float64, in the order of the file. field: the name of the number in a line of JSON; none: a line is a
    number.

    Raises DataError, with the line, for what is no finite number, a field that is missing, an empty line or file.
    """
    found = [_number(value, where) for where, value in _values(path, field)]
    return _column(found, path)


def read_arrivals(path: str | Path, field: str | None = None) -> Tensor:
    """Times (N,) of a log of arrivals, in seconds, float64, sorted: a log may be written in the order of completion.

    A time is a number of seconds, or ISO 8601 ("2026-11-22T09:30:00.25Z"; without a zone, UTC), which becomes seconds
    since 1970. The rest is as in `read_numbers`. Raises DataError where the two are mixed, too.
    """
    found, written = [], set()
    for where, value in _values(path, field):
        moment = _moment(value)
        written.add(moment is not None)
        found.append(_number(value, where) if moment is None else moment)
        if len(written) > 1:
            raise DataError("numbers and dates in one column", where=where, remedy="write all times one way")
    return _column(found, path).sort().values


def _values(path: str | Path, field: str | None) -> Iterator[tuple[str, Any]]:
    """(where, what stands there), line by line."""
    file = Path(path)
    if not file.is_file():
        raise DataError(f"no file {str(path)!r}", remedy="give a file of numbers, one a line, or of JSON lines")
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}, line {number}"
                if field is None:
                    yield where, line.strip()
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise DataError(f"not JSON: {error}", where=where, remedy="write one object a line") from None
                if not isinstance(record, dict) or field not in record:
                    raise DataError(f"no field {field!r}", where=where, remedy="name one that every line has")
                yield where, record[field]
    except UnicodeDecodeError:
        raise DataError("not a text in UTF-8", where=str(path), remedy="give a text file") from None


def _number(value: Any, where: str) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
    except (ValueError, OverflowError):
        raise DataError(
            f"{value!r:.80} is no finite number",
            where=where,
            remedy="mend or remove the line; --field names a field of JSON lines",
        ) from None
    return number


def _moment(value: Any) -> float | None:
    """Seconds since 1970 of a date with a time; None for what is none."""
    if not isinstance(value, str) or "-" not in value[1:] or ":" not in value:
        return None
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _column(found: list[float], path: str | Path) -> Tensor:
    if not found:
        raise DataError("nothing in it", where=str(path), remedy="give a file with a number in every line")
    return torch.tensor(found, dtype=torch.float64)
