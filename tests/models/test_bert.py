"""BERT and RoBERTa against transformers: bare, with the heads of their checkpoints, in files of every age."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import encoders
import peers
import pytest
import torch
from encoders import CONTEXT, SIZES, TOKENS, TYPES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import dovetail as dt
from dovetail.errors import CheckpointError, ConfigError
from dovetail.models.config import ConfigReader
from dovetail.models.family import find
from dovetail.models.resolve import resolved
from oracles import oracle_for

MASK = (torch.arange(9)[None] < torch.tensor([9, 5, 7])[:, None]).long()
# What our outputs and theirs are called, for each class.
PICKS: dict[str, tuple[Any, Any]] = {
    "Model": (
        lambda out: torch.cat([out.last_hidden_state, out.pooler_output[:, None]], 1),
        lambda out: torch.cat([out.last_hidden_state, out.pooler_output[:, None]], 1),
    ),
    "ForMaskedLM": (lambda out: out.logits, lambda out: out.logits),
    "ForPreTraining": (
        lambda out: torch.cat([out.logits.flatten(), out.class_logits.flatten()])[None],
        lambda out: torch.cat([out.prediction_logits.flatten(), out.seq_relationship_logits.flatten()])[None],
    ),
    "ForSequenceClassification": (lambda out: out.class_logits, lambda out: out.logits),
    "ForTokenClassification": (lambda out: out.class_logits, lambda out: out.logits),
    "ForNextSentencePrediction": (lambda out: out.class_logits, lambda out: out.logits),
}
relaxed = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@oracle_for("model", "encoder")
@pytest.mark.parametrize("kind", list(PICKS))
@relaxed
@given(config=encoders.configs())
def test_bert_equals_transformers(kind: str, config: dict[str, Any]) -> None:
    if "Classification" in kind:
        config |= {"num_labels": 3}
    encoders.check(f"Bert{kind}", config, *PICKS[kind], 1e-9)


@pytest.mark.parametrize("kind", ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"])
@relaxed
@given(config=encoders.configs(), padding=st.sampled_from([1, 0]))
def test_roberta_equals_transformers(kind: str, config: dict[str, Any], padding: int) -> None:
    config |= {"pad_token_id": padding, "max_position_embeddings": CONTEXT + padding + 1}
    encoders.check(f"Roberta{kind}", config, *PICKS[kind], 1e-9)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_fp32_promise_with_padding(name: str, tmp_path: Path) -> None:
    """Right-padded, where both say where a token stands; what stands on padding is nobody's business."""
    theirs = encoders.peer(name, SIZES | {"max_position_embeddings": 20, "pad_token_id": 1}, tmp_path, torch.float32)
    ours = dt.load(tmp_path)
    tokens = torch.where(MASK > 0, TOKENS, 1)
    weight = MASK[..., None] * torch.randn(3, 9, encoders.VOCAB)
    a = ours(tokens, attention_mask=MASK).logits
    b = theirs(input_ids=tokens, attention_mask=MASK).logits
    peers.close(a * MASK[..., None], b * MASK[..., None], 1e-4)
    table = dict(theirs.named_parameters())
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    grads = peers.stored_view(ours, {n: p.grad for n, p in ours.named_parameters()})
    for stored, g in grads.items():
        if (
            stored in table and "word_embeddings" not in stored and "position" not in stored
        ):  # their padding rows learn nothing
            peers.close(g, table[stored].grad, 1e-4 if "key.bias" not in stored else 1e9, stored)


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel"])
def test_padding_on_either_side(name: str, tmp_path: Path) -> None:
    """RoBERTa counts positions from the padding's id, BERT must be told them; ours count by the mask."""
    theirs = encoders.peer(name, SIZES | {"max_position_embeddings": 20, "pad_token_id": 1}, tmp_path)
    encoders.check_padded_like(theirs, dt.load(tmp_path), 1e-9, positions=name == "BertModel")


def store(folder: Path, change: Any, **config: Any) -> None:
    """Edits a directory's tensors and config in place."""
    path = folder / "model.safetensors"
    save_file({n: t.contiguous().clone() for n, t in change(load_file(path)).items()}, path, metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not ...}))


