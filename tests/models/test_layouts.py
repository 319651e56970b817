"""Where a layout's readers do other than its keys and names suggest: what is written is what transformers computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from safetensors.torch import load_file, save_file

import dovetail as dt
from dovetail.errors import CheckpointError, ConfigError

SIZES = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA: dict[str, Any] = SIZES | {"num_key_value_heads": 1, "max_position_embeddings": 32}
BERT: dict[str, Any] = SIZES | {"max_position_embeddings": 32}
SIDES = {
    f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 8))
}
MARIAN: dict[str, Any] = SIDES | {"vocab_size": 30, "d_model": 16, "max_position_embeddings": 32, "pad_token_id": 1}
MARIAN |= {"decoder_start_token_id": 2}
T5: dict[str, Any] = {
    "vocab_size": 30,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 20,
    "num_heads": 2,
    "num_layers": 1,
    "decoder_start_token_id": 0,
}
XLNET: dict[str, Any] = {"vocab_size": 30, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 20}


def made(name: str, folder: Path, *, without: tuple[str, ...] = (), more: Any = None, **config: Any) -> Path:
    """A random model of transformers' class `name`, saved. more: keys of its config, added afterwards."""
    import transformers as hf

    cls = getattr(hf, name)
    peers.randomise(cls(cls.config_class(**config))).save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in said.items() if k not in without} | (more or {})))
    return folder


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def same(model: Any, name: str, folder: Path, length: int = 9) -> None:
    """The same logits as transformers' of the directory."""
    import transformers as hf

    theirs = getattr(hf, name).from_pretrained(folder, dtype=torch.float32).eval()
    x = torch.arange(3, 3 + length)[None] % 30
    with torch.no_grad():
        if hasattr(theirs, "get_decoder") and theirs.config.is_encoder_decoder:
            peers.close(model(x, x).logits, theirs(input_ids=x, decoder_input_ids=x).logits, 1e-4)
        else:
            peers.close(model(x).logits, theirs(x).logits, 1e-4)


def unchanged(model: Any, folder: Path, out: Path) -> None:
    """Saved again: the same tensors and the same config."""
    dt.save(model, out)
    assert json.loads((out / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    before, after = peers.tensors_of(folder), peers.tensors_of(out)
    assert before.keys() == after.keys() and all(torch.equal(before[n], t) for n, t in after.items())


def changed(model: Any, change: dict[str, Any]) -> Any:
    """A model of the changed spec, random, that comes from the same directory."""
    other = peers.randomise(dt.build(dt.override(model.spec, change)))
    other.origin = model.origin
    return other


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_a_rope_that_turns_a_part_of_a_head(kind: str, tmp_path: Path) -> None:
    """transformers' rope for these models turns all of it, whatever a config says."""
    name = f"{kind}ForCausalLM"
    for i, more in enumerate(({"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 1.0})):
        folder = made(name, tmp_path / str(i), **LLAMA)
        said = json.loads((folder / "config.json").read_text())
        said["rope_parameters"] |= more
        (folder / "config.json").write_text(json.dumps(said))
        if i == 0:
            with pytest.raises(ConfigError, match="partial_rotary_factor"):
                dt.load(folder)
        else:
            model = dt.load(folder)
            unchanged(model, folder, tmp_path / "again")
            with pytest.raises(ConfigError, match=r"turns 0\.5 of a head"):
                dt.save(changed(model, {"blocks.*.mixer.position.width": 0.5}), tmp_path / "out")


@pytest.mark.parametrize("style", [4, 5])
@pytest.mark.parametrize(
    "scaling",
    [{"kind": "llama3", "factor": 8}, {"kind": "llama3", "factor": 8, "original": 16}, {"kind": "yarn", "factor": 2}],
)
def test_scalings_say_all_that_transformers_asks_for(style: int, scaling: dict[str, Any], tmp_path: Path) -> None:
    folder = made("LlamaForCausalLM", tmp_path / "in", **LLAMA)
    if style == 4:
        said = json.loads((folder / "config.json").read_text())
        said |= {"rope_theta": said.pop("rope_parameters")["rope_theta"], "transformers_version": "4.46.0"}
        (folder / "config.json").write_text(json.dumps(said))
    model = changed(dt.load(folder), {"blocks.*.mixer.position": scaling})
    same(model, "LlamaForCausalLM", dt.save(model, tmp_path / "out"))


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "RoFormerForMaskedLM"])
def test_the_bias_of_an_untied_head(name: str, tmp_path: Path) -> None:
    """transformers adds the map's own bias there, and keeps the other without using it."""
    first, second = ("lm_head.bias", "lm_head.decoder.bias") if "Roberta" in name else (
        "cls.predictions.bias", "cls.predictions.decoder.bias")  # fmt: skip
    model = changed(dt.load(made(name, tmp_path / "tied", **BERT)), {"head.output": {"kind": "linear"}})
    out = dt.save(model, tmp_path / "untied")
    stored = peers.tensors_of(out)
    assert torch.equal(stored[first], stored[second])
    same(model, name, out)
    model.origin = None
    assert {first, second} <= peers.tensors_of(dt.save(model, tmp_path / "new")).keys()
    folder = made(name, tmp_path / "own", tie_word_embeddings=False, **BERT)
    unchanged(dt.load(folder), folder, tmp_path / "own again")
    same(dt.load(folder), name, folder)
    rewrite(folder, lambda tensors: tensors.pop(second))
    unchanged(dt.load(folder), folder, tmp_path / "one again")


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
def test_biases_that_nobody_reads(kind: str, key: str, tmp_path: Path) -> None:
    for value in (True, False):
        folder = made(f"{kind}ForCausalLM", tmp_path / str(value), more={key: value}, **LLAMA)
        model = dt.load(folder)
        same(model, f"{kind}ForCausalLM", folder)
        unchanged(model, folder, tmp_path / f"{value} again")
    if kind == "Mistral":
        name = "model.layers.0.self_attn.o_proj.bias"
        rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(16)}))
        with pytest.raises(CheckpointError, match=name):
            dt.load(folder)


