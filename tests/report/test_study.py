"""Studies: every arm trains by the base recipe with its changes, is asked the same, and nothing is run twice."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dovetail.data.table_to_text import E2E
from dovetail.errors import SpecError, StoppedError, UserError
from dovetail.report import study as studies
from dovetail.report.scores import nearest, questions, score
from dovetail.report.study import Study, is_study, study
from dovetail.report.study_page import Found, Row, order, page
from dovetail.training.loop import Run
from report.runs import run_here

LINES = [
    f"name : {n} | food : {f}||{n} serves {f} food ."
    for n in ("Zizzi", "Mill", "Punter")
    for f in ("fast", "old", "raw")
]


def asked(folder: Path, checkpoint: Path) -> dict[str, Any]:
    (folder / "train").write_text("\n".join(LINES[:6]))
    (folder / "test").write_text("\n".join(LINES[6:]))
    data = {
        name: {"kind": "e2e", "path": str(folder / file)} for name, file in (("train", "train"), ("held_out", "test"))
    }
    train = {"steps": 2, "batch": 2, "length": 24, "autocast": "none", "device": "cpu"}
    return {
        "name": "tiny",
        "base": {"model": str(checkpoint), "data": data | {"cache": str(folder / "cache")}, "train": train},
        "arms": [
            {"name": "all", "change": {"train.lr": 1e-3}},
            {"name": "LoRA", "change": {"adapter": {"kind": "lora", "rank": 2}}},
        ],
        "seeds": [0, 1],
        "generate": {"data": data["held_out"], "sampling": {"max_new_tokens": 4}},
        "published": {"metric": "bleu", "source": "a paper", "values": {"all": 1.0, "LoRA": 2.0}},
        "out": str(folder / "out"),
    }


def test_runs_once_reports_and_goes_on(tmp_path: Path, checkpoint: Path, monkeypatch: Any) -> None:
    data = asked(tmp_path, checkpoint)
    found_by = Study.load(data)
    run_here(found_by, ("all", 0), ("LoRA", 0))
    found = study(data, jobs=2, quiet=True)  # the others at once, each in a process of its own
    rows = {row.name: row for row in found.rows}
    assert rows["all"].trainable == rows["all"].parameters > rows["LoRA"].trainable > 0
    assert set(rows["all"].metrics) == {"bleu", "rouge1", "rouge2", "rougeL", "nats"} and found.main == "bleu"
    assert rows["all"].spent["peak_bytes"] > 0 and "tokens_per_s" not in rows["all"].spent
    kept = [tmp_path / "out" / "runs" / arm / seed for arm in ("all", "lora") for seed in "01"]
    nats = [json.loads((folder / "found.json").read_text())["metrics"]["nats"] for folder in kept]
    assert nats[0] != nats[1] and rows["all"].metrics["nats"][0] == pytest.approx(sum(nats[:2]) / 2)
    assert rows["all"].metrics["nats"][1] == pytest.approx(abs(nats[0] - nats[1]))
    assert [sorted(p.name for p in folder.iterdir()) for folder in kept] == [["found.json"]] * 4
    pairs = list(E2E(path=str(tmp_path / "test")).pairs())
    texts = nearest(E2E(path=str(tmp_path / "train")).pairs(), [q.prompt for q in questions(pairs)])
    assert found.rival is not None
    assert found.rival.metrics["bleu"][0] == score(texts, [q.references for q in questions(pairs)]).bleu

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {(r["case"], r["metric"]) for r in report["rows"]} >= {("all", "BLEU"), ("LoRA", "ROUGE-L")}
    assert report["rows"][0]["published"] == 1.0 and len(report["samples"]) == 6
    text = (tmp_path / "out" / "index.html").read_text()
    assert "nearest training pair" in text and "a paper" in text and "<svg" in text

    times = [(folder / "found.json").stat().st_mtime_ns for folder in kept]
    more = data | {"arms": [*data["arms"], {"name": "longer", "change": {"train.steps": 3}}], "seeds": [0]}
    run_here(Study.load(more), ("longer", 0))
    again = study(more, quiet=True)
    assert [(folder / "found.json").stat().st_mtime_ns for folder in kept] == times  # nothing was run again
    assert "tokens_per_s" in again.rows[2].spent


def test_a_part_of_a_study_shares_its_runs_with_the_whole(tmp_path: Path, checkpoint: Path) -> None:
    data = asked(tmp_path, checkpoint) | {"seeds": [0], "generate": None}
    data["arms"].append({"name": "two ranks", "change": {"adapter": {"kind": "lora", "rank": 4}}})
    data["published"] = [
        {"metric": "nats", "source": "a table", "values": {"all": 1.0, "LoRA": 2.0}},
        {"metric": "accuracy", "source": "a plot", "order": [["all"], ["two ranks"], ["LoRA"]]},
    ]
    whole, names = Study.load(data), ["two ranks", "LoRA"]
    part = whole.only(names)
    assert part.rows == ["LoRA", "two ranks"], "in the order of the recipe"
    assert [table.compared for table in part.published] == [{"LoRA": 2.0}, {"LoRA": -3.0, "two ranks": -2.0}]
    assert [table.metric for table in whole.only(["two ranks"]).published] == ["accuracy"] and whole.only([]) is whole
    with pytest.raises(SpecError, match=r"no arm is called 'LoRa'\n.*--only\n.*did you mean 'LoRA'"):
        study(data, only=["all", "LoRa"], quiet=True)

    run_here(whole, ("LoRA", 0))
    run_here(part, ("two ranks", 0))
    kept = [tmp_path / "out" / "runs" / name / "0" / "found.json" for name in ("lora", "two-ranks", "all")]
    times = [file.stat().st_mtime_ns for file in kept[:2]]
    found = study(data, only=["two ranks"], quiet=True)  # and what is kept
    assert [row.name for row in found.rows] == ["LoRA", "two ranks"] and not kept[2].exists()
    assert found.command == "dovetail compare RECIPE --only LoRA --only 'two ranks'"
    text = (tmp_path / "out" / "index.html").read_text()
    assert "a plot" in text and [arm["name"] for arm in found.recipe["arms"]] == ["LoRA", "two ranks"]
    run_here(whole.only(["all"]), ("all", 0))
    times.append(kept[2].stat().st_mtime_ns)
    found = study(data, only=["LoRA"], quiet=True)
    assert [row.name for row in found.rows] == ["all", "LoRA", "two ranks"] and "--only" not in found.command
    assert [file.stat().st_mtime_ns for file in kept] == times  # nothing was run again


def test_a_run_goes_on_where_a_sigterm_found_it(tmp_path: Path, checkpoint: Path, monkeypatch: Any) -> None:
    said = Study.load(asked(tmp_path, checkpoint) | {"seeds": [0]}, ["base.train.steps=3"])
    run_here(said, ("all", 0))
    folder = tmp_path / "out" / "runs" / "all" / "0"
    whole = json.loads((folder / "found.json").read_text())
    (folder / "found.json").unlink()
    plain, steps = Run.one_step, []

    def told(run: Run) -> Any:
        steps.append(run.step)
        if len(steps) == 2:  # before the first is done there is nothing to save, and a SIGTERM ends it
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(run)

    monkeypatch.setattr(Run, "one_step", told)
    with pytest.raises(StoppedError):
        run_here(said, ("all", 0))
    run_here(said, ("all", 0))
    assert steps == [0, 1, 2]  # the third step came after the second, not a new first one
    again = json.loads((folder / "found.json").read_text())
    assert whole.pop("seconds") > 0 < whole.pop("tokens_per_s") and "seconds" not in again
    assert again.pop("peak_bytes") > 0 < whole.pop("peak_bytes") and again == whole
    assert [p.name for p in folder.iterdir()] == ["found.json"]


def test_orders_are_claimed_beyond_twice_the_spread() -> None:
    def row(name: str, bleu: float, spread: float) -> Row:
        return Row(name, {"bleu": (bleu, spread), "nats": (bleu, spread)}, 1, 1, {"peak_bytes": 1.0})

    a, b = row("a", 5.0, 0.4), row("b", 4.0, 0.6)
    assert order(a, b, "bleu").outcome == "unresolved"  # a gap of 1, twice the larger spread is 1.2
    b = row("b", 4.0, 0.4)
    assert order(a, b, "bleu").outcome == "above" and order(b, a, "bleu").outcome == "below"
    assert order(a, b, "nats").outcome == "below"  # where less is better
    printed = {"metric": "bleu", "source": "s", "values": {"a": 1.0, "b": 2.0}}
    found = Found("n", "d", "cpu", {}, "c", (0, 1), "bleu", {"bleu": "BLEU"}, (a, b), None, printed, (), {}, "o")
    assert found.against_print() == [("a", "b", "below", "above")] and "CONTRADICTS" in str(found)
    assert "below" in page(found)
    alone = replace(found, seeds=(0,))
    assert alone.against_print()[0][3] == alone.orders()[0].outcome == "unresolved"  # one seed shows no spread


def test_nearest_shares_most_words() -> None:
    train = [("a b c", " first"), ("a b", " second"), ("d", " third")]
    assert nearest(train, ["a b", "d e", "z"]) == ["second", "third", "first"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arms": [{"name": "a"}, {"name": "a"}]}, "two arms are called 'a'"),
        ({"arms": [{"name": "a b"}, {"name": "a-b"}]}, "differ only in signs"),
        ({"arms": [{"name": "a", "change": {"trian.steps": 1}}], "published": None}, "arm 'a'"),
        ({"arms": [{"name": "a"}, {"name": "+"}]}, r"no folder can be called '\+'"),
        ({"seeds": [1, 1]}, "a seed stands twice"),
        ({"main": "blue"}, "no metric 'blue'"),
        ({"published": {"metric": "bleu", "source": "s", "values": {"x": 1.0, "all": 2.0}}}, "'x', which is no arm"),
        ({"generate": {"data": {"kind": "pydoc"}}}, "has no prompts"),
        ({"generate": {"data": {"kind": "e2e", "path": "x"}, "sampling": {"beam": 2}}}, "beam"),
        ({"sedes": [1]}, "sedes"),
    ],
)
def test_refusals(tmp_path: Path, checkpoint: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Study.load(asked(tmp_path, checkpoint) | change)


def test_what_cannot_be_asked_is_said_before_it_is_trained(tmp_path: Path, checkpoint: Path, monkeypatch: Any) -> None:
    data = asked(tmp_path, checkpoint)
    base = data["base"]
    text = {"kind": "text", "path": str(tmp_path / "train")}
    alone = base | {"data": {"train": base["data"]["train"]}}
    Study.load(data | {"base": alone}).check_asked()
    for change, said in (
        ({"base": alone, "main": "nats"}, r"(?s)held-out text, and this arm has none.*arm 'all'"),
        ({"base": alone, "generate": None, "published": None}, "held-out text, and this arm has none"),
        ({"base": base | {"data": {"train": text}}}, "trains on no pairs"),
    ):
        with pytest.raises(SpecError, match=said):
            study(data | change, quiet=True)
    monkeypatch.setattr(Run, "train", lambda *_, **__: pytest.fail("it was trained"))
    whole = data | {"generate": data["generate"] | {"sampling": {"max_new_tokens": 99}}}
    with pytest.raises(UserError, match="99 new tokens leave no room"):
        run_here(Study.load(whole), ("all", 0))


def test_a_base_has_no_out_and_no_seed(tmp_path: Path, checkpoint: Path) -> None:
    data = asked(tmp_path, checkpoint)
    for change in ({"out": "x"}, {"train": data["base"]["train"] | {"seed": 1}}):
        with pytest.raises(SpecError, match="which are the study's"):
            Study.load(data | {"base": data["base"] | change})
    for recipe in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")):
        if is_study(recipe):
            assert studies.Study.load(recipe).seeds[:3] == (0, 1, 2)