def test_files_as_the_first_releases_left_them(tmp_path: Path) -> None:
    """bert-base-uncased: says ForMaskedLM, carries pooler and next-sentence head, gamma and beta, ids as a buffer."""
    theirs = encoders.peer("BertForPreTraining", SIZES, tmp_path / "in")

    def old(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for n, t in tensors.items()
        }
        buffer = {"bert.embeddings.position_ids": torch.arange(CONTEXT)[None]}
        return renamed | buffer | {"cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"]}

    store(
        tmp_path / "in",
        old,
        architectures=["BertForMaskedLM"],
        model_type=...,
        gradient_checkpointing=False,
        num_labels=3,
    )
    ours = dt.load(tmp_path / "in")
    peers.check_round_trip(ours, tmp_path / "in", tmp_path / "out")
    out, ref = ours(TOKENS, token_types=TYPES), theirs(input_ids=TOKENS, token_type_ids=TYPES)
    peers.close(out.logits, ref.prediction_logits, 1e-9)
    peers.close(out.class_logits, ref.seq_relationship_logits, 1e-9)
    store(tmp_path / "in", lambda t: {n: v for n, v in t.items() if "seq_rel" not in n and "pooler" not in n})
    ours = dt.load(tmp_path / "in")
    assert ours.spec.pooling is None and ours.spec.classifier is None
    peers.check_round_trip(ours, tmp_path / "in", tmp_path / "lean")
    store(tmp_path / "in", lambda t: t | {"cls.predictions.decoder.weight": t["cls.predictions.decoder.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"cls\.predictions\.decoder\.weight"):
        dt.load(tmp_path / "in")


def test_a_bare_model_without_its_prefix_or_pooler(tmp_path: Path) -> None:
    theirs = encoders.peer("BertModel", SIZES, tmp_path / "in")
    store(tmp_path / "in", lambda t: {n: v for n, v in t.items() if "pooler" not in n})
    ours = dt.load(tmp_path / "in")
    assert ours.spec.pooling is None and ours.spec.head is None
    peers.check_round_trip(ours, tmp_path / "in", tmp_path / "out")
    peers.close(ours(TOKENS).last_hidden_state, theirs(input_ids=TOKENS).last_hidden_state, 1e-9)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["BertForMultipleChoice"]}, "BertForMultipleChoice"),
        ({"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering"),
        ({"is_decoder": True}, "is_decoder"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"hidden_size": 13}, "num_attention_heads"),
        ({"hidden_act": "silly"}, "silly"),
        ({"embedding_size": 8}, "embedding_size"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    encoders.peer("BertModel", SIZES, tmp_path)
    store(tmp_path, lambda t: t, **change)
    with pytest.raises(ConfigError, match=named) as caught:
        dt.load(tmp_path)
    assert caught.value.where and (caught.value.remedy or named == "num_attention_heads")


@pytest.mark.parametrize("kind", [kind for kind in PICKS if kind != "ForNextSentencePrediction"])
def test_a_new_model_in_the_published_layout(kind: str, tmp_path: Path) -> None:
    import transformers as hf

    encoders.peer(f"Bert{kind}", SIZES, tmp_path / "in")
    model = dt.build(dt.load(tmp_path / "in").spec, seed=1)
    dt.save(model, tmp_path / "out")
    theirs = getattr(hf, f"Bert{kind}").from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    ours, ref = PICKS[kind]
    with torch.no_grad():
        peers.close(ours(model(TOKENS)), ref(theirs(input_ids=TOKENS)), 1e-4)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["architectures"] == [f"Bert{kind}"]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    ("name", "pooled"),
    [
        ("Bert", True),
        ("Bert", False),
        ("Roberta", True),
        ("XLMRoberta", False),
        ("RoFormer", True),
        ("DebertaV2", True),
    ],
)
def test_a_classifier_in_the_place_of_the_head(
    name: str, pooled: bool, classes: int, rate: float, tmp_path: Path
) -> None:
    """The class named follows the heads, so that transformers finds every tensor; and so for one made anew."""
    import transformers as hf

    encoders.peer(f"{name}ForMaskedLM", SIZES, tmp_path / "in")
    loaded = dt.load(tmp_path / "in", dtype=torch.float32)
    deep: dict[str, Any] = {"activation": "gelu" if name in ("RoFormer", "DebertaV2") else "tanh"}
    deep |= {"dropout": rate} if name in ("Roberta", "RoFormer") else {}
    rate = 0.1 if not pooled and name == "DebertaV2" else rate
    change: dict[str, Any] = {"head": None, "classifier": {"kind": "linear", "bias": True}, "classes": classes}
    change |= {"classifier_dropout": rate}
    change |= {"pooling": {"kind": "dense", "of": "first"} | (deep if name != "Bert" else {})} if pooled else {}
    model = peers.randomise(dt.build(dt.override(loaded.spec, change)))
    short = "SequenceClassification" if pooled else "TokenClassification"
    for origin in (loaded.origin, None):
        model.origin = origin
        out = dt.save(model, tmp_path / f"out{origin is None}")
        cls = getattr(hf, f"AutoModelFor{short}")
        theirs, told = cls.from_pretrained(out, output_loading_info=True)
        assert not [n for n in told["missing_keys"] if "embed_positions" not in n] and not told["unexpected_keys"]
        said = json.loads((out / "config.json").read_text())
        cls = name.removeprefix("XLM") if origin is None else name
        assert said["architectures"] == [f"{cls}For{short}"]
        with torch.no_grad():
            peers.close(model(TOKENS).class_logits, theirs.eval()(TOKENS).logits, 1e-4)


def test_what_the_layout_cannot_say(tmp_path: Path) -> None:
    encoders.peer("BertModel", SIZES, tmp_path / "in")
    spec = dt.load(tmp_path / "in").spec
    for change in (
        {"pooling": {"kind": "concat", "of": ["mean", "first"]}},
        {"blocks.*.mixer.position": "rope"},
        {"norm": "layer"},
    ):
        model = dt.build(dt.override(spec, change))
        with pytest.raises(CheckpointError, match="no published layout"):
            dt.save(model, tmp_path / "out")
        dt.save(model, tmp_path / "own", format="dovetail")
        again = dt.load(tmp_path / "own")
        assert again.spec == model.spec
        with torch.no_grad():
            assert torch.equal(again(TOKENS).last_hidden_state, model(TOKENS).last_hidden_state)


def test_positions_from_0_are_not_roberta_s(tmp_path: Path) -> None:
    """Heads that are GELU over other blocks are its own; a padding of id -1 is nobody's."""
    encoders.peer("BertForMaskedLM", SIZES, tmp_path / "in")
    model = dt.build(dt.override(dt.load(tmp_path / "in").spec, {"blocks.*.feedforward.activation": "mish"}))
    with pytest.raises(CheckpointError, match="positions that begin at 0"):
        dt.save(model, tmp_path / "out")


def test_lora_goes_to_peft_and_back(tmp_path: Path) -> None:
    """PEFT loads what is saved for an encoder, under its names, and gives the same."""
    from peft import PeftModel

    theirs = encoders.peer("BertForMaskedLM", SIZES, tmp_path / "in", torch.float32)
    model = dt.adapt(dt.load(tmp_path / "in"), dt.adapters.Lora(rank=2))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "adapters" in name:
                p.normal_()
        dt.save_adapter(model, tmp_path / "adapter")
        said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        assert said["task_type"] == "FEATURE_EXTRACTION" and set(said["target_modules"]) == {
            "query",
            "key",
            "value",
            "dense",
        }
        adapted = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
        peers.close(model(TOKENS).logits, adapted(input_ids=TOKENS).logits, 1e-4)
        again = dt.load_adapter(dt.load(tmp_path / "in"), tmp_path / "adapter")
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("kind", ["bert", "roberta", "roformer"])
def test_silent_configs_mean_what_transformers_assumes(kind: str) -> None:
    """A config that says only its sizes: the rest is each family's default there; written back, it stays silent."""
    from transformers import AutoConfig

    config = {"model_type": kind} | SIZES
    spec: Any = find(config, kind).read(ConfigReader(config))
    made = AutoConfig.for_model(**config)
    block = spec.blocks[0]
    rows = made.max_position_embeddings - (made.pad_token_id + 1 if kind == "roberta" else 0)
    assert spec.context == rows and spec.token_types == made.type_vocab_size
    assert block.norm.eps == spec.norm_in.eps == made.layer_norm_eps
    assert block.dropout == spec.dropout == made.hidden_dropout_prob
    assert (
        block.mixer.dropout == made.attention_probs_dropout_prob
        and block.feedforward.activation.kind == made.hidden_act
    )
    assert spec.init.std == made.initializer_range
    assert find(config, kind).write(spec, config) == config
    again = find(config, kind).write(spec, {})
    assert resolved(find(again, kind).read(ConfigReader(again))) == resolved(spec)
