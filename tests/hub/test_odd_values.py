"""Values of another sort or size than any model has, files that contradict one another: one clear error each, at once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dovetail as dt
from dovetail.errors import CheckpointError, ConfigError, DovetailError, SpecError
from dovetail.hub import files, generation

SPEC = {
    "kind": "decoder",
    "vocab": 24,
    "dim": 16,
    "depth": 2,
    "context": 32,
    "blocks": {"mixer": {"kind": "attention"}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small whole checkpoint in the LLaMA layout."""
    return dt.save(dt.build(SPEC), tmp_path / "model")


def edit(folder: Path, file: str = "config.json", **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rope(**said: Any) -> dict[str, Any]:
    return {"rope_theta": None, "rope_scaling": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0} | said}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quantization_config": "awq"}, "awq"),
        ({"quantization_config": [1]}, "[1]"),
        (rope(factor="abc"), "factor"),
        (rope(factor=float("nan")), "factor"),
        (rope(rope_type=["linear"]), "rope_type"),
        (rope(rope_theta="abc"), "rope_theta"),
        (rope(rope_theta=-5.0), "rope_theta"),
        (rope(rope_theta=0), "rope_theta"),
        (rope(rope_theta=float("nan")), "rope_theta"),
        (rope(rope_type="yarn", original_max_position_embeddings="x"), "original_max_position_embeddings"),
        (rope(rope_type="yarn", original_max_position_embeddings=0), "original_max_position_embeddings"),
        (rope(rope_type="longrope", short_factor=["a"], long_factor=[1.0]), "short_factor"),
        (rope(rope_type="longrope", short_factor="ab", long_factor=[1.0]), "short_factor"),
        (rope(partial_rotary_factor=0.5), "partial_rotary_factor"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"attention_dropout": 2.0}, "2.0"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"model_type": 5}, "5"),
        ({"model_type": ["llama"]}, "llama"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"hidden_size": 2**61}, "config"),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**18}, "num_hidden_layers"),
        ({"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_values_of_a_config(folder: Path, changes: dict[str, Any], named: str) -> None:
    edit(folder, **changes)
    start = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        dt.load(folder)
    assert named in str(caught.value) and caught.value.where
    assert time.perf_counter() - start < 5


def test_depth_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    edit(folder, num_hidden_layers=10**9)
    with pytest.raises(ConfigError, match="at most 10000"):
        dt.load(folder)


def test_architectures_of_another_sort(tmp_path: Path) -> None:
    spec = {"kind": "encoder", "vocab": 24, "dim": 16, "depth": 1, "context": 32, "position": {"kind": "learned"}}
    block = {
        "kind": "post",
        "norm": {"kind": "layer", "eps": 1e-12},
        "feedforward": {"kind": "mlp", "activation": "gelu"},
    }
    block["mixer"] = {"kind": "attention", "heads": 2, "bias": "all", "position": "none"}
    head = {"norm": {"kind": "layer", "eps": 1e-12}}
    spec |= {"norm_in": {"kind": "layer", "eps": 1e-12}, "norm": None, "token_types": 2, "blocks": block}
    folder = dt.save(dt.build(spec | {"head": head | {"kind": "mlm"}}), tmp_path / "bert")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    for wrong in (5, {"a": 1}):
        edit(folder, architectures=wrong)
        with pytest.raises(ConfigError, match="architectures"):
            dt.load(folder)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"hidden_size": ' + "9" * 5000 + "}"])
def test_json_that_python_gives_up(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="not readable JSON"):
        dt.load(folder)


def test_dtypes_that_are_not_computed_in(folder: Path) -> None:
    for name in ("int64", torch.int8, "float8_e4m3fn", "bool"):
        with pytest.raises(CheckpointError, match="not computed in"):
            dt.load(folder, dtype=name)
    assert dt.load(folder, dtype=torch.bfloat16).head_part.linear.weight.dtype == torch.bfloat16


def test_two_colons_too_many(folder: Path) -> None:
    with pytest.raises(SpecError, match="0:2:1:1"):
        dt.override(dt.load(folder).spec, {"blocks.0:2:1:1.mixer.heads": 2})


def test_the_native_layout_says_its_version_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    native = dt.save(dt.load(folder), tmp_path / "native", format="dovetail")
    dt.load(native)
    whole = (native / "dovetail.json").read_text()
    edit(native, "dovetail.json", dovetail=99)
    with pytest.raises(ConfigError, match="later version"):
        dt.load(native)
    (native / "dovetail.json").write_text(whole)
    edit(native, "dovetail.json", foo=1)
    with pytest.raises(ConfigError, match="'foo'"):
        dt.load(native)
    data = json.loads(whole)
    data["spec"]["depth"] = 10**9
    (native / "dovetail.json").write_text(json.dumps(data))
    with pytest.raises(DovetailError):
        dt.load(native)


def shard(folder: Path) -> dict[str, str]:
    tensors = load_file(folder / files.SINGLE)
    (folder / files.SINGLE).unlink()
    placed = {k: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, k in enumerate(tensors)}
    for name in set(placed.values()):
        save_file({k: t for k, t in tensors.items() if placed[k] == name}, folder / name)
    (folder / files.INDEX).write_text(json.dumps({"weight_map": placed}))
    return placed


def test_an_index_beside_other_weights(folder: Path) -> None:
    """transformers reads the single file; which of the two is meant cannot be told."""
    single = (folder / files.SINGLE).read_bytes()
    placed = shard(folder)
    dt.load(folder)
    (folder / "consolidated.safetensors").write_bytes(single)  # Mistral's own layout beside it
    dt.load(folder)
    for name in (files.SINGLE, "model-00003-of-00003.safetensors"):
        (folder / name).write_bytes(single)
        with pytest.raises(CheckpointError, match=f"{name} is not in {files.INDEX}"):
            dt.load(folder)
        (folder / name).unlink()
    long = {k: "x" * 5000 if i else n for i, (k, n) in enumerate(placed.items())}
    for path in folder.glob("model-*"):
        path.rename(folder / f"part{path.name}")
    (folder / files.INDEX).write_text(json.dumps({"weight_map": long}))
    with pytest.raises(CheckpointError, match="not there"):
        dt.load(folder)


@pytest.mark.parametrize(
    "swapped", [("self_attn.q_proj", "self_attn.k_proj", 4), ("mlp.gate_proj", "mlp.up_proj", 8)], ids=["qkv", "glu"]
)
def test_parts_that_make_up_for_one_another(folder: Path, swapped: tuple[str, str, int]) -> None:
    one, other, rows = swapped
    tensors = load_file(folder / files.SINGLE)
    a, b = f"model.layers.0.{one}.weight", f"model.layers.0.{other}.weight"
    tensors[a], tensors[b] = tensors[a][rows:].clone(), torch.cat([tensors[b], tensors[a][:rows]])
    save_file(tensors, folder / files.SINGLE)
    with pytest.raises(CheckpointError, match=f"{a} is stored as"):
        dt.load(folder)


def test_what_is_said_of_generating_is_kept(folder: Path) -> None:
    assert dt.load(folder).origin.decoding == {}
    edit(folder, forced_bos_token_id=0, min_length=0, no_repeat_ngram_size=3, length_penalty=1.0, bad_words_ids=None)
    assert dt.load(folder).origin.decoding == {"forced_bos_token_id": 0, "no_repeat_ngram_size": 3}
    (folder / "generation_config.json").write_text(json.dumps({"min_length": 12, "repetition_penalty": 1.2}))
    assert dt.load(folder).origin.decoding == {"min_length": 12, "repetition_penalty": 1.2}
    for start, told in ((3, {}), (5, {"decoder_start_token_id": 5})):
        (folder / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": start}))
        assert dt.load(folder).origin.decoding == {}
        assert generation.unapplied(folder, {"is_encoder_decoder": True, "decoder_start_token_id": 3}) == told
