"""Benchmarks: what a module states, what a run checks, writes and refuses, and the page of what was measured."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.errors import DataError, RunError, UserError
from dovetail.report import bench, bench_rows
from dovetail.report.bench_rows import interleaved, measure_ceilings, replayed, row

Made = Callable[..., bench.Benchmark]
GOOD = """
\"\"\"Sums beside sums,
of ones.

More is said below.\"\"\"

import torch

from dovetail.report.bench_rows import row

BENCHMARK = {"threads": 1, "packages": {"numpy": "numpy"}, "minutes": 0.01}
done = []


def check():
    done.append("check")


def measure():
    assert done == ["check"]
    yield row("ones", "sums/s", 3.0, 2.0, "the other", target_ratio=1.4)
    yield row("twos", "s", 3.0, 2.0, "the other", smaller=True, target=2.5)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(bench_rows.PRODUCTS, "cpu", 256)
    (tmp_path / "bench").mkdir()
    return tmp_path / "bench"


@pytest.fixture
def made(folder: Path) -> Made:
    """A benchmark from its text, in a folder of its own."""

    def write(name: str, text: str) -> bench.Benchmark:
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        return bench.benchmarks(folder)[name]

    return write


def test_a_module_is_read_and_not_run(made: Made, folder: Path) -> None:
    (folder / "tool.py").write_text("raise SystemExit('run')")
    quick = made("quick_sums", "import nothing_of_this_name\n" + GOOD.replace('"minutes": 0.01', '"minutes": 0.001'))
    good = made("bench_sums", GOOD)
    assert list(bench.benchmarks(folder)) == ["quick_sums", "bench_sums"]  # quick ones first, tools left out
    assert (good.about, good.minutes, good.threads, good.file) == (
        "Sums beside sums, of ones.",
        0.01,
        1,
        "bench_sums.json",
    )
    assert quick.command == "dovetail bench quick_sums" and not good.lacks()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"minutes": 0.01', '"minutes": open', "no literal"),
        ('"minutes": 0.01', '"minute": 0.01', "did you mean 'minutes'?"),
        (', "minutes": 0.01', "", '"minutes"'),
        ('"threads": 1', '"device": "tpu"', '"device"'),
        ("def check", "def chick", "check"),
    ],
)
def test_a_statement_out_of_form(made: Made, old: str, new: str, said: str) -> None:
    with pytest.raises(DataError, match=said.replace("?", "[?]")):
        made("out_of_form", GOOD.replace(old, new))


def test_what_is_missing_is_told_with_what_to_do(tmp_path: Path) -> None:
    needs = bench.Benchmark("x", "", 1, packages={"no_such_peer": "no-such-peer", "json": "json"}, data=("a", "b"))
    (tmp_path / "b").write_text("")
    (package, install), (data, _) = needs.lacks(tmp_path)
    assert (package, install) == ("no no-such-peer", "pip install no-such-peer") and data.endswith(str(tmp_path / "a"))
    with pytest.raises(UserError, match=r"x cannot run here: no no-such-peer(.|\n)*pip install no-such-peer"):
        bench.chosen(["x"], {"x": needs})
    if not torch.cuda.is_available():
        assert [what for what, _ in bench.Benchmark("x", "", 1, device="cuda").lacks()] == ["no CUDA device"]


def test_an_installed_package_has_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not part of the installed package(.|\n)*make setup"):
        bench.benchmarks(tmp_path / "bench")


def test_names(made: Made, folder: Path) -> None:
    made("sums_cpu", GOOD), made("sums_gpu", GOOD.replace('{"numpy": "numpy"}', '{"no_such_peer": "peer"}'))
    known = bench.benchmarks(folder)
    assert [b.name for b in bench.chosen(["sums_cpu", "sums_cpu"], known)] == ["sums_cpu"]
    assert [b.name for b in bench.chosen(["all"], known)] == ["sums_cpu"]
    for word in ("sums", "sumscpu", "sums_cup"):
        with pytest.raises(UserError, match="did you mean 'sums_cpu'"):
            bench.chosen([word], known)
    with pytest.raises(UserError, match="known: sums_cpu, sums_gpu, all"):
        bench.chosen(["zzzzz"], known)


