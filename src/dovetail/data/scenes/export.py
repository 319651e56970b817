"""Rows as files: lossless pictures, and one line of JSON a row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dovetail.data.scenes.table import Row, Table
from dovetail.errors import DataError
from dovetail.geometry import rle_encode

_PICTURES = ("image", "frames")


def write_rows(table: Table[Any], out: Path, done: Callable[[int], None] = lambda count: None) -> None:
    """OUT/images/000000.png ..., OUT/rows.jsonl and OUT/features.json, into a folder that is new or empty.

    The frames of a clip stand one below the other. A line has "file" and every column but the picture: arrays as lists, masks
    as COCO's compressed run lengths, nested as the masks are. done(count) is called after each row. Raises DataError
    for a folder with something in it, or one that cannot be written.
    """
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError("there is something already", where=str(out), remedy="give a new folder")
        (out / "images").mkdir(parents=True)
        features = {name: asdict(feature) for name, feature in table.features.items()}
        (out / "features.json").write_text(json.dumps(features, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        with (out / "rows.jsonl").open("w", encoding="utf-8") as lines:
            for at, row in enumerate(table):
                file = f"images/{at:06d}.png"
                _save(row, out / file)
                record = {"file": file} | {name: plain(row[name]) for name in row if name not in _PICTURES}
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
                done(at + 1)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", where=str(out)) from None


def plain(value: Any) -> Any:
    """A column's value in the terms of JSON; see `write_rows`."""
    if isinstance(value, np.ndarray):
        if value.dtype == bool and value.ndim > 2:
            return _runs(value)
        return value.tolist()
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _runs(masks: np.ndarray) -> Any:
    if masks.ndim > 3:
        return [_runs(each) for each in masks]
    encoded: Any = rle_encode(torch.from_numpy(masks))
    return [{"size": one["size"], "counts": one["counts"].decode()} for one in encoded]


def _save(row: Row, file: Path) -> None:
    if "image" in row:
        picture = row["image"].transpose(1, 2, 0)
    else:
        picture = row["frames"].transpose(0, 2, 3, 1).reshape(-1, row["frames"].shape[-1], 3)
    Image.fromarray(np.ascontiguousarray(picture)).save(file)
