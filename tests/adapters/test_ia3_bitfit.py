"""(IA)³ against peft and a formula, BitFit against biases that are trained in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import promises
import pytest
import torch
from promises import TOKENS
from torch.nn import functional as F

import dovetail as dt
from dovetail.adapters import adapt, load_adapter, merge, merge_and_forget, save_adapter, trainable, unmerge
from dovetail.adapters.base import places
from dovetail.errors import BuildError, ConfigError, SpecError
from dovetail.parts.weights import Linear
from dovetail.spec import Spec
from models import peers
from oracles import oracle_for

BIASED = {"mixer": {"kind": "attention", "heads": 4, "kv_heads": 2, "bias": "all"}, "norm": {"kind": "layer"},
          "feedforward": {"kind": "mlp"}}  # fmt: skip


def peer(kind: str, folder: Path) -> Any:
    """A small transformers model with weights that matter, saved to `folder`."""
    import transformers as hf

    if kind == "llama":
        model: Any = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
            )
        )  # fmt: skip
    elif kind == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=4, n_positions=32))
    else:
        model = hf.BartForConditionalGeneration(
            hf.BartConfig(
                vocab_size=31, d_model=16, max_position_embeddings=32, encoder_layers=1, decoder_layers=1,
                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
            )
        )  # fmt: skip
    peers.randomise(model).save_pretrained(folder)
    return model.eval()


def logits(model: Any, kind: str) -> Any:
    if kind != "bart":
        return model(TOKENS).logits
    inputs = {"decoder_input_ids": TOKENS[:, :7]} if hasattr(model, "generation_config") else {}
    return (model(TOKENS, **inputs) if inputs else model(TOKENS, TOKENS[:, :7])).logits


@oracle_for("adapter", "ia3")
@pytest.mark.parametrize(
    ("kind", "targets", "feedforward"),
    [
        ("llama", ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
        ("llama", ["k_proj", "gate_proj", "up_proj"], ["up_proj"]),  # one of two fused maps by its input
        ("llama", r".*layers\.1\..*(q|v)_proj", []),
        ("gpt2", ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
        ("gpt2", ["c_attn", "c_proj"], ["c_proj"]),
        ("bart", ["q_proj", "v_proj", "fc2"], ["fc2"]),
    ],
)
def test_ia3_equals_peft(kind: str, targets: Any, feedforward: Any, tmp_path: Path) -> None:
    """The same outputs from its file, one AdamW step, and our file read there."""
    from peft import IA3Config, PeftModel, get_peft_model

    task = "SEQ_2_SEQ_LM" if kind == "bart" else "CAUSAL_LM"
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward, task_type=task)
    theirs: Any = get_peft_model(peer(kind, tmp_path / "base"), config).eval()
    parts = {n: p for n, p in theirs.named_parameters() if "ia3_l" in n}
    with torch.no_grad():
        for p in parts.values():
            p.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(dt.load(tmp_path / "base"), tmp_path / "theirs")
    want = logits(theirs.base_model.model, kind)
    got = logits(ours, kind)
    peers.close(got, want, 1e-5)

    spec = dt.adapters.adapters(ours)["default"]
    views = spec.peft_tensors(ours, "default")
    places_ = {n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in parts.items()}
    assert views.keys() == places_.keys()
    own = {n: p for n, p in ours.named_parameters() if ".adapters." in n}
    for p in own.values():
        p.requires_grad_(True)
    weight = torch.randn_like(want)
    (logits(ours, kind) * weight).sum().backward()
    (logits(theirs.base_model.model, kind) * weight).sum().backward()
    norm = sum(float(p.grad.square().sum()) for p in parts.values())
    assert norm > 0 and abs(sum(float(p.grad.square().sum()) for p in own.values()) - norm) < 1e-4 * norm
    for some in (own, parts):
        torch.optim.AdamW(some.values(), lr=0.1, eps=1e-2 * norm**0.5, weight_decay=0.1).step()
    for name, view in views.items():
        peers.close(view, places_[name], 1e-5, name)

    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(peer(kind, tmp_path / "base"), tmp_path / "ours").eval()
    peers.close(logits(again.base_model.model, kind), logits(ours, kind), 1e-5)
    with torch.no_grad():
        unmerged = logits(ours, kind)
        peers.close(logits(merge(ours), kind), unmerged, 1e-5, "merged")


@oracle_for("adapter", "ia3")
def test_ia3_is_its_formula() -> None:
    """Section 3.3 by hand in fp64: attention and feed-forward of one block with vectors in three places."""
    model = promises.decoder().double()
    adapt(model, "ia3", name="a")
    promises.shake(model, "a")
    block = model.blocks[0]
    lk, lv = (v.double() for v in block.mixer.qkv.attached()["a"].vectors)
    lff = block.feedforward.down.attached()["a"].v0.double()
    x = torch.randn(5, 16, dtype=torch.float64)
    q, k, v = (x @ block.mixer.qkv.weight.T).split([16, 8, 8], -1)
    got = block.mixer.qkv(x)
    torch.testing.assert_close(got, torch.cat([q, k * lk, v * lv], -1), rtol=0, atol=1e-14)
    gate, up = (x @ block.feedforward.gate_up.weight.T).chunk(2, -1)
    want = (lff * F.silu(gate) * up) @ block.feedforward.down.weight.T
    torch.testing.assert_close(block.feedforward(x), want, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "spec",
    [{"kind": "ia3"}, {"kind": "ia3", "targets": ["qkv:key", "gate_up:0"], "feedforward": ["gate_up:0"]}],
    ids=["paper", "fused"],
)
def test_ia3_promises(spec: dict[str, Any], tmp_path: Path) -> None:
    fused = "targets" in spec
    promises.check(promises.decoder(**({} if fused else BIASED)), spec, tmp_path, compiled=False)


@pytest.mark.parametrize("spec", [{"kind": "ia3"}, {"kind": "bitfit"}, {"kind": "bitfit", "add": True}])
def test_on_quantised_weights(spec: dict[str, Any]) -> None:
    """Around int8 codes: the start is the model, merging dequantises, and the codes come back."""
    model = promises.decoder(**({} if "add" in spec else BIASED))
    for module in model.modules():
        if isinstance(module, Linear):
            module.keep(Spec.parse("storage", "int8"))  # type: ignore[arg-type]
    plain = model(TOKENS).logits
    adapt(model, spec, name="a")
    assert torch.equal(model(TOKENS).logits, plain)
    promises.shake(model, "a")
    adapted = model(TOKENS).logits
    assert (adapted - plain).abs().max() > 1e-3
    peers.close(merge(model)(TOKENS).logits, adapted, 1e-5)
    unmerge(model)
    assert torch.equal(model(TOKENS).logits, adapted) and model.blocks[0].mixer.qkv.weight is None


def test_ia3_refusals(tmp_path: Path) -> None:
    model = promises.decoder()
    with pytest.raises(SpecError, match="none of the targets"):
        adapt(model, {"kind": "ia3", "targets": ["*:key"]})
    with pytest.raises(SpecError, match="names no weight"):
        adapt(model, {"kind": "ia3", "targets": ["embedding.table"], "feedforward": []})
    peer("llama", tmp_path / "base")
    ours = adapt(dt.load(tmp_path / "base"), {"kind": "ia3"})
    save_adapter(ours, tmp_path / "ad")
    file = tmp_path / "ad" / "adapter_config.json"
    config = json.loads(file.read_text())
    for change, message in [
        ({"feedforward_modules": ".*down"}, "pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"typo": 3}, "unknown keys"),
        ({"target_modules": None}, "target_modules"),
    ]:
        file.write_text(json.dumps(config | change))
        with pytest.raises(ConfigError, match=message):
            load_adapter(dt.load(tmp_path / "base"), tmp_path / "ad")


@oracle_for("adapter", "bitfit")
@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_bitfit_trains_the_biases(kind: str, tmp_path: Path) -> None:
    """Three steps of SGD: δ + b is what transformers' biases become when they alone train."""
    theirs = peer(kind, tmp_path)
    biases = {n: p for n, p in theirs.named_parameters() if n.endswith("bias")}
    theirs.requires_grad_(False)
    for p in biases.values():
        p.requires_grad_(True)
    ours = adapt(dt.load(tmp_path), "bitfit")
    assert sum(p.numel() for p in trainable(ours).values()) == sum(p.numel() for p in biases.values())
    optimisers = [torch.optim.SGD(biases.values(), lr=0.02), torch.optim.SGD(trainable(ours).values(), lr=0.02)]
    labels = torch.randint(0, 31, logits(theirs, kind).shape[:2])
    for _ in range(3):
        for model in (theirs, ours):
            F.cross_entropy(logits(model, kind).flatten(0, 1), labels.flatten()).backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    peers.close(logits(ours, kind), logits(theirs, kind), 1e-5)
    moved = 0
    with torch.no_grad():
        stored = peers.stored_view(merge(ours), {n: p.data for n, p in ours.named_parameters()})
    for name, p in biases.items():
        if name in stored:
            moved += 1
            peers.close(stored[name], p, 1e-4, name)
    assert moved == len(biases)
    unmerge(ours)


