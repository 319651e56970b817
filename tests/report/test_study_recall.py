"""A study of recall: accuracy beside decoding state, orders without figures, and runs that diverge."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dovetail.errors import SpecError
from dovetail.models import build
from dovetail.report import study as studies
from dovetail.report.cost import state_bytes
from dovetail.report.study import Study, study
from dovetail.report.study_page import Found, Row, page
from dovetail.spec import Spec

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process: others take seconds to start, and test_study.py has them."""
    monkeypatch.setattr(studies, "processes", lambda jobs: ThreadPoolExecutor(1))


def recipe(folder: Path) -> dict[str, Any]:
    corpus = {"kind": "recall", "pairs": 2, "vocab": 16, "length": 12, "examples": 16}
    linear = {"kind": "linear", "heads": 1, "position": "none"}
    return {
        "name": "recall",
        "base": {
            "model": {
                "kind": "decoder", "dim": 16, "depth": 1,
                "blocks": {"mixer": {"kind": "attention", "heads": 1}, "feedforward": None},
            },
            "data": {"train": corpus, "held_out": corpus | {"split": "held_out"}, "cache": str(folder / "cache")},
            "train": {"steps": 2, "batch": 4, "length": 12, "autocast": "none", "device": "cpu", "clip": 0.0},
        },
        "arms": [
            {"name": "attention", "family": "attention"},
            {"name": "linear 4", "family": "linear", "change": {"model.blocks.mixer": linear | {"head_dim": 4}}},
            {"name": "linear 8", "family": "linear", "change": {"model.blocks.mixer": linear | {"head_dim": 8}}},
            {"name": "too fast", "family": "linear", "change": {"train.lr": 1e30, "train.steps": 4}},
        ],
        "seeds": [0, 1],
        "main": "accuracy",
        "published": [
            {"metric": "accuracy", "source": "a plot", "order": [["attention"], ["linear 8", "linear 4"], ["too fast"]]}
        ],
        "out": str(folder / "out"),
    }  # fmt: skip


def test_accuracy_beside_state_and_what_diverged(tmp_path: Path) -> None:
    data = recipe(tmp_path)
    found = study(data, quiet=True)
    rows = {row.name: row for row in found.rows}
    asked = Study.load(data)
    for arm in asked.arms[:3]:
        spec = asked.recipe(arm, 0).model
        assert isinstance(spec, dict)
        model = build(Spec.parse("model", spec | {"vocab": 16, "context": 12}), seed=0)
        assert rows[arm.name].spent["state_bytes"] == model.new_state(1, 12).nbytes() == state_bytes(model, 12)
        kept = [
            json.loads((tmp_path / "out/runs" / studies.slug(arm.name) / s / "found.json").read_text()) for s in "01"
        ]
        hits = [run["metrics"]["accuracy"] for run in kept]
        assert rows[arm.name].metrics["accuracy"] == pytest.approx((sum(hits) / 2, abs(hits[0] - hits[1])))
        assert all(100 * round(0.32 * hit) / 32 == pytest.approx(hit) for hit in hits)  # of 32 answers
    lost = rows["too fast"]
    assert lost.diverged == (0, 1) and not lost.metrics and lost.spent["peak_bytes"] > 0
    assert {o.outcome for o in found.orders() if o.first == "too fast"} == {"unresolved"}
    assert {pair[3] for pair in found.against_print() if "too fast" in pair[:2]} == {"unresolved"}
    assert ("linear 8", "linear 4") not in {pair[:2] for pair in found.against_print()}  # one group of the order

    text, told = (tmp_path / "out/index.html").read_text(), str(found)
    assert "against decoding state" in text and "(log scale)" in text and "no order is claimed of their arms" in text
    assert ">diverged<" in text and ">seeds 0, 1<" in text and "too fast: unresolved attention (gap -," in told
    report = json.loads((tmp_path / "out/report.json").read_text())
    one = next(r for r in report["rows"] if (r["case"], r["metric"]) == ("linear 8", "accuracy, %"))
    assert one["published"] == 2 and one["state_bytes"] == rows["linear 8"].spent["state_bytes"]
    broken = [r for r in report["rows"] if r["case"] == "too fast"]
    assert broken == [{"case": "too fast", "metric": "runs that diverged", "ours": 2, "seeds": [0, 1]}]

    said = tmp_path / "out/runs/too-fast/1/found.json"
    before = said.stat().st_mtime_ns
    assert "at step" in json.loads(said.read_text())["diverged"]
    study(data, quiet=True)
    assert said.stat().st_mtime_ns == before  # a run that diverged is not run again


def test_one_seed_that_diverged_is_enough_to_claim_nothing() -> None:
    a = Row("a", {"nats": (1.0, 0.0)}, 1, 1, {"peak_bytes": 1.0})
    b = Row("b", {"nats": (9.0, 0.0)}, 1, 1, {"peak_bytes": 1.0}, diverged=(2,))
    found = Found("n", "d", "cpu", {}, "c", (0, 1, 2), "nats", {"nats": "nats"}, (a, b), None, None, (), {}, "o")
    assert found.orders()[0].gap == -8.0 and found.orders()[0].outcome == "unresolved"
    assert "decoding state" not in page(found)  # of which nothing is known


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "give values"),
        ({"order": [["attention", "linear 4"]]}, "two groups"),
        ({"order": [["attention"], []]}, "is empty"),
        ({"order": [["attention"], ["linear 4", "attention"]]}, "stands in it twice"),
        ({"order": [["attention"], ["linear 4"]], "values": {"attention": 1.0, "linear 4": 2.0}}, "give values"),
        ({"order": [["attention"], ["linear 16"]]}, "'linear 16', which is no arm"),
    ],
)
def test_orders_in_print(tmp_path: Path, table: dict[str, Any], said: str) -> None:
    data = recipe(tmp_path)
    with pytest.raises(SpecError, match=said):
        Study.load(data | {"published": {"metric": "accuracy", "source": "s"} | table})
    twice = [{"metric": "accuracy", "source": "s", "order": [["attention"], [f"linear {n}"]]} for n in (4, 8)]
    with pytest.raises(SpecError, match="have an arm in common"):
        Study.load(data | {"published": twice})


@pytest.mark.parametrize(("name", "vocab"), [("recall", 512), ("init", 1024), ("activations", 2048)])
def test_the_shipped_recipes(name: str, vocab: int) -> None:
    """Every arm is a model that can be built; gated units have the parameters of the others."""
    asked = Study.load(ROOT / "recipes" / f"{name}.yaml")
    sizes = {}
    for arm in asked.arms:
        made = asked.recipe(arm, 0)
        assert isinstance(made.model, dict)
        model = build(Spec.parse("model", made.model | {"vocab": vocab, "context": made.train.length}), weights=False)
        sizes[arm.name] = sum(p.numel() for p in model.parameters())
    if name == "activations":
        assert len(set(sizes.values())) == 1