@pytest.mark.parametrize(
    ("name", "config", "change"),
    [
        ("RoFormerForMaskedLM", BERT, {"context": 64}),
        ("RoFormerForMaskedLM", BERT, {"blocks.*.mixer.heads": 4}),
        ("MarianMTModel", MARIAN, {"context": 64}),
    ],
)
def test_tables_of_sines_that_no_longer_fit(name: str, config: Any, change: Any, tmp_path: Path) -> None:
    folder = made(name, tmp_path / "in", **config)
    if name == "MarianMTModel":  # which older versions stored

        def store(tensors: dict[str, torch.Tensor]) -> None:
            import transformers as hf

            inner = hf.MarianMTModel(hf.MarianConfig(**config)).model
            for side in ("encoder", "decoder"):
                table = getattr(inner, side).embed_positions.weight
                tensors[f"model.{side}.embed_positions.weight"] = table.detach().clone()

        rewrite(folder, store)
    model = dt.load(folder)
    assert model.origin.carried.kept
    unchanged(model, folder, tmp_path / "again")
    other = changed(model, change)
    same(other, name, dt.save(other, tmp_path / "out"), length=40 if "context" in change else 9)


@pytest.mark.parametrize("said", ["gated-swish", "gated-silu", "gated-gelu_new", "gated-gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("without", [(), ("dense_act_fn", "is_gated_act")])
def test_t5_s_words_for_its_feed_forward(said: str, without: tuple[str, ...], tmp_path: Path) -> None:
    folder = made("T5ForConditionalGeneration", tmp_path / "in", without=without, feed_forward_proj=said, **T5)
    model = dt.load(folder)
    unchanged(model, folder, tmp_path / "out")
    change = {f"{side}.blocks.*.feedforward.activation": "sigmoid" for side in ("encoder", "decoder")}
    out = json.loads((dt.save(changed(model, change), tmp_path / "other") / "config.json").read_text())
    assert out["feed_forward_proj"] == ("gated-" if "gated" in said else "") + "sigmoid"


@pytest.mark.parametrize(
    ("name", "config", "more"),
    [
        ("Qwen2ForCausalLM", LLAMA, {"use_mrope": False}),
        (
            "LlamaForCausalLM",
            LLAMA,
            {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"a": 1}},
        ),
        ("LlamaForCausalLM", LLAMA, {"add_cross_attention": False, "cross_attention_hidden_size": None}),
        ("LlamaForCausalLM", LLAMA, {"tie_encoder_decoder": False}),
        ("BartForConditionalGeneration", MARIAN, {"force_bos_token_to_be_generated": True, "extra_pos_embeddings": 0}),
    ],
)
def test_keys_that_change_nothing(name: str, config: Any, more: dict[str, Any], tmp_path: Path) -> None:
    folder = made(name, tmp_path / "in", more=more, **config)
    model = dt.load(folder)
    same(model, name, folder)
    unchanged(model, folder, tmp_path / "out")


def test_layer_types_while_no_window_is_in_use(tmp_path: Path) -> None:
    """`use_sliding_window` decides; transformers 5 fails on these."""
    more = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": False, "sliding_window": 4}
    folder = made("Qwen2ForCausalLM", tmp_path / "in", more=more, **LLAMA)
    model = dt.load(folder)
    assert all(block.mixer.mask is None for block in model.spec.blocks)
    unchanged(model, folder, tmp_path / "out")


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Qwen3"])
def test_a_class_where_no_type_is_said(kind: str, tmp_path: Path) -> None:
    """Mistral's window has no tensor that would tell it from a LLaMA."""
    name = f"{kind}ForCausalLM"
    window = {"sliding_window": 3} | ({} if kind == "Mistral" else {"use_sliding_window": True, "max_window_layers": 0})
    folder = made(name, tmp_path / "in", without=("model_type",), **LLAMA, **window)
    model = dt.load(folder)
    same(model, name, folder)
    unchanged(model, folder, tmp_path / "out")


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_a_body_without_its_head(kind: str, tmp_path: Path) -> None:
    folder = made(f"{kind}Model", tmp_path / "in", **LLAMA)
    with pytest.raises(ConfigError, match="tie_word_embeddings"):
        dt.load(folder)
    said = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(said))
    import transformers as hf

    x = torch.arange(3, 12)[None]
    theirs = getattr(hf, f"{kind}Model").from_pretrained(folder).eval()
    with torch.no_grad():
        peers.close(dt.load(folder)(x).last_hidden_state, theirs(x).last_hidden_state, 1e-4)


@pytest.mark.parametrize(("name", "shape"), [("o", (2, 8, 16)), ("q", (16, 16)), ("r", (16, 4, 4))])
def test_xlnet_s_maps_of_another_shape(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    folder = made("XLNetLMHeadModel", tmp_path / "in", **XLNET)
    key = f"transformer.layer.0.rel_attn.{name}"
    rewrite(folder, lambda tensors: tensors.update({key: tensors[key].reshape(shape)}))
    with pytest.raises(CheckpointError, match=f"{key} is stored as"):
        dt.load(folder)