@oracle_for("adapter", "bitfit")
def test_bitfit_is_its_formula() -> None:
    model = promises.decoder(**BIASED).double()
    adapt(model, {"kind": "bitfit", "targets": ["*:query", "feedforward.up"], "norms": False}, name="a")
    promises.shake(model, "a")
    assert {n.split(".adapters")[0].split(".", 2)[2] for n in trainable(model)} == {"mixer.qkv", "feedforward.up"}
    qkv, x = model.blocks[1].mixer.qkv, torch.randn(3, 16, dtype=torch.float64)
    bias = qkv.bias + F.pad(qkv.attached()["a"].v0.double(), (0, 16))
    torch.testing.assert_close(qkv(x), F.linear(x, qkv.weight, bias), rtol=0, atol=1e-14)


def test_bitfit_promises(tmp_path: Path) -> None:
    """On biases and norms that are there; tests/matrix has the model without any."""
    promises.check(promises.decoder(**BIASED), {"kind": "bitfit"}, tmp_path, compiled=False)


def test_bitfit_leaves_other_adapters_alone() -> None:
    """Their own norms and biases are not the model's."""
    model = promises.decoder(**BIASED)
    adapt(model, {"kind": "bottleneck", "width": 4, "norm": "layer"}, name="other")
    adapt(model, "bitfit", name="a")
    assert not any(n.count("adapters") > 1 for n, _ in model.named_parameters())


def test_bitfit_without_biases() -> None:
    model = promises.decoder()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(SpecError, match="no bias to train") as refused:
        adapt(model, "bitfit")
    assert "add: true" in str(refused.value.remedy)
    adapt(model, {"kind": "bitfit", "add": True})
    promises.shake(model, "default")
    merge(model)
    assert all(site.place.bias is not None for site in places(model) if hasattr(site.place, "out_features"))
    unmerge(model)
    dt.adapters.remove(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(site.place.bias is None for site in places(model) if hasattr(site.place, "out_features"))


def test_merged_new_biases_are_not_lost(tmp_path: Path) -> None:
    """A spec that has no words for them must not be saved with them, or without; merged they still run."""
    peer("llama", tmp_path / "base")
    model = adapt(dt.load(tmp_path / "base"), {"kind": "bitfit", "add": True})
    promises.shake(model, "default")
    want = model(TOKENS).logits
    with pytest.raises(BuildError, match="a bias, and the model's spec"):
        merge_and_forget(model)
    assert torch.equal(model(TOKENS).logits, want)
    peers.close(merge(model)(TOKENS).logits, want, 1e-5)
