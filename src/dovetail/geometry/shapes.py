"""Points, lines and polygons from text: WKT, GeoJSON, or columns of numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dovetail.errors import DataError
from dovetail.geometry.batch import check_range

Kind = Literal["points", "line", "polygon"]
_KINDS: dict[str, Kind] = {
    "point": "points", "points": "points", "multipoint": "points",
    "line": "line", "linestring": "line", "polygon": "polygon",
}  # fmt: skip
_LEAST = {"points": 1, "line": 2, "polygon": 3}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_BARE = re.compile(rf"\s*({_NUMBER})(?:\s+|\s*,\s*)({_NUMBER})\s*")
_REMEDY = (
    "write POLYGON ((0 0, 1 0, 0 1)), MULTIPOINT (0 0, 1 1), LINESTRING (0 0, 1 1), a line each; GeoJSON of these; "
    '{"polygon": [[0, 0], [1, 0], [0, 1]]}; or two numbers a line, which are points'
)


class Shape(NamedTuple):
    """A set of points, an open line or a polygon, whose last vertex does not repeat the first: points (N, 2) float64."""

    kind: Kind
    points: Tensor


def read_shapes(path: Path) -> list[Shape]:
    """The shapes of a UTF-8 file: JSON where it begins with a bracket, else lines of text (see `parse_shapes`).

    Raises DataError for a file that cannot be read, and whatever `parse_shapes` does not know.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", remedy="give a text file of shapes") from None
    return parse_shapes(text, where=str(path))


def parse_shapes(text: str, where: str = "shapes") -> list[Shape]:
    """Shapes in the order of the text; bare pairs of numbers, one a line, are together one set of points.

    Polygons have one ring; that it is closed may be said or not. Raises DataError, with the line, for anything else.
    Source: OGC 06-103r4 (well-known text), RFC 7946 (GeoJSON).
    """
    if text.lstrip()[:1] in ("[", "{"):
        try:
            shapes = _from_json(json.loads(text), where)
        except json.JSONDecodeError as error:
            raise DataError(f"not JSON: {error}", where=where, remedy=_REMEDY) from None
    else:
        shapes, bare = [], []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            if pair := _BARE.fullmatch(line):
                bare.append([float(pair[1]), float(pair[2])])
            else:
                shapes.append(_from_wkt(line, f"{where}, line {number}"))
        if bare:
            shapes.append(_shape("points", bare, where))
    if not shapes:
        raise DataError("no shape", where=where, remedy=_REMEDY)
    return shapes


def _from_wkt(line: str, where: str) -> Shape:
    found = re.fullmatch(r"\s*([A-Za-z]+)\s*\((.*)\)\s*;?\s*", line)
    kind = _KINDS.get(found[1].lower()) if found else None
    if found is None or kind is None:
        raise DataError(f"not a shape: {line.strip()[:60]!r}", where=where, remedy=_REMEDY)
    inside = found[2].strip()
    if kind == "polygon":
        inside = inside.removeprefix("(").removesuffix(")")
    elif kind == "points":
        inside = re.sub(r"\(([^()]*)\)", r"\1", inside)
    if "(" in inside:
        raise DataError(
            "a polygon of several rings", where=where, remedy="give one ring; take holes off the area by hand"
        )
    pairs = [part.split() for part in inside.split(",")]
    if any(len(pair) != 2 or not all(re.fullmatch(_NUMBER, n) for n in pair) for pair in pairs):
        raise DataError(f"not pairs of numbers: {inside[:60]!r}", where=where, remedy=_REMEDY)
    return _shape(kind, [[float(x), float(y)] for x, y in pairs], where)


def _from_json(data: Any, where: str) -> list[Shape]:
    if isinstance(data, list) and data and all(isinstance(item, dict) for item in data):
        return [shape for i, item in enumerate(data) for shape in _from_json(item, f"{where}, item {i}")]
    if isinstance(data, list):
        return [_shape("points", data, where)]
    if data.get("type") == "FeatureCollection":
        return [s for i, item in enumerate(data.get("features", [])) for s in _from_json(item, f"{where}, feature {i}")]
    if data.get("type") == "Feature":
        data = data.get("geometry") or {}
    if "type" in data:
        kind, points = str(data["type"]), data.get("coordinates")
        if kind.lower() == "polygon" and isinstance(points, list):
            if len(points) != 1:
                raise DataError(f"a polygon of {len(points)} rings", where=where, remedy="give one ring")
            points = points[0]
        points = [points] if kind.lower() == "point" else points
    elif len(data) == 1:
        kind, points = next(iter(data.items()))
    else:
        raise DataError(f"an object with the keys {sorted(data)}", where=where, remedy=_REMEDY)
    if kind.lower() not in _KINDS:
        raise DataError(f"a shape of kind {kind!r}", where=where, remedy=_REMEDY)
    return [_shape(_KINDS[kind.lower()], points, where)]


def _shape(kind: Kind, points: Any, where: str) -> Shape:
    def number(x: Any) -> bool:
        return isinstance(x, int | float) and not isinstance(x, bool)

    pairs = isinstance(points, list) and all(
        isinstance(p, list) and len(p) == 2 and all(number(x) for x in p) for p in points
    )
    if not pairs:
        raise DataError(f"the {kind} are not pairs of numbers", where=where, remedy=_REMEDY)
    if kind == "polygon" and len(points) > 1 and points[0] == points[-1]:
        points = points[:-1]
    if len(points) < _LEAST[kind]:
        raise DataError(f"{len(points)} points; a {kind} has {_LEAST[kind]} or more", where=where)
    found = torch.tensor(points, dtype=torch.float64)
    check_range(found, where)
    return Shape(kind, found)
