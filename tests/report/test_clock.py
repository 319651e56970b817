"""Clocks: times come from the log's median rate, and an arm is as fast as it reaches what its race's first one reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dovetail as dt
from dovetail.errors import RunError, SpecError
from dovetail.report.clock import Clock, curve, curves, history, reached, timed
from dovetail.report.study import Study, _key, study
from dovetail.report.study_recipe import slug
from dovetail.training.recipe import read_yaml

RACES = {"short rows": ("all", "half", "late")}


def asked(folder: Path, checkpoint: Path, texts: dict[str, str]) -> dict[str, Any]:
    for name, text in texts.items():
        (folder / name).write_text(text)
    data = {name: {"kind": "text", "path": str(folder / name)} for name in texts}
    train = {
        "steps": 10, "batch": 2, "length": 24, "autocast": "none", "device": "cpu", "eval_every": 3, "eval_batches": 1,
        "log_every": 2, "lr": 3e-3,
    }  # fmt: skip
    return {
        "name": "tiny race",
        "base": {"model": str(checkpoint), "data": data | {"cache": str(folder / "cache")}, "train": train},
        "arms": [{"name": "all"}, {"name": "slow", "change": {"train.lr": 1e-9}}],
        "seeds": [0],
        "clock": {"races": {"short rows": ["all", "slow"]}},
        "main": "speedup",
        "published": {"metric": "speedup", "source": "a paper", "values": {"all": 1.0, "slow": 2.0}},
        "out": str(folder / "out"),
    }


@pytest.mark.slow
def test_the_recipe_at_the_size_of_a_test(tmp_path: Path, texts: dict[str, str]) -> None:
    """recipes/flash.yaml: the sizes of its arms are equal within 2%, and its first race runs through, made small."""
    recipe = read_yaml(Path(__file__).parents[2] / "recipes" / "flash.yaml")
    whole = Study.load(recipe)
    assert whole.clock is not None and set(whole.clock.against) | set(whole.clock.against.values()) == set(whole.rows)
    sizes = []
    for arm in whole.arms:
        trained = whole.recipe(arm, 0)
        assert trained.train.length * trained.train.batch == 32_768 and isinstance(trained.model, dict)
        if arm.name.endswith(" 512"):
            model = dt.build(trained.model | {"vocab": 8192, "context": 512}, weights=False)
            sizes.append(sum(p.numel() for p in model.parameters()))
    assert max(sizes) < 1.02 * min(sizes)

    data = asked(tmp_path, tmp_path, texts)["base"]
    base = recipe["base"] | {"data": data["data"], "tokenizer": {"train": 280}}
    base["model"] |= {
        "dim": 16,
        "depth": 1,
        "blocks": {"mixer": "attention", "feedforward": {"kind": "glu", "hidden": 24}},
    }
    base["train"] |= data["train"] | {"lr": 1e-2}
    small = {"train.length": 40, "train.batch": 2, "train.steps": 10}
    arms = [arm | {"change": arm["change"] | small} for arm in recipe["arms"][:3:2]]
    mixer = arms[1]["change"]["model.blocks"]["mixer"] | {"key_dim": 8, "chunk": 16}
    arms[1]["change"] |= {"model.depth": 2, "model.blocks": {"mixer": mixer, "feedforward": None}}
    races = {"40 tokens": [arm["name"] for arm in arms]}
    less = {
        "base": base,
        "arms": arms,
        "clock": {"races": races},
        "seeds": [0],
        "published": [],
        "out": str(tmp_path / "out"),
    }
    found = study(recipe | less, quiet=True)
    rows = {row.name: row for row in found.rows}
    kept = [tmp_path / "out" / "runs" / slug(name) / "0" / "found.json" for name in rows]
    pasts = {name: json.loads(file.read_text()) for name, file in zip(rows, kept, strict=True)}
    for name, run in pasts.items():
        past = run["clock"]
        assert [step for step, _ in past["points"]] == [3, 6, 9, 10]
        assert past["points"][-1][1] == run["metrics"]["nats"] < past["points"][0][1], f"{name} does not learn"
        assert past["seconds_per_step"] == pytest.approx(2 * 40 / past["tokens_per_s"])
        assert rows[name].metrics["seconds"][0] == pytest.approx(10 * past["seconds_per_step"])
        assert rows[name].spent["tokens_per_s"] == past["tokens_per_s"]
    assert rows["Transformer++ 512"].metrics["speedup"] == (1.0, 0.0) and found.main == "speedup"
    assert [(o.first, o.second) for o in found.orders()] == [("FLASH 512", "Transformer++ 512")]

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {(r["case"], r["metric"]) for r in report["rows"]} >= {("FLASH 512", "seconds of training")}
    assert len(report["races"]["40 tokens"]["FLASH 512"][0]) == 4
    text = (tmp_path / "out" / "index.html").read_text()
    assert "against seconds of training" in text and "40 tokens" in text and "median rate" in text

    written = [file.stat().st_mtime_ns for file in kept]
    study(recipe | less, quiet=True)
    assert [file.stat().st_mtime_ns for file in kept] == written  # nothing was run again
    with pytest.raises(SpecError, match="beside 2 runs at a time"):
        study(recipe | less, jobs=2, quiet=True)


def test_history_is_of_the_median_rate(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [{"step": 1, "tokens_per_s": 1.0}, *({"step": s, "tokens_per_s": 100.0} for s in (2, 3, 4))]
    lines += [{"step": 4, "held_out_nats": 3.0, "held_out_accuracy": 0.1}]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = history(log, steps=4, tokens=80)
    assert found == {"points": [(4, 3.0)], "tokens_per_s": 100.0, "seconds_per_step": 0.2}
    log.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(RunError, match="without evaluations"):
        history(log, steps=4, tokens=80)


def test_reached_is_on_the_line_between_evaluations() -> None:
    line = ([1.0, 2.0, 4.0], [5.0, 4.0, 3.0])
    assert reached(*line, 5.5) == 1.0 and reached(*line, 4.0) == 2.0
    assert reached(*line, 3.25) == pytest.approx(3.5) and reached(*line, 2.9) is None


def test_times_by_race() -> None:
    """The first's own last loss of the same seed is the goal; an arm that misses it with one seed has no time."""

    def run(per_step: float, last: float) -> dict[str, Any]:
        past = {"points": [(1, 5.0), (2, last)], "seconds_per_step": per_step, "tokens_per_s": 8.0 / per_step}
        return {"steps": 2, "metrics": {"nats": last}, "tokens_per_s": 1.0, "clock": past}

    found = {
        ("all", 0): run(4.0, 3.0), ("half", 0): run(2.0, 1.0), ("late", 0): run(1.0, 3.5),
        ("all", 1): run(4.0, 4.0), ("half", 1): run(2.0, 3.0), ("late", 1): run(1.0, 2.0),
    }  # fmt: skip
    clock = Clock(races=RACES)
    out = timed(clock, found, (0, 1))
    assert [out["half", seed]["metrics"]["speedup"] for seed in (0, 1)] == [8 / 3, 8 / 3]
    assert out["half", 0]["metrics"]["reached"] == 3.0 and out["half", 0]["metrics"]["seconds"] == 4.0
    assert out["all", 1]["metrics"]["speedup"] == 1.0 and out["all", 1]["tokens_per_s"] == 2.0
    assert all("reached" not in out["late", seed]["metrics"] for seed in (0, 1))
    assert "speedup" not in found["half", 0]["metrics"], "what was found is left as it is"
    assert curve(found["half", 0]) == ([2.0, 4.0], [5.0, 1.0])
    assert curves(clock, found, (0, 1))["short rows"]["half"] == ([2.0, 4.0], [5.0, 2.0])
    assert clock.against == {"half": "all", "late": "all"}

    found["all", 1] = {"metrics": {}, "diverged": "the loss is nan"}
    out = timed(clock, found, (0, 1))
    assert "speedup" not in out["half", 0]["metrics"] and "seconds" in out["half", 0]["metrics"]


