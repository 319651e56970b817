"""The table of which kernel serves what: nothing registered is missing, and it says what `show --plan` says."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import dovetail as dt
from dovetail.cli.main import main


@pytest.fixture
def docs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "docs"))
    return importlib.import_module("served")


def test_every_mixer_is_served_and_every_position_and_mask_has_an_example(docs: Any) -> None:
    for kind in dt.registry("mixer"):
        found = docs.served(kind, None, None)
        assert found.plans is not None, kind
        assert {device for device, _ in found.plans} == {"cuda", "cpu"}
    assert set(docs.LEFT_OUT) <= set(dt.registry("mask"))
    for category in ("position", "mask"):
        for kind in dt.registry(category):
            if kind not in docs.LEFT_OUT:
                assert docs.example(category, kind)["kind"] == kind


def test_a_cell_says_what_show_says(
    docs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = docs.served("attention", "shaw", "window")
    mixer = {"kind": "attention", "position": {"kind": "shaw"}, "mask": {"kind": "window", "size": 512}}
    model = {"kind": "decoder", "vocab": 256, "dim": 256, "depth": 1, "context": 4096, "blocks": {"mixer": mixer}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))
    for device, plans in told.plans:
        monkeypatch.setattr(sys, "argv", ["dovetail", "show", str(tmp_path / "model.yaml"), "--plan", "--json"])
        sys.argv += ["--device", device]
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        shown = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
        shown = [p for p in shown if p["layers"].endswith("mixer")]
        assert [(p["use"], p["path"], p["reference"]) for p in shown] == [
            (use, plan.path, plan.falls_back(device)) for use, plan in plans
        ]
        assert all(p["reference"] for p in shown)  # plain torch on either: value terms need the probabilities
    assert told.cell({}) == "cuda: **tiled** [1](#why-1)<br>cpu: **tiled** [1](#why-1)"


def test_gates_are_served_by_activation(docs: Any) -> None:
    pytest.importorskip("triton")
    rows = {name: cells[0].cell({}) for name, cells, _ in docs.gates().rows}
    assert sum(len(names.split(", ")) for names in rows) == len(dt.registry("activation")) and len(rows) == 2
    known, others = sorted(rows, key=lambda names: "silu" not in names.split(", "))
    assert rows[known] == "cuda: triton [1](#why-1)<br>cpu: plain [2](#why-2)"
    assert "swish" in others and rows[others] == "cuda: **plain** [1](#why-1)<br>cpu: plain [2](#why-2)"


def test_what_is_served_alike_shares_a_row(docs: Any) -> None:
    pytest.importorskip("triton")
    table = docs.others(["gla", "lstm", "linear"])
    assert [name for name, *_ in table.rows] == ["gla", "lstm", "linear"]
    (gla, lstm, _), whys = table.rows, {}
    assert gla[2] == ("training, prefill / decoding",) and lstm[2] == ("no choice to make",)
    assert gla[1][0].cell(whys) == (
        "cuda: triton [1](#why-1) / step [2](#why-2)<br>cpu: chunked [3](#why-3) / step [2](#why-2)"
    )
    assert ("step", "one token: one update of the state") in whys
