"""`dovetail algo arrivals` and `dovetail algo extrema` as written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.cli.main import main
from dovetail.stats import Piecewise, PoissonProcess, largest_gap, sliding_max


def run(capsys: Any, monkeypatch: Any, *args: Any) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["dovetail", "algo", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0), *capsys.readouterr()


def test_what_is_drawn_is_read_again_and_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    code, out, _ = run(capsys, monkeypatch, "arrivals", "--rate", 20, "--duration", 30, "--seed", 3)
    want = PoissonProcess(20.0).arrivals(30, 3)
    assert code == 0
    assert [float(line) for line in out.splitlines()] == want.tolist()
    log.write_text(out)
    code, out, _ = run(capsys, monkeypatch, "arrivals", log, "--duration", 30, "--json")
    found = json.loads(out)
    fit = PoissonProcess.fit(want, 30)
    assert (found["rate"], found["low"], found["high"]) == tuple(float(v) for v in (fit.rates, fit.low, fit.high))
    assert found["low"] < 20 < found["high"]
    assert min(test["p"] for test in found["tests"].values()) > 1e-3
    code, out, _ = run(capsys, monkeypatch, "arrivals", log)
    assert code == 0
    assert f"{len(want):,} arrivals" in out
    for word in ("index of dispersion", "counts are Poisson", "times are uniform"):
        assert word in out


def test_a_rate_in_pieces_and_a_log_of_json_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = run(capsys, monkeypatch, "arrivals", "--rate", "0:5,10:50", "--duration", 20, "--json")
    times = json.loads(out)["arrivals"]
    assert times == PoissonProcess(Piecewise((0, 10, 20), (5.0, 50.0))).arrivals(20, 0).tolist()
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"at": 1.7e9 + t}) + "\n" for t in times))
    _, out, _ = run(capsys, monkeypatch, "arrivals", log, "--field", "at", "--json")
    found = json.loads(out)
    assert found["tests"]["times are uniform"]["p"] < 1e-6
    assert found["index of dispersion"] > 1.5
    log.write_text('{"at": 1}\n{"at": 2}\n')
    _, out, _ = run(capsys, monkeypatch, "arrivals", log, "--field", "at", "--json")
    assert all("why" in test for test in json.loads(out)["tests"].values())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "neither a log nor a rate"),
        (("--rate", "5"), "duration"),
        (("--rate", "fast", "--duration", "5"), "is no rate"),
        (("--rate", "3:5", "--duration", "5"), "begins at 3"),
        (("--rate", "0:5,9:1", "--duration", "5"), "rising edges"),
        (("--rate", "5", "--duration", "5", "--bins", "3"), "--bins"),
        (("--rate", "5", "--duration", "5", "--confidence", "0.9"), "--confidence"),
        (("any.log", "--seed", "3"), "--seed"),
        (("none.txt",), "no file"),
    ],
)
def test_arrivals_says_what_is_wrong(
    args: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(capsys, monkeypatch, "arrivals", *args)
    assert code == 2
    assert said in err


def test_extrema_of_a_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = 0.1 * torch.rand(60, dtype=torch.float64)
    x[[9, 30, 31, 55]] += torch.tensor([0.8, 0.7, 0.9, 0.75], dtype=torch.float64)
    column = tmp_path / "scores.txt"
    column.write_text("".join(f"{v!r}\n" for v in x.tolist()))
    code, out, _ = run(capsys, monkeypatch, "extrema", column, "--json")
    found = json.loads(out)
    assert code == 0
    assert [peak["place"] for peak in found["peaks"]] == [9, 31, 55]
    assert found["threshold"] == float(largest_gap(x).threshold)
    assert found["max"] == sliding_max(x, 5, align="centred").tolist()
    _, out, _ = run(capsys, monkeypatch, "extrema", column, "--window", 1, "--threshold", 0.8)
    assert "4 of 60 numbers above" in out
    assert [line.split()[0] for line in out.splitlines()[-2:]] == [str(p) for p in (9, 31)]
    column.write_text("1\n")
    for args, said in ((("--window", "4"), "middle"), (("--threshold", "nan"), "--threshold"), ((), "--threshold")):
        code, _, err = run(capsys, monkeypatch, "extrema", column, *(("--threshold", "0", *args) if args else ()))
        assert code == 2
        assert said in err


def test_one_span_of_arrivals_has_no_dispersion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    log.write_text("0.5\n1.5\n2\n7\n9\n")
    code, out, _ = run(capsys, monkeypatch, "arrivals", log, "--bins", 1, "--json")
    assert code == 0 and json.loads(out)["index of dispersion"] is None
    assert "nan" not in run(capsys, monkeypatch, "arrivals", log, "--bins", 1)[1]
