"""GPT-2 against transformers, on random small configurations and on files of every age."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import dovetail as dt
from dovetail.errors import ConfigError

TOKENS = torch.randint(1, 29, (2, 11), generator=torch.Generator().manual_seed(3))


@st.composite
def configs(draw: Any) -> dict[str, Any]:
    heads, width = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([3, 4, 7]))
    return {
        "vocab_size": 29,
        "n_embd": heads * width,
        "n_head": heads,
        "n_layer": draw(st.integers(1, 3)),
        "n_positions": 12,
        "n_inner": draw(st.sampled_from([None, 11])),
        "activation_function": draw(st.sampled_from(["gelu_new", "gelu", "relu"])),
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-6])),
        "scale_attn_weights": draw(st.booleans()),
        "scale_attn_by_inverse_layer_idx": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }


def peer(config: dict[str, Any], folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {"bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**config, **ids, attn_implementation="eager")).to(dtype)
    peers.randomise(model).save_pretrained(folder)
    return model.eval()


def small(**changes: Any) -> dict[str, Any]:
    return {"vocab_size": 29, "n_embd": 8, "n_head": 2, "n_layer": 2, "n_positions": 12} | changes


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(config=configs())
def test_equals_transformers(config: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        theirs = peer(config, Path(name, "in"))
        ours = dt.load(Path(name, "in"))
        peers.check_round_trip(ours, Path(name, "in"), Path(name, "out"))
        peers.check_decoding(ours, TOKENS, 1e-9)
        peers.check_padding(ours, TOKENS, 1e-9)
        peers.check_packing(ours, TOKENS, 1e-9)
        peers.check_training(ours, theirs, {"tokens": TOKENS}, {"input_ids": TOKENS}, 1e-9)


def test_fp32_promise(tmp_path: Path) -> None:
    theirs = peer(small(), tmp_path, torch.float32)
    peers.check_training(dt.load(tmp_path), theirs, {"tokens": TOKENS}, {"input_ids": TOKENS}, 1e-4)


def test_first_files(tmp_path: Path) -> None:
    """2019's: no model_type, no activation_function, no prefix, the causal mask stored as buffers."""
    theirs = peer(small(), tmp_path / "in")
    path = tmp_path / "in/model.safetensors"
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(path).items()}
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, path, metadata={"format": "pt"})
    config = small(n_ctx=12, layer_norm_epsilon=1e-5, initializer_range=0.02, output_past=True, n_special=0)
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    ours = dt.load(tmp_path / "in")
    with torch.no_grad():
        peers.close(ours(TOKENS).logits, theirs(TOKENS).logits, 1e-9)
    peers.check_round_trip(ours, tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"blocks.*.mixer.position": "rope"}, "position"),
        ({"blocks.1.feedforward.hidden": 9}, "feedforward"),
        ({"blocks.*.mixer.kv_heads": 1}, "kv_heads"),
        ({"blocks.0.mixer.scale": 0.3}, "scale"),
        ({"norm": "rms"}, "norm"),
    ],
)
def test_what_the_layout_cannot_say(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    """Refused by name, and savable in Dovetail's own layout, from which it comes back the same."""
    peer(small(), tmp_path / "in")
    spec = dt.override(dt.load(tmp_path / "in").spec, change)
    model = dt.build(spec)
    with pytest.raises(ConfigError, match=named):
        from dovetail.models.gpt2 import write

        write(spec, {})
    dt.save(model, tmp_path / "own", format="dovetail")
    again = dt.load(tmp_path / "own")
    assert again.spec == spec
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_a_new_model_in_the_published_layout(tmp_path: Path) -> None:
    """A GPT-2 built here and saved loads in transformers with the same outputs."""
    from transformers import GPT2LMHeadModel

    peer(small(), tmp_path / "in")
    model = dt.build(dt.load(tmp_path / "in").spec, seed=1)
    dt.save(model, tmp_path / "out")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    with torch.no_grad():
        peers.close(model(TOKENS).logits, theirs(TOKENS).logits, 1e-4)
