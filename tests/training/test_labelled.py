"""Classes of sequences trained by the loop: what is learnt, exact resuming, rates of their own, refusals, a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dovetail as dt
from dovetail.data.labelled import nearest_mean
from dovetail.errors import SpecError
from dovetail.report.study import Study, study
from dovetail.spec import Spec
from dovetail.training import Recipe
from dovetail.training.loop import Run
from dovetail.training.preflight import preflight
from dovetail.training.setup import set_up
from labelled_files import write_mnist
from report.runs import run_here

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(folder: Path, **train: Any) -> dict[str, Any]:
    """Images of 4 x 4 whose bright row is their class, less those of rows that two classes share."""
    folder.mkdir(parents=True, exist_ok=True)
    write_mnist(folder, train=160, test=40, side=(10, 2))
    data = {
        name: {
            "kind": "pixels", "permutation": 1, "of": {"kind": "mnist", "path": str(folder), "split": split, "std": 1.0}
        }
        for name, split in (("train", "train"), ("held_out", "test"))
    }  # fmt: skip
    block = {"kind": "recurrent", "mixer": {"kind": "hippo", "hidden": 24}}
    model = {"kind": "sequence_classifier", "dim": 24, "depth": 1, "norm": None, "pooling": "last", "blocks": block}
    options = {"steps": 6, "batch": 16, "length": 20, "lr": 1e-2, "autocast": "none", "device": "cpu", "log_every": 1}
    return {
        "model": model | {"init": {"kind": "xavier"}}, "data": data, "objective": "classification",
        "train": options | {"weight_decay": 0.0} | train, "out": str(folder / "out"),
    }  # fmt: skip


def test_it_learns_and_is_loaded_again(tmp_path: Path) -> None:
    result = dt.fit(recipe(tmp_path, steps=80), progress=False)
    assert result.held_out is not None and result.held_out["accuracy"] > 0.8 and result.held_out["tokens"] == 40
    assert result.tokens == 80 * 16 * 20 and set(result.text_sha256) == {"train", "held_out"}
    judge = dt.load(tmp_path / "out")
    asked = Spec.parse("corpus", recipe(tmp_path)["data"]["held_out"]).examples()  # type: ignore[attr-defined]
    values = torch.stack([torch.from_numpy(asked[i].values) for i in range(40)])
    with torch.no_grad():
        right = (judge(values).class_logits.argmax(-1) == torch.from_numpy(asked.labels)).double().mean()
    assert float(right) == pytest.approx(result.held_out["accuracy"])


def test_it_resumes_exactly(tmp_path: Path) -> None:
    whole = dt.fit(recipe(tmp_path / "a"), progress=False)
    first = Run(set_up(Recipe.load(recipe(tmp_path / "b"))), tmp_path / "b" / "out")
    for _ in range(3):
        first.one_step()
        first.step += 1
    first.save()
    again = dt.fit(recipe(tmp_path / "b"), resume=True, progress=False)
    assert again.loss == whole.loss and again.held_out == whole.held_out


def test_rates_of_their_own(tmp_path: Path) -> None:
    rates = {"*.mixer.told.*": 1e-4, "*.mixer.*": 1e-3}
    run = Run(set_up(Recipe.load(recipe(tmp_path, rates=rates))), tmp_path / "out")
    peak = {id(p): group["peak"] for group in run.optimizer.param_groups for p in group["params"]}
    for name, p in run.model.named_parameters():
        assert peak[id(p)] == (1e-4 if ".told." in name else 1e-3 if ".mixer." in name else 1e-2)
    for rates in ({"*.log_dt": 1e-3}, {"*.mixer.*": 1e-3, "*.mixer.told.*": 1e-4}):
        with pytest.raises(SpecError, match="by which no trained parameter goes"):
            Run(set_up(Recipe.load(recipe(tmp_path, rates=rates))), tmp_path / "out")


def test_preflight(tmp_path: Path) -> None:
    found = preflight(recipe(tmp_path))
    assert found.fits and found.batch is None and found.dry_run is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective": "next_token"}, "next_token on a corpus 'pixels', which has labels"),
        ({"data.train": {"kind": "text", "path": "x"}}, "which has no labels"),
        ({"data.held_out": {"kind": "text", "path": "x"}}, "one of data.train and data.held_out"),
        ({"tokenizer": {"train": 300}}, "no effect"),
        ({"data.pack": "none"}, "no effect"),
        ({"train.length": 16}, "are 20 long"),
        ({"model": {"kind": "encoder", "dim": 16}}, "reads tokens"),
        ({"model.features": 2}, "reads 2 numbers"),
        ({"model.classes": 9}, "tells 9 classes"),
    ],
)
def test_refusals(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        set_up(Recipe.load(recipe(tmp_path), [f"{path}={json.dumps(value)}" for path, value in change.items()]))


def test_a_classifier_of_values_reads_no_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a text " * 99)
    data = {"train": {"kind": "text", "path": str(tmp_path / "text")}, "cache": str(tmp_path)}
    judge = {"kind": "sequence_classifier", "dim": 16, "features": 1, "classes": 2}
    with pytest.raises(SpecError, match="reads no text"):
        set_up(Recipe.load({"model": judge, "data": data, "tokenizer": {"train": 300}, "train": {"steps": 1}}))


@pytest.mark.parametrize("name", ["pmnist_s4", "pmnist_legs"])
def test_shipped_recipes_parse(name: str) -> None:
    assert Recipe.load(RECIPES / f"{name}.yaml").objective.kind == "classification"


def shipped(folder: Path) -> Study:
    """The shipped study with little data of its own and small models."""
    write_mnist(folder, train=30, test=20, side=(6, 4))
    of = {name: {"kind": "mnist", "path": str(folder), "split": name} for name in ("train", "test")}
    train, held_out = ({"kind": "pixels", "permutation": 0, "of": of[name]} for name in ("train", "test"))
    said = {"data.train": train, "data.held_out": held_out, "train.length": 24, "train.device": "cpu"}
    asked = Study.load(RECIPES / "pmnist.yaml", [f"base.{path}={json.dumps(value)}" for path, value in said.items()])
    small = {"model.dim": 16, "model.depth": 1, "train.steps": 1, "train.batch": 2, "train.autocast": "none"}
    return asked.model_copy(
        update={"arms": tuple(arm.model_copy(update={"change": arm.change | small}) for arm in asked.arms)}
    )


def test_every_arm_of_permuted_mnist_trains(tmp_path: Path) -> None:
    asked = shipped(tmp_path)
    assert [arm.name for arm in asked.arms] == [
        "HiPPO-LegS",
        "S4",
        "S4, 60 epochs",
        "S4, 60 epochs, reversed bits",
        "S4D",
        "LSTM",
        "Transformer",
    ]
    for arm in asked.arms:
        run = Run(set_up(asked.recipe(arm, 0)), tmp_path / "run")
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        loss, norm, tokens = run.one_step()
        assert torch.isfinite(loss) and norm > 0 and tokens == 48, arm.name
        assert all(not torch.equal(p, before[name]) for name, p in run.model.named_parameters()), arm.name


def test_a_study_of_classes(tmp_path: Path) -> None:
    asked = shipped(tmp_path)
    update = {"arms": asked.arms[:1], "seeds": (0,), "published": (), "out": str(tmp_path / "out")}
    asked = asked.model_copy(update=update)
    run_here(asked, (asked.arms[0].name, 0))
    found = study(asked, quiet=True)
    assert found.main == "accuracy" and set(found.rows[0].metrics) == {"accuracy", "nats"}
    assert found.rows[0].spent["seconds"] > 0 and found.rival is not None
    data: Any = asked.recipe(asked.arms[0], 0).data
    rival = 100 * nearest_mean(data.train.examples(), data.held_out.examples())
    assert found.rival.metrics["accuracy"][0] == rival
    row = json.loads((tmp_path / "out" / "report.json").read_text())["rows"][0]
    assert row["metric"] == "accuracy, %" and row["peer"] == "nearest class mean" and "minutes" in row
    assert "nearest class mean" in (tmp_path / "out" / "index.html").read_text()
