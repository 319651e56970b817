"""`dovetail bench` as written: the list, names, one run, errors for people and their exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.cli.main import main
from dovetail.report import bench, bench_rows

Run = Callable[..., tuple[int, str, str]]
TINY = '''"""Tiny."""
from dovetail.report.bench_rows import row
BENCHMARK = {"threads": 1, "minutes": 0.01}
def check(): assert 1 + 1 == 2
def measure(): return [row("one", "s", 1.0, 2.0, "peer", smaller=True)]
'''


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `dovetail bench ARGS` in this process: (exit code, stdout, stderr)."""

    def call(*args: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dovetail", "bench", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_without_names_it_lists(run: Run) -> None:
    code, out, _ = run("--json")
    told = {b["name"]: b for b in json.loads(out.splitlines()[-1])}
    assert code == 0 and set(told) == set(bench.benchmarks())
    assert told["train_gpu"]["needs"] == ["CUDA", "transformers"]
    assert told["scenes"]["lacks"] == [] and told["scenes"]["writes"] == "scenes.json"
    code, out, _ = run("--list")
    assert code == 0 and all(name in out for name in told) and "can run" in out


def test_a_name_that_is_none(run: Run) -> None:
    code, _, err = run("train")
    assert code == 2 and "did you mean" in err and "train_cpu" in err and "train_gpu" in err and "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can run here")
def test_one_that_cannot_run_here(run: Run) -> None:
    code, _, err = run("scenes", "train_gpu")
    assert code == 2 and "train_gpu cannot run here: no CUDA device" in err and "NVIDIA GPU" in err


def test_options_that_would_be_ignored(run: Run, tmp_path: Path) -> None:
    assert run("--list", "scenes")[0] == 2
    assert run("--out", tmp_path)[0] == 2


def test_one_is_run_and_several_are_run_apart(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "cli_tiny.py").write_text(TINY)
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "bench")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(bench_rows.PRODUCTS, "cpu", 256)
    code, out, _ = run("cli_tiny", "--out", tmp_path, "--json")
    (result,) = json.loads(out.splitlines()[-1])
    assert code == 0 and result == json.loads((tmp_path / "cli_tiny.json").read_text())
    (tmp_path / "bench" / "cli_wrong.py").write_text(TINY.replace("== 2", "== 3"))
    code, _, err = run("cli_wrong", "--out", tmp_path)
    assert code == 1 and "ours and the peer's results differ" in err
