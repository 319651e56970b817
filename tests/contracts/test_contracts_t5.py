"""T5: one table of distances a stack, shared by refs and saved once; scores that are not scaled; a head of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from contracts.skeleton import SINGLE, build, carry, close, joined, keys, match, randomise
from dovetail.errors import SpecError
from dovetail.models.keymap import Alias, Rename, Rule
from dovetail.spec import Spec, override
from oracles import oracle_for

VOCAB, DIM, HEADS, WIDTH, HIDDEN, BUCKETS, FAR = 23, 16, 3, 6, 20, 8, 12


def attention(position: Any, **fields: Any) -> dict[str, Any]:
    return {"kind": "attention", "heads": HEADS, "head_dim": WIDTH, "scale": 1.0, "position": position} | fields


def spec(gated: bool) -> dict[str, Any]:
    norm = {"kind": "rms", "eps": 1e-6}
    feedforward: dict[str, Any] = {"kind": "mlp", "hidden": HIDDEN, "activation": "relu", "bias": False}
    if gated:
        feedforward = {"kind": "glu", "hidden": HIDDEN, "activation": "gelu_tanh"}

    def stack(side: str) -> dict[str, Any]:
        cross = {"cross": attention("none")} if side == "decoder" else {}
        block = {"kind": "pre", "norm": norm, "feedforward": feedforward} | cross
        table = {"kind": "t5_buckets", "buckets": BUCKETS, "max_distance": FAR}
        shared = {"kind": "ref", "path": f"{side}.blocks.0.mixer.position"}
        blocks = [
            {"layers": "0", "mixer": attention(table)} | block,
            {"layers": "1:", "mixer": attention(shared)} | block,
        ]
        return {"kind": "stack", "depth": 2, "norm": norm, "blocks": blocks}

    return {
        "kind": "encoder_decoder",
        "vocab": VOCAB,
        "dim": DIM,
        "encoder": stack("encoder"),
        "decoder": stack("decoder"),
        "head": "linear",
        "init": {"kind": "normal", "std": 0.2},
    }


def oracle(gated: bool) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCAB, d_model=DIM, d_kv=WIDTH, d_ff=HIDDEN, num_layers=2, num_heads=HEADS, dropout_rate=0.0,
        relative_attention_num_buckets=BUCKETS, relative_attention_max_distance=FAR, tie_word_embeddings=False,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)  # ties the head whatever the config says, until a checkpoint has one
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    return randomise(model)  # type: ignore[return-value]


def rules(gated: bool) -> list[Rule]:
    found: list[Rule] = [
        Rename("shared.weight", "embedding.table.weight"),
        Alias("encoder.embed_tokens.weight", "shared.weight"),
        Alias("decoder.embed_tokens.weight", "shared.weight"),
        Rename("lm_head.weight", "head_part.linear.weight"),
    ]
    q = HEADS * WIDTH
    for side in ("encoder", "decoder"):
        table = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"
        found += keys((table, f"{side}.blocks.0.mixer.position.table"), (f"{side}.final_layer_norm", f"{side}.norm"))
        for i in range(2):
            theirs, ours = f"{side}.block.{i}.layer", f"{side}.blocks.{i}"
            last = 2 if side == "decoder" else 1
            found += joined([f"{theirs}.0.SelfAttention.{n}" for n in "qkv"], f"{ours}.mixer.qkv", [q] * 3)
            found += keys(
                (f"{theirs}.0.SelfAttention.o", f"{ours}.mixer.out"),
                (f"{theirs}.0.layer_norm", f"{ours}.norm_mixer"),
                (f"{theirs}.{last}.layer_norm", f"{ours}.norm_feedforward"),
                (f"{theirs}.{last}.DenseReluDense.wo", f"{ours}.feedforward.down"),
            )
            if side == "decoder":
                cross = f"{theirs}.1.EncDecAttention"
                found += joined([f"{cross}.k", f"{cross}.v"], f"{ours}.cross.kv", [q] * 2)
                found += keys(
                    (f"{cross}.q", f"{ours}.cross.q"),
                    (f"{cross}.o", f"{ours}.cross.out"),
                    (f"{theirs}.1.layer_norm", f"{ours}.norm_cross"),
                )
            dense = f"{theirs}.{last}.DenseReluDense"
            if gated:
                found += joined([f"{dense}.wi_0", f"{dense}.wi_1"], f"{ours}.feedforward.gate_up", [HIDDEN] * 2)
            else:
                found += keys((f"{dense}.wi", f"{ours}.feedforward.up"))
    return found


def texts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source, target = torch.randint(VOCAB, (2, 19)), torch.randint(VOCAB, (2, 17))
    real = torch.ones(2, 19, dtype=torch.long)
    real[1, 13:] = 0
    return source, target, real


@oracle_for("position", "t5_buckets")
@pytest.mark.parametrize("gated", [False, True], ids=["relu", "gated"])
def test_outputs_and_gradients(gated: bool) -> None:
    ours, theirs = build("model", spec(gated), dim=0), oracle(gated)
    source, target, real = texts()
    match(
        ours,
        theirs,
        rules(gated),
        lambda: ours(source, target, attention_mask=real).logits,
        lambda: theirs(input_ids=source, decoder_input_ids=target, attention_mask=real).logits,
        tol=SINGLE,
    )


def test_the_table_is_one_parameter_and_saved_once() -> None:
    ours, theirs = build("model", spec(False), dim=0), oracle(False)
    assert ours.encoder.blocks[1].mixer.position is ours.encoder.blocks[0].mixer.position
    assert ours.encoder.blocks[0].mixer.position is not ours.decoder.blocks[0].mixer.position
    keymap = carry(theirs, ours, rules(False))
    saved = keymap.save(dict(ours.named_parameters()))
    assert sum("relative_attention_bias" in name for name in saved) == 2
    assert saved.keys() == {n for n, _ in theirs.named_parameters()}
    assert all(torch.equal(saved[n], p) for n, p in theirs.named_parameters())


def test_decoding_equals_the_whole_forward() -> None:
    ours = build("model", spec(False), dim=0)
    source, target, real = texts()
    whole = ours(source, target, attention_mask=real).logits
    with torch.no_grad():
        state = ours.new_state(2, 20)
        parts = [ours(source, target[:, :5], attention_mask=real, state=state).logits]
        parts += [ours.decode(target[:, i : i + 1], state=state).logits for i in range(5, 17)]
    close(torch.cat(parts, 1), whole, 1e-12, "decoding")


def test_one_side_of_a_shared_table_is_not_swapped_alone() -> None:
    whole = Spec.parse("model", spec(False))
    with pytest.raises(SpecError, match="one side of a ref is refused"):
        override(whole, {"encoder.blocks.0.mixer.position": "none"})
    swapped = override(whole, {"encoder.blocks.*.mixer.position": "none"})
    names = [n for n, _ in build("model", swapped, dim=0).named_parameters()]
    assert [n for n in names if "position" in n] == ["decoder.blocks.0.mixer.position.table.weight"]
