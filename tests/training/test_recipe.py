"""Recipes: strict, overridable, and the shipped ones parse; schedules and FLOPs by their formulas."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dovetail as dt
from dovetail.errors import SpecError
from dovetail.training import Recipe
from dovetail.training.flops import flops_per_token, parameter_count
from dovetail.training.meters import Log
from dovetail.training.recipe import read_yaml
from dovetail.training.schedules import factor
from training.small import recipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", ["tiny", "pydoc", "pydoc_draft"])
def test_shipped_recipes_parse(name: str) -> None:
    read = Recipe.load(RECIPES / f"{name}.yaml", ["train.steps=40", "train.lr=1e-3", "out=somewhere"])
    assert (read.train.steps, read.train.lr, read.out) == (40, 1e-3, "somewhere")
    assert Recipe.load(read.to_dict()) == read


def test_overrides_reach_everything(tmp_path: Path) -> None:
    data = recipe(tmp_path)
    read = Recipe.load(
        data,
        [
            "train.betas=[0.8, 0.9]",
            "model.blocks.mixer={kind: attention, heads: 2}",
            "objective={kind: next_token, z: 1e-4}",
        ],
    )
    assert read.train.betas == (0.8, 0.9) and read.model["blocks"]["mixer"]["heads"] == 2  # type: ignore[index]
    assert read.objective.z == 1e-4  # type: ignore[attr-defined]
    assert data["train"].get("betas") is None  # the source is left as it was


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.stpes=3", "(?s)'stpes'.*did you mean 'steps'"),
        ("trian.steps=3", "(?s)'trian'.*did you mean 'train'"),
        ("data.train.paht=x", "(?s)'paht'.*did you mean 'path'"),
        ("objective={kind: next_tokn}", "(?s)next_tokn.*did you mean 'next_token'"),
        ("train.schedule=cosin", "(?s)'cosin'.*train.schedule"),
        ("train.steps=many", "(?s)'many'.*train.steps"),
        ("train.steps=0", "train.steps"),
        ("tokenizer.train=12", "tokenizer.train"),
        ("train.steps", "not an override"),
        ("train.steps.deep=3", "deep"),
        ("train.lr=[1", "not YAML"),
        ("train={steps: 1, lr: 1, lr: 2}", "(?s)'lr' stands twice.*train="),
        ("train.betas=[2, 3]", "train.betas"),
        ("train.eps=-1", "train.eps"),
        ("train.eps=.inf", "train.eps"),
        ("train.weight_decay=.inf", "train.weight_decay"),
        ("train.rates={embedding*: .inf}", "train.rates"),
        ("train.seed=4294967296", "train.seed"),
        ("objective={kind: next_token, smoothing: 1.0}", "smoothing"),
        ("objective={kind: next_token, z: -0.1}", "objective.z"),
        ("train={steps: 9, schedule: constant, final: 0.2}", "(?s)'constant' reads no final.*train.final"),
        ("train={steps: 9, decay: 0.5}", "(?s)'cosine' reads no decay.*train.decay"),
    ],
)
def test_typos_are_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Recipe.load(recipe(tmp_path), [override])


def test_unreadable_recipes(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: [1, 2")
    (tmp_path / "b.yaml").write_text("- 1")
    for name, message in [("nowhere.yaml", "nowhere"), ("a.yaml", "not YAML"), ("b.yaml", "mapping")]:
        with pytest.raises(SpecError, match=message):
            Recipe.load(tmp_path / name)


def test_a_key_that_stands_twice_is_named(tmp_path: Path) -> None:
    """PyYAML takes the last. What a merge (<<) brings may stand again."""
    path = tmp_path / "a.yaml"
    path.write_text("train:\n  lr: 1\n  steps: 2\n  lr: 3\n")
    with pytest.raises(SpecError, match=r"(?s)'lr' stands twice.*a\.yaml:4"):
        read_yaml(path)
    path.write_text("a: &a {x: 1, y: 2}\nb: &b\n  <<: *a\n  x: 3\nc:\n  <<: *b\n  x: 4\n  1: 5\n  '1': 6\n")
    assert read_yaml(path)["c"] == {"x": 4, "y": 2, 1: 5, "1": 6}


def test_every_shipped_recipe_is_read() -> None:
    for path in RECIPES.glob("*.yaml"):
        read_yaml(path)


def test_a_log_with_broken_lines_is_taken_up(tmp_path: Path) -> None:
    whole = ['{"step": 1, "loss": 2.0}\n', '{"step": 2, "held_out_nats": 2.0}\n']
    (tmp_path / "log.jsonl").write_text(whole[0] + '{"step": 1, "lo\n7\n\n' + whole[1] + '{"step": 3}\n{"step')
    log = Log(tmp_path, 2)
    log.close()
    assert (tmp_path / "log.jsonl").read_text() == "".join(whole) and log.scored == 2


def test_schedules() -> None:
    def course(name: str, **more: float) -> list[float]:
        return [factor(name, i, 100, warmup=10, **more) for i in range(100)]  # type: ignore[arg-type]

    for name in ("cosine", "linear", "wsd", "constant"):
        rates = course(name, final=0.1)
        assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
        assert all(a >= b for a, b in itertools.pairwise(rates[9:])) and rates[10] == pytest.approx(1, abs=2e-2)
        assert rates[-1] == pytest.approx(1.0 if name == "constant" else 0.1)
    cosine = course("cosine", final=0.0)
    assert cosine[40] == pytest.approx(0.5 * (1 + math.cos(math.pi * 30 / 89)))
    wsd = course("wsd", decay=0.25, final=0.0)
    assert wsd[74] == 1.0 and wsd[75] == pytest.approx(24 / 25) and wsd[-1] == 0.0


@pytest.mark.parametrize("tied", [True, False])
def test_flops_equal_torchs_counter(tied: bool) -> None:
    spec = {
        "kind": "decoder", "vocab": 50, "dim": 32, "depth": 3,
        "blocks": {"mixer": {"kind": "attention", "heads": 4, "kv_heads": 2}},
        "head": {"kind": "ref", "path": "embedding"} if tied else "linear",
    }  # fmt: skip
    model = dt.build(spec)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.zeros(2, 16, dtype=torch.long))
    # torch counts the whole square of a causal attention
    assert flops_per_token(model, 16, causal=False) * 32 == counter.get_total_flops()
    assert flops_per_token(model, 16, train=True) == 3 * flops_per_token(model, 16)
    assert parameter_count(model) == sum(p.numel() for p in model.parameters())