def test_races_of_some_arms(tmp_path: Path, checkpoint: Path, texts: dict[str, str]) -> None:
    clock = Clock(races={"r": ("a", "b", "c"), "s": ("d", "e"), "t": ("f", "g")})
    assert clock.only(["g", "d", "c", "a"]).races == {"r": ("a", "c")}  # of s one is left, and of t not the first
    with pytest.raises(SpecError, match=r"no race is left of 'e', 'b'(.|\n)*another of it: 'a' and 'b' or 'c'"):
        clock.only(["e", "b"])
    arms = [{"name": "all"}, {"name": "slow", "change": {"train.lr": 1e-9}}, {"name": "apart"}]
    whole = Study.load(asked(tmp_path, checkpoint, texts) | {"arms": arms})
    part = whole.only(["slow", "all"])
    assert part.clock == whole.clock and _key(part, part.arms[1], 0) == _key(whole, whole.arms[1], 0)
    with pytest.raises(SpecError, match="no race is left of 'apart'"):
        whole.only(["apart"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"clock": {"races": {"r": ["all", "slwo"]}}}, "'slwo', which is no arm"),
        ({"clock": {"races": {"r": ["all"]}}}, "two arms or more"),
        ({"clock": {"races": {"r": ["all", "slow"], "s": ["slow", "all"]}}}, "stands twice"),
        ({"clock": {"race": {}}}, "race"),
        ({"arms": [{"name": "all", "change": {"train.eval_every": 0}}, {"name": "slow"}]}, "course of training"),
        ({"arms": [{"name": "all", "change": {"train.log_every": 5}}, {"name": "slow"}]}, "too few for a median"),
    ],
)
def test_refusals(tmp_path: Path, checkpoint: Path, texts: dict[str, str], change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Study.load(asked(tmp_path, checkpoint, texts) | change)