def test_a_run_checks_then_writes(made: Made, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    found = bench.run(made("run_sums", GOOD), out, folder)
    assert found == json.loads((out / "run_sums.json").read_text()) and not list(out.glob("*.partial"))
    assert (found["name"], found["command"]) == ("run_sums", "dovetail bench run_sums")
    assert found["device"].startswith("CPU, 1 threads") and {"torch", "numpy"} <= set(found["versions"])
    assert all(value > 0 for value in found["ceilings"].values()) and len(found["ceilings"]) == 3
    assert [(r["ratio"], r["met"]) for r in found["rows"]] == [(1.5, True), (0.667, False)]
    told = capsys.readouterr().out
    assert told.index("ceilings:") < told.index("check:") < told.index("sums/s") < told.index("target not met")


def test_a_check_that_fails_measures_nothing(made: Made, folder: Path, tmp_path: Path) -> None:
    failing = made("fails_first", GOOD.replace('done.append("check")', "assert 1 == 2, 'one is not two'"))
    with pytest.raises(RunError, match="differ: one is not two"):
        bench.run(failing, tmp_path, folder)
    with pytest.raises(RunError, match="measured nothing"):
        bench.run(made("is_empty", GOOD[: GOOD.index("    assert")] + "    return []\n"), tmp_path, folder)
    assert not list(tmp_path.glob("*.json*"))


def test_part_of_a_result_does_not_stand_for_the_whole(made: Made, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "stops.json").write_text("the last whole one")
    stops = GOOD.replace('    yield row("twos"', "    assert not done, 'too slow'\n    yield row(\"twos\"")
    with pytest.raises(RunError, match="measuring failed: too slow"):
        bench.run(made("stops", stops), tmp_path, folder)
    assert (tmp_path / "stops.json").read_text() == "the last whole one"
    assert [r["case"] for r in json.loads((tmp_path / "stops.json.partial").read_text())["rows"]] == ["ones"]


@pytest.mark.slow
def test_one_that_fails_apart_is_none(tmp_path: Path) -> None:
    assert bench.run_apart(bench.Benchmark("no_such_name", "", 1), tmp_path) is None


def test_targets_of_either_sort() -> None:
    assert "met" not in row("a", "s", 1.0, 2.0, "peer")
    both = row("a", "s", 1.0, 2.0, "peer", smaller=True, target=1.0, target_ratio=2.0, cases=3)
    assert both["met"] and both["cases"] == 3 and both["target"] == 1.0
    assert not row("a", "s", 1.0, 2.0, "peer", smaller=True, target=1.0, target_ratio=2.1)["met"]
    assert not row("a", "s", 1.0, 2.0, "peer", smaller=True, target=0.9, target_ratio=2.0)["met"]
    for ours, met in ((0.8, False), (0.9, True), (1.1, True), (1.2, False)):
        assert row("a", "s", ours, 1.0, "average", smaller=True, target_within=0.15)["met"] == met
    assert not row("a", "s", 1.0, 1.0, "average", smaller=True, target=0.9, target_within=0.15)["met"]


def test_cases_take_turns_and_products_are_counted() -> None:
    order: list[str] = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1)
    assert order == ["a", "b"] * 3 and set(times) == {"a", "b"}
    found = measure_ceilings("cpu", 256, 2, copied=2**16)
    x = torch.randn(256, 256)
    seconds = min(interleaved({str(i): lambda: x @ x for i in range(9)}, rounds=3)[str(i)][0] for i in range(9))
    assert found.fp32_matmul_tflops == pytest.approx(2 * 256**3 / seconds / 1e12, rel=0.9)  # the scale, on any machine
    assert found.copy_tbs > 0


def test_what_is_replayed_is_all_queued_where_one_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    cases = {name: lambda name=name: order.append(name) for name in "ab"}
    if not torch.cuda.is_available():
        for run in replayed(cases, 2).values():
            run()
        assert order == ["a", "a", "b", "b"]

    def refuses(run: Callable[[], Any]) -> Callable[[], Any]:
        run()
        if order[-1] == "b":
            raise RuntimeError("no graph\nof this")
        return lambda: order.append("graph")

    monkeypatch.setattr(bench_rows, "captured", refuses)
    kept = replayed(cases, 2)
    order.clear()
    for run in kept.values():
        run()
    assert order == ["a", "a", "b", "b"]


def test_every_script_of_the_folder_is_a_benchmark_or_a_known_tool() -> None:
    known = bench.benchmarks()
    tools = {file.stem for file in bench.FOLDER.glob("*.py")} - set(known)
    sweeps = {"adapter_sweep", "attention_sweep", "decode_attention_sweep"}
    assert tools == sweeps | {"common", "tuning", "bundle", "compiles", "descriptors", "races", "races_cases"}
    assert all(b.about.endswith(".") and b.minutes > 0 for b in known.values())


def test_the_page_shows_targets_ceilings_and_what_is_not_measured(
    made: Made, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs"))
    page: Any = importlib.import_module("measured").results_page
    data = {
        "name": "paged", "date": "2026-01-01", "device": "NVIDIA H200", "versions": {"torch": "2.11"},
        "command": "dovetail bench paged",
        "ceilings": {"bf16_matmul_tflops": 737.0, "fp32_matmul_tflops": 52.0, "copy_tbs": 4.2},
        "rows": [
            row("one", "tokens/s", 200.0, 100.0, "peer", target=225) | {"floor": 280.0},
            row("two", "ms", 1.0, 2.0, "peer", smaller=True, target_ratio=1.8),
            row("three", "ns", 1.2, 1.0, "average", smaller=True, target_within=0.15),
            row("four", "ns", 0.8, 1.0, "average", smaller=True, met=False),  # as bench/sparse.py once wrote
        ],
    }  # fmt: skip
    (tmp_path / "paged.json").write_text(json.dumps(data))
    made("paged", GOOD), made("unmeasured", GOOD)
    text = page([tmp_path / "paged.json"], bench.benchmarks(folder).values())
    assert "1 of 4 are met." in text
    assert "| [paged](#paged) | one | 225 tokens/s | best reached: 200 |" in text
    assert "| [paged](#paged) | two | 1.8x the peer | met |" in text
    assert "| three | within 15% of the peer (average) | best reached: +20.0% |" in text
    assert "| four | as near the peer (average) as its benchmark asks | best reached: -20.0% |" in text
    assert "bf16 matmul 737 TFLOP/s, fp32 matmul 52 TFLOP/s, copy 4.2 TB/s" in text
    assert "| case | metric | ours | peer | theirs | ratio | floor | target |" in text
    assert "| unmeasured | Sums beside sums, of ones. | numpy |" in text and "| paged | Sums" not in text
