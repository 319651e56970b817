"""Healing by any objective: distillation learns from the model before the swap unless it names a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dovetail as dt
from dovetail.errors import SpecError
from dovetail.objectives.distillation import Distillation
from dovetail.objectives.next_token import NextToken
from dovetail.report.heal import heal
from dovetail.report.measure import divergence
from dovetail.report.recipe import Comparison, read_heal
from dovetail.report.text import documents_of, rows_within
from dovetail.spec import override
from dovetail.surgery import transplant

HALVED = {"blocks.*.mixer.kv_heads": 2}


@pytest.fixture()
def how(texts: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """A healing of a blink, on a text that is not scored."""
    (tmp_path / "train.txt").write_text(texts["train"])
    return {
        "data": {"kind": "text", "path": str(tmp_path / "train.txt")},
        "train": {"steps": 20, "batch": 4, "length": 32, "lr": 3e-3, "autocast": "none", "weight_decay": 0.0},
        "cache": str(tmp_path / "cache"),
    }


@pytest.fixture(scope="module")
def trained(checkpoint: Path, texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint after some training, so that there is something to lose and to heal."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "train.txt").write_text(texts["train"])
    data = {"train": {"kind": "text", "path": str(folder / "train.txt")}, "cache": str(folder / "cache")}
    train = {"steps": 60, "batch": 8, "length": 32, "lr": 1e-2, "warmup": 5, "autocast": "none"}
    dt.fit({"model": str(checkpoint), "data": data, "train": train, "out": str(folder / "out")}, progress=False)
    return folder / "out"


@pytest.mark.parametrize(
    "terms",
    [{}, {"logits": 0.0, "hidden": 1.0}, {"logits": 0.0, "transfer": 1.0}, {"hidden": 0.5, "transfer": 0.5}],
    ids=["logits", "hidden", "transfer", "all"],
)
def test_distillation_brings_a_halved_model_back_to_what_it_was(
    trained: Path, texts: dict[str, str], how: dict[str, Any], terms: dict[str, float]
) -> None:
    original = dt.load(trained)
    halved = transplant(original, override(original.spec, HALVED)).model
    before = [p.clone() for m in (original, halved) for p in m.parameters()]
    healing = read_heal(how | {"objective": {"kind": "distillation", **terms}})
    healed = heal(halved, healing, 0, original)
    rows = rows_within(documents_of(None, texts["held_out"], dt.load_tokenizer(trained)), 32, 4096)
    far, near = (divergence(model, original, rows) for model in (halved, healed))
    assert near < 0.8 * far, (near, far)
    assert healed.spec == halved.spec and healed.origin is halved.origin
    assert all(torch.equal(a, b) for a, b in zip(before, [*original.parameters(), *halved.parameters()], strict=True))


def test_a_swap_heals_by_the_objective_that_is_asked_for(
    trained: Path, texts: dict[str, str], how: dict[str, Any]
) -> None:
    """A teacher that is named is the one that is learnt from: a path to the original is the original."""
    original, how["train"] = dt.load(trained), how["train"] | {"steps": 3}
    given: dict[str, Any] = {"texts": texts["held_out"], "tokenizer": dt.load_tokenizer(trained), "rounds": 0}
    new, report = dt.swap(original, HALVED, heal=how | {"objective": "distillation"}, **given)
    assert [c.name for c in report.columns][-2:] == ["after, healed", "rival, healed"]
    halved = transplant(original, override(original.spec, HALVED)).model
    named = {"kind": "distillation", "teacher": str(trained)}
    by = {
        name: heal(halved, read_heal(how | more), 0, original)
        for name, more in (("named", {"objective": named}), ("plain", {}))
    }
    weights = {name: torch.cat([p.flatten() for p in m.parameters()]) for name, m in (by | {"swap": new}).items()}
    assert torch.equal(weights["swap"], weights["named"]) and not torch.equal(weights["swap"], weights["plain"])


@pytest.mark.parametrize("layers", ["*", "1"], ids=["all", "hybrid"])
def test_linear_attention_heals_towards_the_softmax_that_stood_there(
    trained: Path, texts: dict[str, str], how: dict[str, Any], layers: str
) -> None:
    """Kept queries, keys and values are worth something: before healing and after it, at equal size."""
    original = dt.load(trained)
    learning = {"kind": "distillation", "logits": 1.0, "hidden": 1.0, "transfer": 1.0}
    given: dict[str, Any] = {"texts": texts["held_out"], "tokenizer": dt.load_tokenizer(trained), "rounds": 0}
    swapped = {f"blocks.{layers}.mixer": "linear"}
    new, report = dt.swap(original, swapped, heal=how | {"objective": learning}, **given)
    nats = {column.name: column.nats for column in report.columns}
    assert nats["before"] < nats["after"], nats
    assert nats["after"] - nats["after, healed"] > 0.25 * (nats["after"] - nats["before"]), nats
    assert nats["after"] < nats["rival"] and nats["after, healed"] < nats["rival, healed"], nats
    kl = {column.name: column.quality.kl for column in report.columns if column.quality is not None}
    assert layers != "*" or kl["after, healed"] < 0.8 * kl["after"], kl  # half of them lose next to nothing here
    assert [v.stage for v in report.verdicts] == ["as it is", "healed"]
    assert [b.mixer.kind for b in new.spec.blocks] == [["attention", "linear"], ["linear"] * 2][layers == "*"]


def test_the_shipped_healing_reads() -> None:
    root = Path(__file__).parents[2]
    found = Comparison.load(root / "recipes" / "heal_linear.yaml")
    spec = dt.load(root / "assets" / "pydoc-llama").spec
    linear = {a.name: [b.mixer.kind for b in override(spec, a.swap).blocks].count("linear") for a in found.arms}
    assert linear == {"as it is": 0} | {n: 4 for n in linear if "hybrid" in n} | {n: 8 for n in linear if "all" in n}
    assert len(found.seeds) >= 2 and len({a.heal.model_dump_json() for a in found.arms if a.heal}) == 1
    rivals = {other: a.redraw for a in found.arms for other in a.rival_of}
    assert rivals == {"hybrid": True, "all linear": True}


def test_recipes_of_healing_are_strict(how: dict[str, Any], trained: Path) -> None:
    assert read_heal(how).objective == NextToken()
    objective = {"kind": "distillation", "logits": 0.5, "direction": "reverse"}
    arm = {"name": "a", "swap": HALVED, "heal": how | {"objective": objective, "pack": "none"}}
    recipe = {"name": "x", "model": {"path": str(trained)}, "data": {"corpus": {"kind": "pydoc"}}, "arms": [arm]}
    read = Comparison.load(recipe).arms[0].heal
    assert read is not None and read.objective == Distillation(logits=0.5, direction="reverse") and read.pack == "none"
    with pytest.raises(SpecError, match="did you mean 'distillation'"):
        read_heal(how | {"objective": "distilation"})
    with pytest.raises(SpecError, match="did you mean 'objective'"):
        read_heal(how | {"objectiv": "next_token"})


def test_a_swap_that_changes_the_vocabulary_cannot_learn_from_the_original(trained: Path, how: dict[str, Any]) -> None:
    original = dt.load(trained)
    grown = dt.build(original.spec.replace(vocab=original.spec.vocab + 3))
    grown.origin = original.origin
    with pytest.raises(SpecError, match="a teacher shares its student's vocabulary"):
        heal(grown, read_heal(how | {"objective": "distillation"}), 0, original)
