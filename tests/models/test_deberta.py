"""DeBERTa-v2 and v3 against transformers: bare, with the heads of their checkpoints, in files of every age."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import encoders
import peers
import pytest
import torch
from encoders import TOKENS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import dovetail as dt
from dovetail.errors import CheckpointError, ConfigError
from dovetail.models.config import ConfigReader
from dovetail.models.deberta import read, write
from oracles import oracle_for

V3 = {  # what DeBERTa-v3 says beside its sizes
    "relative_attention": True, "position_buckets": 6, "max_relative_positions": -1, "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
SMALL = encoders.SIZES | V3
PICKS: dict[str, tuple[Any, Any]] = {
    "Model": (lambda out: out.last_hidden_state, lambda out: out.last_hidden_state),
    "ForMaskedLM": (lambda out: out.logits, lambda out: out.logits),
    "ForSequenceClassification": (lambda out: out.class_logits, lambda out: out.logits),
    "ForTokenClassification": (lambda out: out.class_logits, lambda out: out.logits),
    "ForQuestionAnswering": (
        lambda out: out.class_logits,
        lambda out: torch.stack([out.start_logits, out.end_logits], -1),
    ),
}
relaxed = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes the square root of the scale in fp32, whatever the weights are."""
    from transformers.models.deberta_v2 import modeling_deberta_v2

    def scale(query: torch.Tensor, factor: int) -> torch.Tensor:
        return torch.sqrt(torch.tensor(query.shape[-1] * factor, dtype=torch.float64))

    monkeypatch.setattr(modeling_deberta_v2, "scaled_size_sqrt", scale)


@st.composite
def configs(draw: Any) -> dict[str, Any]:
    config = draw(encoders.configs()) | {"tie_word_embeddings": True}
    relative = draw(st.integers(0, 3)) > 0
    return config | {
        "layer_norm_eps": draw(st.sampled_from([1e-7, 1e-5])),
        "relative_attention": relative,
        "position_biased_input": draw(st.booleans()),
        "position_buckets": draw(st.sampled_from([-1, 4, 6])),
        "max_relative_positions": draw(st.sampled_from([-1, 7])),
        "pos_att_type": draw(st.sampled_from([["p2c", "c2p"], ["c2p"], ["p2c"], "c2p|p2c"])),
        "norm_rel_ebd": draw(st.sampled_from(["layer_norm", "none"])) if relative else "none",
        "share_att_key": True,
        "conv_kernel_size": draw(st.sampled_from([0, 1, 3, 5])),
        "conv_act": draw(st.sampled_from(["gelu", "tanh"])),
    }


def check(kind: str, config: dict[str, Any]) -> None:
    config |= {"num_labels": 3} if "Classification" in kind else {}
    encoders.check(f"DebertaV2{kind}", config, *PICKS[kind], 1e-9)


@oracle_for("block", "post_convolved")
@pytest.mark.parametrize("kind", list(PICKS))
@relaxed
@given(config=configs(), legacy=st.booleans())
def test_deberta_equals_transformers(kind: str, config: dict[str, Any], legacy: bool) -> None:
    check(kind, config | {"legacy": legacy})


@pytest.mark.parametrize("kind", ["Model", "ForMaskedLM"])
def test_fp32_promise_with_padding(kind: str, tmp_path: Path) -> None:
    """With the convolution, whose neighbours beyond the end are zeros on both sides."""
    theirs = encoders.peer(f"DebertaV2{kind}", SMALL | {"conv_kernel_size": 3}, tmp_path, torch.float32)
    ours, (mine, other) = dt.load(tmp_path), PICKS[kind]
    mask = (torch.arange(9)[None] < torch.tensor([9, 5, 7])[:, None]).long()
    a = mine(ours(TOKENS, attention_mask=mask)) * mask[..., None]
    b = other(theirs(input_ids=TOKENS, attention_mask=mask)) * mask[..., None]
    peers.close(a, b, 1e-4)
    weight = torch.randn(b.shape)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    grads = peers.stored_view(ours, {n: p.grad for n, p in ours.named_parameters()})
    scale = max(float(p.grad.abs().max()) for p in theirs.parameters())
    for name, p in theirs.named_parameters():
        assert float((grads[name] - p.grad).abs().max()) <= 1e-4 * max(float(p.grad.abs().max()), 1e-2 * scale), name


def store(folder: Path, change: Any, **config: Any) -> None:
    """Edits a directory's tensors and config in place; ... removes a key."""
    path = folder / "model.safetensors"
    save_file({n: t.contiguous().clone() for n, t in change(load_file(path)).items()}, path, metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not ...}))


