"""The interface of `datasets`, and rows as files."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dovetail.cli.main import main
from dovetail.data import Clips, Scenes, Windows
from dovetail.data.scenes import write_rows
from dovetail.errors import DataError
from dovetail.geometry import rle_decode

ROOT = Path(__file__).parents[2]
TABLES = [Scenes, Windows, Clips]


@pytest.mark.parametrize("kind", TABLES)
def test_rows_are_mappings_of_their_features(kind: Any) -> None:
    table = kind(count=4)
    assert list(table.features) == table.column_names == list(table[0]) and table.num_rows == len(table) == 4
    for row in table:
        for name, feature in table.features.items():
            value = row[name]
            assert value is getattr(row, name) or np.array_equal(value, getattr(row, name))
            if isinstance(value, np.ndarray):
                assert value.dtype == feature.dtype and len(value.shape) == len(feature.shape)
                assert all(n in (None, m) for n, m in zip(feature.shape, value.shape))
                assert not feature.names or value.max(initial=0) < len(feature.names)
            elif isinstance(feature.dtype, dict):
                assert all(set(feature.dtype) == set(vars(item)) for item in value)
    with pytest.raises(KeyError):
        table[0]["nothing"]


def test_a_table_reads_as_a_dataset() -> None:
    table = Scenes(count=6)
    assert table["caption"] == [row.caption for row in table]
    assert table[1:3]["caption"] == table["caption"][1:3] and set(table[1:3]) == set(table.column_names)
    chosen = table.select([4, 0]).select([1])
    assert len(chosen) == 1 and chosen[0].caption == table[0].caption
    assert len(Scenes()) == 10_000 and len(Scenes(split="test")) == 1_000
    with pytest.raises(IndexError, match="row 6 of 6"):
        table[6]
    with pytest.raises(IndexError):
        table.select([6])
    with pytest.raises(DataError, match="captoin"):
        table["captoin"]


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_becomes_a_dataset(kind: Any, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    table = kind(count=2)
    found = table.to_hf(cache_dir=str(tmp_path)).with_format("numpy")
    assert found.column_names == table.column_names and len(found) == 2
    picture = "frames" if kind is Clips else "image"
    for ours, theirs in zip(table, found, strict=True):
        np.testing.assert_array_equal(theirs[picture], ours[picture])
        boxes = (
            np.stack([np.stack(list(b)) for b in theirs["boxes"]])
            if theirs["boxes"].dtype == object
            else theirs["boxes"]
        )
        np.testing.assert_array_equal(boxes, ours["boxes"])
    plain = table.to_hf(["caption" if kind is not Windows else "instruction"], cache_dir=str(tmp_path))
    assert plain[1] == {plain.column_names[0]: table[1][plain.column_names[0]]}
    with pytest.raises(DataError, match="nothing"):
        table.to_hf(["nothing"])


def test_scenes_as_files(tmp_path: Path) -> None:
    table, counts = Scenes(count=3, language="zh"), []
    write_rows(table, tmp_path / "out", counts.append)
    assert counts == [1, 2, 3]
    lines = (tmp_path / "out" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    for row, line in zip(table, lines, strict=True):
        said = json.loads(line)
        np.testing.assert_array_equal(
            np.array(Image.open(tmp_path / "out" / said["file"])), row.image.transpose(1, 2, 0)
        )
        np.testing.assert_array_equal(rle_decode(said["masks"]).numpy(), row.masks)
        assert said["caption"] == row.caption and said["boxes"] == row.boxes.tolist()
        assert said["polygons"] == [p.tolist() for p in row.polygons]
        assert said["phrases"][0] == {"text": row.phrases[0].text, "object": row.phrases[0].object}
    features = json.loads((tmp_path / "out" / "features.json").read_text(encoding="utf-8"))
    assert features["labels"]["names"][0] == "large triangle"
    with pytest.raises(DataError, match="something already"):
        write_rows(table, tmp_path / "out")


def test_windows_and_clips_as_files(tmp_path: Path) -> None:
    write_rows(Windows(count=1), tmp_path / "windows")
    said = json.loads((tmp_path / "windows" / "rows.jsonl").read_text(encoding="utf-8"))
    assert (
        said["instruction"] == Windows(count=1)[0].instruction and said["point"] == Windows(count=1)[0].point.tolist()
    )
    table = Clips(count=1)
    write_rows(table, tmp_path / "clips")
    said = json.loads((tmp_path / "clips" / "rows.jsonl").read_text(encoding="utf-8"))
    masks = np.stack([rle_decode(frame).numpy() for frame in said["masks"]])
    np.testing.assert_array_equal(masks, table[0].masks)
    picture = np.array(Image.open(tmp_path / "clips" / said["file"])).reshape(32, 64, 64, 3)
    np.testing.assert_array_equal(picture.transpose(0, 3, 1, 2), table[0].frames)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["dovetail", "data", "scenes", *args])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0), "".join(capsys.readouterr())
        return 0, "".join(capsys.readouterr())

    code, said = run("--out", str(tmp_path / "a"), "--count", "2", "--of", "windows", "--language", "zh", "--json")
    assert code == 0 and json.loads(said.splitlines()[-1])["rows"] == 2
    lines = (tmp_path / "a" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["instruction"] for line in lines] == Windows(count=2, language="zh")["instruction"]
    assert run("--out", str(tmp_path / "a"), "--count", "2")[0] == 2
    code, said = run("--out", str(tmp_path / "b"), "--of", "scene")
    assert code == 2 and "scenes" in said and not (tmp_path / "b").exists()


def test_the_python_of_the_page_runs() -> None:
    text = (ROOT / "docs" / "scenes.md").read_text(encoding="utf-8")
    session: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/scenes.md", "exec"), session)
