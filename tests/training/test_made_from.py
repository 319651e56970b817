"""A checkpoint goes on with what it was made from, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dovetail as dt
from dovetail.errors import SpecError
from dovetail.training import fit
from dovetail.training.resume import weights_hash
from training.small import recipe


def test_the_model_is_compared_with_its_defaults(tmp_path: Path) -> None:
    data = recipe(tmp_path, steps=1)
    data["model"]["blocks"] = {"mixer": {"kind": "linear"}}
    fit(data, progress=False)
    with pytest.raises(SpecError, match=r"model\.blocks\S*normalise was True in the run to resume and is False"):
        fit(data, ["model.blocks.mixer.normalise=false"], resume=True, progress=False)
    with pytest.raises(SpecError, match=r"train\.lr was 0\.01"):
        fit(data, ["train.lr=0.02"], resume=True, progress=False)
    assert fit(data, ["model.blocks.mixer.normalise=true"], resume=True, progress=False).steps == 1, "as it was"
    kept = tmp_path / "out/checkpoints/step-00000001/state.json"
    state = json.loads(kept.read_text())
    del state["made_from"]  # as before it was kept; the checkpoint itself says its spec
    kept.write_text(json.dumps(state))
    with pytest.raises(SpecError, match="normalise was True"):
        fit(data, ["model.blocks.mixer.normalise=false"], resume=True, progress=False)


def test_texts_and_tokenizer_are_those_of_the_run(tmp_path: Path) -> None:
    data = recipe(tmp_path, steps=1)
    fit(data, progress=False)
    first = next((tmp_path / "cache/tokenizers").iterdir())
    first = first.rename(tmp_path / "tokenizer")  # one folder, whatever the text
    data |= {"tokenizer": str(first), "out": str(tmp_path / "other")}
    fit(data, progress=False)
    for name in ("text", "held_out"):
        path = tmp_path / name
        before = path.read_text()
        path.write_text(before.replace("return x * 7", "return y * 7").replace("f301", "g301"))
        called = "train" if name == "text" else name
        with pytest.raises(SpecError, match=rf"the text of data\.{called} changed"):
            fit(data, resume=True, progress=False)
        path.write_text(before)
    words = first / "tokenizer.json"
    before = words.read_text()
    words.write_text(json.dumps(json.loads(before) | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(SpecError, match="the tokenizer changed"):
        fit(data, resume=True, progress=False)
    kept = tmp_path / "other/checkpoints/step-00000001/state.json"
    state = json.loads(kept.read_text())
    del state["made_from"]
    kept.write_text(json.dumps(state))
    assert fit(data, resume=True, progress=False).steps == 1, "a checkpoint from before this was kept"


def test_an_adapter_goes_on_over_the_same_base(tmp_path: Path) -> None:
    data: dict[str, Any] = recipe(tmp_path, steps=1)
    fit(data, progress=False)
    base = str(tmp_path / "out")
    data |= {"model": base, "tokenizer": None, "adapter": {"kind": "lora", "rank": 2}, "out": str(tmp_path / "a")}
    fit(data, progress=False)
    assert fit(data, resume=True, progress=False).steps == 1
    model = dt.load(base)
    with torch.no_grad():
        model.norm.weight.mul_(1.5)
    dt.save(model, base, format="dovetail")
    with pytest.raises(SpecError, match="the weights of model changed"):
        fit(data, resume=True, progress=False)


def test_what_a_base_is_told_by(tmp_path: Path) -> None:
    """Its weights, wherever in a large file they change, and its configuration; not what a run writes beside them."""
    weights = torch.zeros(3_000_000)
    save_file({"w": weights}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = [weights_hash(str(tmp_path))]
    (tmp_path / "result.json").write_text("{}")
    assert weights_hash(str(tmp_path)) == found[0]
    save_file({"w": weights + 1e-7}, tmp_path / "model.safetensors")
    found.append(weights_hash(str(tmp_path)))
    (tmp_path / "config.json").write_text('{"a": 1}')
    found.append(weights_hash(str(tmp_path)))
    assert len(set(found)) == 3
