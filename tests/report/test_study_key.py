"""What a study's key tells apart, and what it does not: a run is found again only where it would come out the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dovetail.errors import SpecError
from dovetail.parts.attention.linear import LinearAttention
from dovetail.report.lengths import Variant
from dovetail.report.study_key import key, said
from dovetail.report.study_recipe import Study
from dovetail.training.recipe import Train


def base(folder: Path, checkpoint: Path) -> dict[str, Any]:
    (folder / "text").write_text("a text")
    return {
        "model": {"kind": "decoder", "dim": 8, "depth": 1, "blocks": {"mixer": {"kind": "linear", "heads": 1}}},
        "tokenizer": str(checkpoint),
        "data": {"train": {"kind": "text", "path": str(folder / "text")}},
        "train": {"steps": 2, "length": 8, "device": "cpu"},
    }


def key_of(of: dict[str, Any], **change: Any) -> str:
    dotted = {path.replace("__", "."): value for path, value in change.items()}
    asked = Study.load({"name": "s", "base": of, "seeds": [0], "arms": [{"name": "a", "change": dotted}]})
    return key(asked, asked.arms[0], 0)


def test_what_is_off_is_not_what_is_left_out(tmp_path: Path, checkpoint: Path) -> None:
    of = base(tmp_path, checkpoint)
    off = {
        "model__blocks__mixer__normalise": False,
        "model__blocks__feedforward": None,
        "model__blocks__norm": {"kind": "layer", "bias": False},
        "model__context": None,  # which is the rows' length where it is left out
        "train__steps": 3,
    }
    keys = [key_of(of), key_of(of, model__blocks__norm="layer"), *(key_of(of, **{path: v}) for path, v in off.items())]
    assert len(set(keys)) == len(keys)


def test_a_default_may_be_written_out_and_checkpoints_kept(tmp_path: Path, checkpoint: Path) -> None:
    of = base(tmp_path, checkpoint)
    out = {
        "model__blocks__mixer__normalise": True,
        "model__blocks__feedforward": "glu",
        "train__graph": False,
        "adapter": None,
        "objective": {"kind": "next_token"},
        "train__keep": 1,  # not the default, but of no matter
    }
    assert {key_of(of, **{path: value}) for path, value in out.items()} == {key_of(of)}


def test_a_field_that_is_added_later_changes_nothing_unless_it_is_said() -> None:
    class LaterTrain(Train):
        new: bool = True

    class LaterLinear(LinearAttention):
        new: int | None = 4

    assert said(LaterTrain(steps=2)) == said(Train(steps=2)) == {"steps": 2}
    assert said(LaterTrain(steps=2, new=False)) == {"steps": 2, "new": False}
    assert said(LaterLinear(heads=2)) == said(LinearAttention(heads=2)) == {"kind": "linear", "heads": 2}
    assert said(LaterLinear(new=None)) == {"kind": "linear", "new": None}


def test_a_swap_is_kept_as_it_is_written() -> None:
    bare, off = (
        Variant(name="v", swap={"blocks.*.mixer": one}) for one in ({"kind": "linear"}, {"kind": "linear", "normalise": False})
    )  # fmt: skip
    assert said(bare) != said(off) == {"name": "v", "swap": {"blocks.*.mixer": {"kind": "linear", "normalise": False}}}


def test_a_tokenizer_is_read_too(tmp_path: Path, checkpoint: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, folder / name)
    of = base(tmp_path, checkpoint) | {"tokenizer": str(folder)}
    before = key_of(of)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["merges"] = data["model"]["merges"][:5]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert key_of(of) != before


def test_a_model_that_is_wrong_is_said_of_its_arm(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(SpecError, match=r"normalize.*\n.*arm 'a': model\.blocks.*\n.*normalise"):
        key_of(base(tmp_path, checkpoint), model__blocks__mixer__normalize=False)
