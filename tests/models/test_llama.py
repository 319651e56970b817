"""The LLaMA family against transformers, on random small configurations of every member."""

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

import dovetail as dt

CONTEXT = 16
TOLERANCE = 1e-5  # of fp64 models: the peers' norms and both rotary tables round to fp32


def rope_kinds(width: int) -> dict[str, dict[str, Any]]:
    """Every scaling, in the words of transformers 4 and 5."""
    short, long = [1.0 + 0.1 * i for i in range(width // 2)], [1.5 + i for i in range(width // 2)]
    return {
        "default": {},
        "linear": {"factor": 2.5},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
        "yarn-tuned": {
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 16.0,
            "attention_factor": 1.3,
        },
        "yarn-mscale": {"factor": 4.0, "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 0.7},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
        "longrope": {
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "short_factor": short,
            "long_factor": long,
        },
    }


def rope_parameters(kind: str, width: int, theta: float = 10_000.0) -> dict[str, Any]:
    return {"rope_type": kind.split("-")[0], "rope_theta": theta} | rope_kinds(width)[kind]


@st.composite
def configs(draw: Any) -> dict[str, Any]:
    kind = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    groups, per = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3]))
    width = draw(st.sampled_from([4, 6, 10, 14]))
    heads = groups * per
    depth = draw(st.integers(1, 3))
    own_width = draw(st.booleans()) and kind != "qwen2"
    dim = draw(st.sampled_from([12, 20])) if own_width else heads * width
    config: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": 31,
        "hidden_size": dim,
        "intermediate_size": draw(st.sampled_from([17, 24])),
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": width,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh"])),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": rope_parameters(
            draw(st.sampled_from(list(rope_kinds(width)))), width, draw(st.sampled_from([1e4, 5e5]))
        ),
        "attn_implementation": "eager",
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind in ("llama", "qwen3"):
        config["attention_bias"] = draw(st.booleans())
    if kind == "llama":
        config["mlp_bias"] = draw(st.booleans())
    if kind == "mistral":
        config["sliding_window"] = draw(st.sampled_from([None, 5]))
    if kind in ("qwen2", "qwen3") and draw(st.booleans()):
        config |= {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": draw(st.integers(0, depth))}
    return config


def peer(config: dict[str, Any], folder: Path, dtype: torch.dtype = torch.float64, **saving: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**config)
    model = peers.randomise(AutoModelForCausalLM.from_config(made, attn_implementation="eager").to(dtype))
    model.save_pretrained(folder, **saving)
    return model.eval()


def as_version_4(folder: Path) -> None:
    """Rewrites config.json the way transformers 4 said RoPE."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if config["rope_scaling"] and "factor" in rope and rope["rope_type"] in ("linear", "dynamic", "yarn"):
        rope["type"] = rope.pop("rope_type")  # as before 4.43
    config["transformers_version"] = "4.40.0"
    path.write_text(json.dumps(config, indent=2))


@settings(max_examples=24, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(config=configs(), old=st.booleans(), sharded=st.booleans())
def test_equals_transformers(config: dict[str, Any], old: bool, sharded: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, again = Path(name, "in"), Path(name, "out")
        theirs = peer(config, folder, max_shard_size="4KB" if sharded else "1GB")
        if old:
            as_version_4(folder)
        ours = dt.load(folder)
        assert (folder / "model.safetensors.index.json").exists() == sharded
        peers.check_round_trip(ours, folder, again)
        tokens = torch.randint(1, 31, (2, 13), generator=torch.Generator().manual_seed(3))
        peers.check_padding(ours, tokens, 1e-9)
        if config["rope_parameters"]["rope_type"] not in ("dynamic", "longrope"):
            peers.check_decoding(ours, tokens, 1e-9)
            peers.check_packing(ours, tokens, 1e-9)
        peers.check_training(ours, theirs, {"tokens": tokens}, {"input_ids": tokens}, TOLERANCE)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_beyond_the_trained_length(kind: str, tmp_path: Path) -> None:
    """Lengths at which the frequencies change: the whole sequence at once equals transformers."""
    config = small(rope_parameters=rope_parameters(kind, 8))
    theirs = peer(config, tmp_path)
    ours = dt.load(tmp_path)
    for length in (5, 8, 9, 40):
        tokens = torch.randint(1, 31, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            peers.close(ours(tokens).logits, theirs(tokens, use_cache=False).logits, TOLERANCE, f"{kind} at {length}")


def small(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": None,
    } | changes


def test_fp32_promise(tmp_path: Path) -> None:
    """max|difference| <= 1e-4 max|reference| in fp32, gradients too."""
    theirs = peer(small(), tmp_path, torch.float32)
    tokens = torch.randint(1, 31, (2, 13), generator=torch.Generator().manual_seed(3))
    peers.check_training(dt.load(tmp_path), theirs, {"tokens": tokens}, {"input_ids": tokens}, 1e-4)


def test_mixed_dtypes_are_kept(tmp_path: Path) -> None:
    """A bf16 model with fp32 norms stays that, and computes what transformers computes."""
    from safetensors.torch import load_file, save_file

    peer(small(), tmp_path / "in", torch.bfloat16)
    path = tmp_path / "in/model.safetensors"
    save_file({n: t.float() if "norm" in n else t for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    ours = dt.load(tmp_path / "in")
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16, torch.float32}
    peers.check_round_trip(ours, tmp_path / "in", tmp_path / "out")
    whole = dt.load(tmp_path / "in", dtype="float32")
    assert {p.dtype for p in whole.parameters()} == {torch.float32}


def test_tied_under_either_name(tmp_path: Path) -> None:
    """A tied table may be stored as the embedding, as the head, or as both; each is saved as it came."""
    from safetensors.torch import load_file, save_file

    peer(small(tie_word_embeddings=True), tmp_path / "in")
    path = tmp_path / "in/model.safetensors"
    tensors = load_file(path)
    table = tensors.pop("model.embed_tokens.weight")
    for i, names in enumerate([("lm_head.weight",), ("lm_head.weight", "model.embed_tokens.weight")]):
        save_file(tensors | {name: table.clone() for name in names}, path, metadata={"format": "pt"})
        ours = dt.load(tmp_path / "in")
        assert torch.equal(ours.embedding.table.weight, table)
        peers.check_round_trip(ours, tmp_path / "in", tmp_path / f"out{i}")


def test_changed_and_saved_reads_back_in_transformers(tmp_path: Path) -> None:
    """A trained, swapped model saved in the published layout is what transformers then loads."""
    from transformers import AutoModelForCausalLM

    peer(small(), tmp_path / "in", torch.float32)
    ours = dt.load(tmp_path / "in")
    spec = dt.override(ours.spec, {"blocks.*.mixer.position": {"kind": "yarn", "factor": 4.0}})
    swapped = dt.build(spec)
    swapped.load_state_dict(ours.state_dict())
    with torch.no_grad():
        next(swapped.parameters()).mul_(1.5)
    dt.save(swapped, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.randint(1, 31, (2, 40))
    with torch.no_grad():
        peers.close(swapped(tokens).logits, theirs(tokens).logits, 1e-4)


def meta_layout(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Writes half-split RoPE weights as Meta does: its names, and each head's rows interleaved."""
    from safetensors.torch import save_file

    def interleave(w: torch.Tensor, heads: int) -> torch.Tensor:
        return w.view(heads, 2, -1, w.shape[-1]).transpose(1, 2).reshape(w.shape)

    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    out = {"tok_embeddings.weight": tensors["model.embed_tokens.weight"], "norm.weight": tensors["model.norm.weight"]}
    out |= {"output.weight": tensors["lm_head.weight"], "rope.freqs": torch.ones(4)}
    names = {"v_proj": "wv", "o_proj": "wo"}
    for i in range(config["num_hidden_layers"]):
        a, b = f"model.layers.{i}", f"layers.{i}"
        out[f"{b}.attention.wq.weight"] = interleave(tensors[f"{a}.self_attn.q_proj.weight"], heads)
        out[f"{b}.attention.wk.weight"] = interleave(tensors[f"{a}.self_attn.k_proj.weight"], groups)
        out |= {f"{b}.attention.{n}.weight": tensors[f"{a}.self_attn.{m}.weight"] for m, n in names.items()}
        for m, n in {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}.items():
            out[f"{b}.feed_forward.{n}.weight"] = tensors[f"{a}.mlp.{m}.weight"]
        out[f"{b}.attention_norm.weight"] = tensors[f"{a}.input_layernorm.weight"]
        out[f"{b}.ffn_norm.weight"] = tensors[f"{a}.post_attention_layernorm.weight"]
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in out.items()}, folder / "consolidated.00.safetensors")
    params = {"dim": 24, "n_heads": heads, "n_kv_heads": groups, "n_layers": 2, "norm_eps": 1e-6, "vocab_size": -1}
    params |= {"multiple_of": 4, "rope_theta": 10000.0}
    (folder / "params.json").write_text(json.dumps(params))


def test_meta_layout(tmp_path: Path) -> None:
    """The same weights in Meta's layout (its names, RoPE interleaved) give transformers' outputs, and come back."""
    config = small(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64)
    theirs = peer(config, tmp_path / "hf")
    meta_layout(tmp_path / "in", config, peers.tensors_of(tmp_path / "hf"))
    ours = dt.load(tmp_path / "in")
    tokens = torch.randint(1, 31, (2, 13), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        peers.close(ours(tokens).logits, theirs(tokens).logits, TOLERANCE)
    peers.check_decoding(ours, tokens, 1e-9)
    dt.save(ours, tmp_path / "out")
    before, after = peers.tensors_of(tmp_path / "in"), peers.tensors_of(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["consolidated.00.safetensors", "params.json"]
    assert (tmp_path / "out/params.json").read_text().split() == json.dumps(
        json.loads((tmp_path / "in/params.json").read_text()), indent=2
    ).split()
