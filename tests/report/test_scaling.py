"""Cost against length: every arm is really run at every length, alone, once; what does not fit is said so."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dovetail.errors import BuildError, RunError, SpecError
from dovetail.models.build import build
from dovetail.report import scaling as scalings
from dovetail.report.scaling import Scaling, is_scaling, scaling
from dovetail.report.scaling_page import DECODE, FORWARD, STEP, Cell, Measured, Scaled, page
from dovetail.report.study import is_study

RECIPES = Path(__file__).parents[2] / "recipes"
MODEL = {
    "kind": "decoder", "vocab": 16, "dim": 8, "depth": 1,
    "blocks": {"feedforward": None, "mixer": {"kind": "attention", "heads": 1, "position": "none"}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that are begun


def asked(folder: Path, **change: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "model": MODEL,
        "arms": [{"name": "softmax"}, {"name": "linear", "change": {"blocks.mixer.kind": "linear"}, "slope": 1}],
        "at": [16, 32, 64],
        "decode_at": [16, 32],
        "dtype": "float32",
        "device": "cpu",
        "repeat": 3,
        "out": str(folder / "out"),
    } | change


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_measures_once_reports_and_goes_on(apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not apart:  # that a process is begun for every arm is what the test of one that is killed begins with
        monkeypatch.setattr(scalings, "processes", lambda: ThreadPoolExecutor(1))
    printed = {"source": "a paper", "against": "softmax", "values": {"linear": {32: 1.5, 48: 2.0}}}
    data = asked(tmp_path, published=printed, batch_tokens=64)
    recipe, runs = Scaling.load(data), tmp_path / "out" / "runs"
    key = scalings._key(recipe, recipe.arms[0], scalings.machine(scalings.choose("cpu")))
    scalings._measure(recipe, recipe.arms[0], key, runs / "softmax" / "found.json")  # here, as if before
    found = scaling(data, quiet=True)  # the other where it asks for a process of its own
    softmax, linear = found.arms
    for arm in found.arms:
        assert [(c.what, c.length, c.rows, c.why) for c in arm.cells] == [
            (STEP, 16, 4, ""), (STEP, 32, 2, ""), (STEP, 64, 1, ""), (FORWARD, 16, 4, ""), (FORWARD, 32, 2, ""),
            (FORWARD, 64, 1, ""), (DECODE, 16, 1, ""), (DECODE, 32, 1, ""),
        ]  # fmt: skip
        assert all(c.seconds is not None and c.seconds > 0 for c in arm.cells)
    assert [c.bytes for c in softmax.of(DECODE)] == [2 * 8 * 4 * (16 + 1), 2 * 8 * 4 * (32 + 1)]  # a spare slot
    assert len({c.bytes for c in linear.of(DECODE)}) == 1  # which does not grow
    step = {arm.name: arm.at(STEP, 32) for arm in found.arms}
    assert found.speeds() == [["linear", "32", "1.5", f"{step['softmax'].per_row / step['linear'].per_row:.2f}"]]  # type: ignore[union-attr]

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert Scaled.of(report).to_dict() == found.to_dict() == report
    assert {row["metric"] for row in report["rows"]} == {
        "slope of forward",
        "slope of training step",
        "ms/token decoded",
    }
    text = (tmp_path / "out" / "index.html").read_text()
    assert text.count("<svg") == 6 and "a paper" in text and "fused attention" in text
    assert page(Scaled.of(report)) == text

    path = runs / "linear" / "found.json"
    before = json.loads(path.read_text())
    assert before.pop("ended")
    path.write_text(
        json.dumps(before | {"cells": before["cells"][:-1], "trying": [DECODE, 32, 1]})
    )  # as if interrupted
    other = runs / "softmax" / "found.json"
    untouched = other.stat().st_mtime_ns
    scalings._measure(recipe, recipe.arms[1], before["key"], path)
    written = path.stat().st_mtime_ns
    again = scaling(data, quiet=True)
    assert path.stat().st_mtime_ns == written
    assert other.stat().st_mtime_ns == untouched and again.arms[0] == softmax
    assert again.arms[1].cells[:-1] == linear.cells[:-1] and again.arms[1].cells[-1].seconds


def test_a_part_shares_what_it_measured_with_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalings, "processes", lambda: ThreadPoolExecutor(1))
    printed = {"source": "a paper", "against": "softmax", "values": {"linear": {16: 1.5}, "by itself": {16: 2.0}}}
    arms = [*asked(tmp_path)["arms"], {"name": "by itself", "change": {"blocks.mixer.kind": "linear"}}]
    data = asked(tmp_path, arms=arms, published=printed, at=[8, 16], decode_at=[])
    whole = Scaling.load(data)
    part = whole.only(["by itself", "softmax"])
    assert [arm.name for arm in part.arms] == ["softmax", "by itself"], "in the order of the recipe"
    assert part.published is not None and part.published.values == {"by itself": {16: 2.0}}
    assert whole.only(["softmax"]).published is None and whole.only(["linear"]).published is None
    assert whole.only([]) is whole
    with pytest.raises(SpecError, match=r"no arm is called 'lstm'\n.*--only\n.*known: by itself, linear, softmax"):
        scaling(data, only=["lstm"], quiet=True)

    found = scaling(data, only=["by itself", "linear"], quiet=True)
    assert [arm.name for arm in found.arms] == ["linear", "by itself"] and not found.speeds()
    assert found.command == "dovetail compare RECIPE --only linear --only 'by itself'"
    kept = [tmp_path / "out" / "runs" / name / "found.json" for name in ("linear", "by-itself", "softmax")]
    assert not kept[2].exists()
    times = [file.stat().st_mtime_ns for file in kept[:2]]
    every = scaling(data, quiet=True)
    assert every.arms[1:] == found.arms and len(every.speeds()) == 2
    times.append(kept[2].stat().st_mtime_ns)
    assert scaling(data, only=["softmax"], quiet=True).arms == every.arms  # with what is kept
    assert [file.stat().st_mtime_ns for file in kept] == times  # nothing was measured again


def test_what_does_not_fit_is_left_out(tmp_path: Path) -> None:
    # Hashing without chunks compares all with all: 2^44 pairs of 8 bytes are more than a process can address.
    change = {"blocks.mixer": {"kind": "lsh", "heads": 1, "head_dim": 4, "chunk": None, "rounds": 1, "buckets": 2}}
    data = asked(tmp_path, arms=[{"name": "LSH", "change": change}], at=[16, 2**22, 2**23], decode_at=[])
    recipe, path = Scaling.load(data), tmp_path / "found.json"
    scalings._measure(recipe, recipe.arms[0], "key", path)
    found = json.loads(path.read_text())
    assert [(c["what"], c["length"], c["why"]) for c in found["cells"] if c["why"]] == [
        (what, n, why)
        for what in (STEP, FORWARD)
        for n, why in ((2**22, "out of memory"), (2**23, f"left out: at {2**22}, out of memory"))
    ]
    arm = scalings._arm(recipe, recipe.arms[0], path)
    assert len(arm.missing()) == 4 and arm.slope(STEP) is None


def test_whole_rows_do_not_decode_and_time_runs_out(tmp_path: Path) -> None:
    change = {"kind": "encoder", "head": "linear", "blocks.mixer": {"kind": "linformer", "length": 32, "rank": 4}}
    data = asked(tmp_path, arms=[{"name": "Linformer", "change": change}], at=[16, 32])
    recipe, path = Scaling.load(data), tmp_path / "found.json"
    scalings._measure(recipe, recipe.arms[0], "key", path)
    cells = [Cell(**c) for c in json.loads(path.read_text())["cells"]]
    assert [bool(c.why) for c in cells] == [False] * 4 + [True] * 2 and "whole rows" in cells[4].why
    recipe = Scaling.load(data | {"seconds": 1e-9})
    scalings._measure(recipe, recipe.arms[0], "other key", path)
    assert all("the limit of 1e-09 s" in c["why"] for c in json.loads(path.read_text())["cells"])


@pytest.mark.slow
def test_a_killed_process_loses_one_length(tmp_path: Path) -> None:
    data = asked(
        tmp_path, arms=[{"name": "LSTM", "change": {"blocks.mixer": {"kind": "lstm"}}}], at=[16, 6_000], decode_at=[8]
    )
    path = tmp_path / "out" / "runs" / "lstm" / "found.json"

    def kill() -> None:
        for _ in range(6000):
            trying = json.loads(path.read_text()).get("trying") if path.is_file() else None
            if trying == [STEP, 6_000, 1]:
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
                return
            time.sleep(0.005)

    thread = threading.Thread(target=kill)
    thread.start()
    arm = scaling(data, quiet=True).arms[0]
    thread.join()
    assert [(c.what, c.length, "killed" in c.why) for c in arm.cells] == [
        (STEP, 16, False), (STEP, 6_000, True), (FORWARD, 16, False), (FORWARD, 6_000, False), (DECODE, 8, False),
    ]  # fmt: skip


def test_slopes() -> None:
    def arm(power: float, asked: float | None) -> Measured:
        cells = [Cell(STEP, n, 2, 2 * (n / 64) ** power if n > 64 else 9.0) for n in (64, 128, 256, 512)]
        return Measured("a", 1, asked, 2, {}, [*cells, Cell(STEP, 1024, 1, why="out of memory")])

    slope = arm(2.0, None).slope(STEP)
    assert slope is not None and (slope.power, slope.first, slope.last) == (pytest.approx(2.0), 128, 512)
    assert arm(1.09, 1.0).holds(STEP) and arm(1.11, 1.0).holds(STEP) is False and arm(1.0, None).holds(STEP) is None
    assert arm(1.0, 1.0).slope(FORWARD) is None and arm(1.0, 1.0).holds(FORWARD) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arms": [{"name": "a"}, {"name": "a"}]}, "two arms are called 'a'"),
        ({"arms": [{"name": "a b"}, {"name": "a-b"}]}, "differ only in signs"),
        ({"at": [16, 16]}, "give lengths that rise"),
        ({"decode_at": [1, 2]}, "give lengths that rise"),
        ({"batch_tokens": 32}, "hold no row of 64"),
        ({"arms": [{"name": "a", "change": {"blocks.mixer.heds": 2}}]}, "arm 'a'"),
        ({"arms": [{"name": "a", "change": {"blocks.mixer": {"kind": "linaer"}}}]}, "linear"),
        ({"published": {"source": "s", "against": "x", "values": {"linear": {16: 1.0}}}}, "'x', which is no arm"),
        ({"published": {"source": "s", "against": "softmax", "values": {"linear": {17: 1.0}}}}, "no length in at"),
        ({"lengths": [1]}, "lengths"),
        ({"repeat": 1}, "repeat"),
    ],
)
def test_refusals(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Scaling.load(asked(tmp_path, **change))


def test_parts_that_cannot_be_built_are_refused_at_once(tmp_path: Path) -> None:
    arm = {"name": "whole", "change": {"blocks.mixer": {"kind": "linformer", "length": 64}}}
    with pytest.raises(BuildError, match="arm 'whole'"):
        Scaling.load(asked(tmp_path, arms=[arm]))


@pytest.mark.slow
def test_an_arm_that_fails_otherwise_is_named_after_the_others_were_measured(tmp_path: Path) -> None:
    short = {"kind": "encoder", "head": "linear", "blocks.mixer": {"kind": "linformer", "length": 16, "rank": 4}}
    arms = [{"name": "short", "change": short}, {"name": "softmax"}]
    with pytest.raises(RunError, match="1 of 2 arms failed, first 'short': DataError: a row of 32 tokens"):
        scaling(asked(tmp_path, arms=arms, at=[16, 32], decode_at=[]), quiet=True)
    kept = tmp_path / "out" / "runs" / "softmax" / "found.json"
    assert json.loads(kept.read_text())["ended"] and not (tmp_path / "out" / "report.json").exists()


def test_shipped_recipes() -> None:
    names = [path.name for path in sorted(RECIPES.glob("*.yaml")) if is_scaling(path)]
    assert names == ["length.yaml", "length_cpu.yaml"] and not any(is_study(RECIPES / name) for name in names)
    recipe = Scaling.load(RECIPES / "length.yaml")
    width = {arm.name: build(recipe.spec(arm), weights=False).spec.dim for arm in recipe.arms}
    assert set(width.values()) == {1024} and recipe.at[-1] == 131072
    Scaling.load(RECIPES / "length_cpu.yaml")
