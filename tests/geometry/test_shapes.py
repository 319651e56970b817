"""Shapes from text, and `dovetail algo geometry` as written."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import shapely

from dovetail.cli.main import main
from dovetail.errors import DataError
from dovetail.geometry import parse_shapes

TRIANGLE = [[0.0, 0.0], [2.0, 0.0], [0.0, 1.5]]


def run(capsys: Any, monkeypatch: Any, *args: Any) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["dovetail", "algo", "geometry", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0), *capsys.readouterr()


def test_one_triangle_in_every_way_of_writing_it() -> None:
    ring = shapely.Polygon(TRIANGLE)
    geojson = json.loads(shapely.to_geojson(ring))
    texts = [
        ring.wkt, "polygon((0 0, 2 0, 0 1.5))", json.dumps({"polygon": TRIANGLE}), json.dumps(geojson),
        json.dumps({"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": geojson}]}),
    ]  # fmt: skip
    for text in texts:
        (shape,) = parse_shapes(text)
        assert shape.kind == "polygon" and shape.points.tolist() == TRIANGLE
    for text in (
        "0 0\n2, 0 # no\n".replace(" # no", "") + "\n# a note\n0 1.5",
        "MULTIPOINT ((0 0), (2 0), (0 1.5))",
        json.dumps(TRIANGLE),
    ):
        (shape,) = parse_shapes(text)
        assert shape.kind == "points" and shape.points.tolist() == TRIANGLE


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", "CIRCLE (0 0, 1 1)", "POLYGON ((0 0, 1 1))", "POLYGON ((0 0, 1 0, 0 1), (0 0, 1 0, 0 1))",
        "LINESTRING (0 0)", "1 2 3", "POINT (nan 1)", '{"polygon": [[0, 0], [1, 0], [0, true]]}', '{"a": 1, "b": 2}',
        '{"type": "Polygon", "coordinates": [[[0,0],[1,0],[0,1]], [[0,0],[1,0],[0,1]]]}', "[[1e300, 0]]",
    ],
)  # fmt: skip
def test_what_is_no_shape_is_an_error_that_says_where(text: str) -> None:
    with pytest.raises(DataError):
        parse_shapes(text, where="here")


def test_measures_and_pictures(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    file = tmp_path / "shapes"
    file.write_text("POLYGON ((0 0, 4 0, 4 3, 2 1, 0 3))\nPOLYGON ((-1 2, 5 2, 5 4, -1 4))\n0 0\n3 4\n0 1\n")
    for kind, start in (("svg", b"<?xml"), ("png", b"\x89PNG")):
        picture = tmp_path / "made" / f"all.{kind}"
        code, out, _ = run(capsys, monkeypatch, file, "--tolerance", 1.5, "--draw", picture, "--json")
        assert code == 0 and picture.read_bytes().startswith(start)
        found = json.loads(out.splitlines()[-1])
    first, second, points = found["shapes"]
    assert (first["area"], first["hull_area"], second["area"]) == (8, 12, 12)
    assert first["diameter"] == 5 and first["width"] == 3 and first["circle"]["radius"] == 2.5
    assert points["closest_pair"] == {"points": [0, 2], "distance": 1}
    assert [meet["of"] for meet in found["intersections"]] == [[0, 1]]
    assert math.isclose(found["intersections"][0]["area"], 1.0)
    code, out, _ = run(capsys, monkeypatch, file)
    assert code == 0 and "0 and 1 share 1 in 2 piece(s)" in out and "counter-clockwise" in out


def test_errors_for_people(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    file = tmp_path / "points"
    file.write_text("0 0\n1 1\n")
    for args, said in (
        ((file, "--tolerance", 1), "only points"), ((file, "--draw", "x.gif"), ".svg or .png"),
        ((tmp_path / "none",), "cannot be read"),
    ):  # fmt: skip
        code, _, error = run(capsys, monkeypatch, *args)
        assert code == 2 and said in error