def test_files_as_v3_left_them(tmp_path: Path) -> None:
    """No architecture, no `legacy`; the new head, a discriminator that nothing reads, an idle position table."""
    theirs = encoders.peer("DebertaV2ForMaskedLM", SMALL | {"legacy": False}, tmp_path / "in")
    idle = {
        "mask_predictions.dense.weight": torch.ones(12, 12),
        "mask_predictions.classifier.bias": torch.ones(1),
        "deberta.embeddings.position_ids": torch.arange(16)[None],
        "deberta.embeddings.position_embeddings.weight": torch.ones(16, 12),
    }
    store(tmp_path / "in", lambda t: t | idle, architectures=..., legacy=...)
    ours = dt.load(tmp_path / "in")
    peers.check_round_trip(ours, tmp_path / "in", tmp_path / "out")
    peers.close(ours(TOKENS).logits, theirs(input_ids=TOKENS).logits, 1e-9)
    store(tmp_path / "in", lambda t: {n: v for n, v in t.items() if not n.startswith("lm_predictions")})
    headless = dt.load(tmp_path / "in")
    assert headless.spec.head is None
    peers.check_round_trip(headless, tmp_path / "in", tmp_path / "headless")
    store(tmp_path / "in", lambda t: t | {"surprise.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match="surprise"):
        dt.load(tmp_path / "in")


def test_both_names_of_the_legacy_bias(tmp_path: Path) -> None:
    encoders.peer("DebertaV2ForMaskedLM", SMALL, tmp_path / "in")
    twice = {"decoder.bias": "bias", "decoder.weight": None}

    def doubled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        table = tensors["deberta.embeddings.word_embeddings.weight"]
        found = {f"cls.predictions.{n}": tensors[f"cls.predictions.{of}"] if of else table for n, of in twice.items()}
        return tensors | found

    store(tmp_path / "in", doubled)
    peers.check_round_trip(dt.load(tmp_path / "in"), tmp_path / "in", tmp_path / "out")
    store(tmp_path / "in", lambda t: t | {"cls.predictions.decoder.bias": t["cls.predictions.bias"] + 1})
    with pytest.raises(CheckpointError, match=r"cls\.predictions"):
        dt.load(tmp_path / "in")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"head": None},
        {"head": None, "classifier": {"kind": "linear", "bias": True}, "classes": 4, "classifier_dropout": 0.1},
        {"blocks.*.mixer.dropout": 0.25},
        {"position_buckets": -1, "max_relative_positions": 9},
        {"pos_att_type": ["c2p"], "norm_rel_ebd": "none"},
        {"blocks.*.mixer.position": "none", "position": "learned"},
        {"conv_kernel_size": 3, "conv_act": "gelu"},
    ],
    ids=["mlm", "bare", "tokens", "dropout", "distances", "terms", "absolute", "convolution"],
)
def test_a_new_model_in_the_published_layout(change: dict[str, Any], tmp_path: Path) -> None:
    """Written from a spec alone (of another config, or altered), and read by transformers with the same outputs."""
    import transformers as hf

    told = {key: value for key, value in change.items() if key in V3 or key.startswith("conv")}
    spec = read(ConfigReader(SMALL | told | {"architectures": ["DebertaV2ForMaskedLM"]}))
    model = dt.build(dt.override(spec, {key: value for key, value in change.items() if key not in told}), seed=1)
    dt.save(model, tmp_path)
    cls = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    theirs = getattr(hf, cls).from_pretrained(tmp_path, attn_implementation="eager").eval()
    mine, other = PICKS[cls.removeprefix("DebertaV2")]
    with torch.no_grad():
        peers.close(mine(model(TOKENS)), other(theirs(input_ids=TOKENS)), 1e-4)
    assert dt.load(tmp_path).spec == model.spec


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"share_att_key": False}, "share_att_key"),
        ({"pos_att_type": ["p2p"]}, "pos_att_type"),
        ({"pos_att_type": []}, "pos_att_type"),
        ({"norm_rel_ebd": "batch_norm"}, "norm_rel_ebd"),
        ({"relative_attention": False}, "norm_rel_ebd"),
        ({"embedding_size": 6}, "embedding_size"),
        ({"conv_kernel_size": 3, "conv_groups": 2}, "conv_groups"),
        ({"pooler_hidden_size": 5}, "pooler_hidden_size"),
        ({"num_attention_heads": 5}, "hidden_size 12"),
        ({"architectures": ["DebertaV2ForMultipleChoice"]}, "ForMultipleChoice"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    reader = ConfigReader(SMALL | change)
    with pytest.raises(ConfigError, match=named):
        read(reader)
        reader.finish()


def test_altered_positions_are_written() -> None:
    config = SMALL | {"model_type": "deberta-v2", "pos_att_type": "p2c|C2P", "norm_rel_ebd": "Layer_Norm"}
    spec = read(ConfigReader(config))
    assert write(spec, config) == config
    other = read(ConfigReader(config | {"position_buckets": 4, "pos_att_type": ["p2c"], "norm_rel_ebd": "none"}))
    again = write(other, config)
    assert (again["position_buckets"], again["pos_att_type"]) == (4, ["p2c"]) and read(ConfigReader(again)) == other


def test_distances_are_dropped_anew_in_every_layer() -> None:
    """The table's rows, in training alone."""
    config = SMALL | {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.0}
    model = dt.build(read(ConfigReader(config)))
    first = model.blocks[0].mixer.position
    assert first is model.blocks[1].mixer.position and first.drop == 0.5
    still = model(TOKENS).last_hidden_state
    assert torch.equal(still, model(TOKENS).last_hidden_state)
    model.train()
    for module in model.modules():
        if module is not first and hasattr(module, "drop"):
            module.drop = 0.0
    torch.manual_seed(0)
    a, b = model(TOKENS).last_hidden_state, model(TOKENS).last_hidden_state
    assert not torch.allclose(a, b) and not torch.allclose(a, still)
