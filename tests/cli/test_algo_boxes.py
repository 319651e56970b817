"""`dovetail algo boxes` and `dovetail algo masks` as written, and the page that tells of them."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dovetail.geometry as geo
from dovetail.cli.main import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "algorithms" / "boxes.md"


def run(capsys: Any, monkeypatch: Any, *args: Any) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["dovetail", "algo", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0), *capsys.readouterr()


def written(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_page_runs_as_one_session(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    session: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), session)
    commands = re.findall(r"^dovetail algo (.*)$", text, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        code, out, err = run(capsys, monkeypatch, *shlex.split(command))
        assert code == 0 and out, err


def test_boxes(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    corners = [[0.0, 0, 10, 10], [1.0, 1, 11, 11], [50.0, 50, 60, 60]]
    file = written(tmp_path / "boxes", [{"box": box, "score": 0.5 + i / 10} for i, box in enumerate(corners)])
    code, out, _ = run(capsys, monkeypatch, "boxes", file, "--nms", 0.5, "--json")
    found, iou = json.loads(out), geo.box_iou(torch.tensor(corners), torch.tensor(corners))
    assert code == 0 and found["kept"] == [2, 1]
    assert [pair["of"] for pair in found["overlaps"]] == [[0, 1]]
    assert found["overlaps"][0]["iou"] == pytest.approx(float(iou[0, 1]), rel=1e-6)
    centred = geo.convert_boxes(torch.tensor(corners), "xyxy", "cxcywh").tolist()
    again = written(tmp_path / "centred", [{"box": box} for box in centred])
    _, out, _ = run(capsys, monkeypatch, "boxes", again, "--format", "cxcywh", "--json")
    assert json.loads(out)["overlaps"] == found["overlaps"]
    code, out, _ = run(capsys, monkeypatch, "boxes", file, "--nms", 0.5)
    assert code == 0 and "0, 1" in out and "kept at 0.5: 2 of 3: 2, 1" in out


def test_rotated_boxes(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[0, 0, 6, 3, 0.3], [1.5, 0.8, 5, 2.5, 1.2], [0, 0, 6, 3, 0.3]]
    file = written(tmp_path / "b", [{"box": box, "score": 0.9 - i / 10, "class": i // 2} for i, box in enumerate(rows)])
    _, out, _ = run(capsys, monkeypatch, "boxes", file, "--nms", 0.2, "--json")
    found = json.loads(out)
    assert found["rotated"] and found["kept"] == [0, 2]  # the third is of another class
    assert found["overlaps"][0] == {"of": [0, 2], "iou": 1.0}


def test_masks_there_and_back(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = [1.2, 2.1, 8.7, 0.6, 13.3, 4.9, 10.4, 10.2]
    file = written(tmp_path / "polygons", [{"size": [11, 15], "polygons": [ring]}])
    for rule in ("center", "coco"):
        mask = geo.polygons_to_mask([ring], 11, 15, rule=rule)  # pyright: ignore[reportArgumentType]
        _, out, _ = run(capsys, monkeypatch, "masks", file, "--rule", rule, "--to", "rle")
        assert torch.equal(geo.rle_decode(json.loads(out)), mask)
        lengths = tmp_path / "lengths"
        lengths.write_text(2 * out)
        _, out, _ = run(capsys, monkeypatch, "masks", lengths, "--to", "polygons")
        rings = json.loads(out.splitlines()[0])["polygons"]
        assert torch.equal(geo.polygons_to_mask(rings, 11, 15), mask)
        _, out, _ = run(capsys, monkeypatch, "masks", lengths, "--json")
        found = json.loads(out)
        assert found["overlaps"] == [{"of": [1, 0], "iou": 1.0}]
        assert found["masks"][0]["area"] == int(mask.sum()) and found["masks"][0]["rings"] == 1
        assert found["masks"][0]["box"] == geo.mask_to_box(mask).tolist()
    code, out, _ = run(capsys, monkeypatch, "masks", lengths)
    assert code == 0 and "11 x 15" in out and "IoU 1.000000" in out


@pytest.mark.parametrize(
    ("command", "row", "options", "message"),
    [
        ("boxes", {"box": [1, 2, 3]}, [], "4 numbers, or 5"),
        ("boxes", {"box": [3, 0, 1, 1]}, [], "negative size"),
        ("boxes", {"box": [0, 0, 1, 1], "label": 1}, [], "fields box, label"),
        ("boxes", {"box": [0, 0, 1, 1], "score": "high"}, [], "no number"),
        ("boxes", {"box": [0, 0, 1, 1]}, ["--nms", "0.5"], "goes by scores"),
        ("boxes", {"box": [0, 0, 1, 1, 0]}, ["--format", "xywh"], "rotated boxes"),
        ("boxes", {"box": [0, 0, 1, 1]}, ["--format", "xyhw"], "unknown box format"),
        ("boxes", [1], [], "no JSON object"),
        ("masks", {"size": [2, 2]}, [], "fields size"),
        ("masks", {"size": 4, "polygons": []}, [], "no mask"),
        ("masks", {"size": [2, 2], "counts": "04"}, ["--rule", "coco"], "is for polygons"),
        ("masks", {"size": [2, 2], "counts": "4"}, ["--to", "png"], "--to png"),
        ("masks", {"size": [2, 2], "counts": "4"}, ["--to", "rle", "--json"], "already"),
        ("masks", {"size": [2, 2], "counts": "9"}, [], "runs of 9 pixels"),
        ("masks", {"size": [2, 2], "polygons": [[0, 0, 1]]}, ["--rule", "middle"], "unknown rule"),
    ],
)
def test_what_is_refused(
    command: str, row: Any, options: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    code, _, err = run(capsys, monkeypatch, command, written(tmp_path / "file", [row]), *options)
    assert code == 2
    assert message in " ".join(err.split())


@pytest.mark.parametrize(
    "row", [{"box": [0, 0, True, 1]}, {"box": [0, 0, 1, 1], "class": 10**20}, {"box": [0, 0, 1, 1], "score": True}]
)
def test_numbers_that_are_none_are_told_with_their_line(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any]
) -> None:
    file = tmp_path / "boxes"
    file.write_text("\n\n" + json.dumps(row))
    code, _, err = run(capsys, monkeypatch, "boxes", file)
    assert code == 2 and "boxes, line 3" in err
    big = written(file, [{"box": [0, 0, 10**30, 1], "score": 10**30}])
    code, out, err = run(capsys, monkeypatch, "boxes", big, "--nms", 0.5)
    assert code == 0 and "kept at 0.5: 1 of 1" in out, err


@pytest.mark.parametrize(
    ("command", "says"),
    [("boxes", '"box": [x1, y1, x2, y2], "score"'), ("masks", '"polygons": [[x, y, ...]]'), ("ngram", "modified-kneser-ney (")],
)  # fmt: skip
def test_help_shows_what_stands_in_brackets(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, command: str, says: str
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    code, out, _ = run(capsys, monkeypatch, command, "--help")
    assert code == 0 and says in out
