"""DeBERTa-v2: two content terms through the layer's own q and k maps, one table of distances shared by all layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DebertaV2Config, DebertaV2Model

from contracts.skeleton import SINGLE, build, joined, keys, match, randomise
from dovetail.models.keymap import Rule
from dovetail.parts.context import Context
from oracles import oracle_for

DIM, HEADS, HIDDEN, LENGTH = 16, 2, 24, 21
BOTH = ("weight", "bias")


def spec(terms: list[str], buckets: int, far: int) -> dict[str, Any]:
    norm = {"kind": "layer", "eps": 1e-7}
    position = {"kind": "deberta", "buckets": buckets, "max_distance": far, "terms": terms, "norm": norm}
    shared = {"kind": "ref", "path": "blocks.0.mixer.position"}
    feedforward = {"kind": "mlp", "hidden": HIDDEN, "activation": "gelu"}

    def block(layers: str, at: Any) -> dict[str, Any]:
        mixer = {"kind": "attention", "heads": HEADS, "bias": "all", "position": at}
        return {"layers": layers, "kind": "post", "norm": norm, "mixer": mixer, "feedforward": feedforward}

    return {"kind": "stack", "depth": 2, "norm": None, "blocks": [block("0", position), block("1:", shared)]}


def oracle(terms: list[str], buckets: int, far: int) -> DebertaV2Model:
    config = DebertaV2Config(
        vocab_size=9, hidden_size=DIM, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=HIDDEN,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, relative_attention=True, pos_att_type=terms,
        position_buckets=buckets, max_relative_positions=far, max_position_embeddings=far, share_att_key=True,
        norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0, layer_norm_eps=1e-7,
    )  # fmt: skip
    return randomise(DebertaV2Model(config))  # type: ignore[return-value]


def rules() -> list[Rule]:
    at = "blocks.0.mixer.position"
    found = keys(("encoder.rel_embeddings", f"{at}.table"))
    found += keys(("encoder.LayerNorm", f"{at}.norm"), kinds=BOTH)
    for i in range(2):
        theirs, ours = f"encoder.layer.{i}", f"blocks.{i}"
        maps = [f"{theirs}.attention.self.{n}_proj" for n in ("query", "key", "value")]
        found += joined(maps, f"{ours}.mixer.qkv", [DIM] * 3, BOTH)
        found += keys(
            (f"{theirs}.attention.output.dense", f"{ours}.mixer.out"),
            (f"{theirs}.attention.output.LayerNorm", f"{ours}.norm_mixer"),
            (f"{theirs}.intermediate.dense", f"{ours}.feedforward.up"),
            (f"{theirs}.output.dense", f"{ours}.feedforward.down"),
            (f"{theirs}.output.LayerNorm", f"{ours}.norm_feedforward"),
            kinds=BOTH,
        )
    return found


@oracle_for("position", "deberta")
@pytest.mark.parametrize("buckets", [6, 0], ids=["log buckets", "plain distances"])
@pytest.mark.parametrize("terms", [["c2p", "p2c"], ["p2c"]], ids=["both", "p2c"])
def test_outputs_and_gradients(terms: list[str], buckets: int) -> None:
    far = 16  # some distances of 21 tokens lie beyond it
    ours, theirs = build("container", spec(terms, buckets, far), dim=DIM, causal=False), oracle(terms, buckets, far)
    assert ours.blocks[1].mixer.position is ours.blocks[0].mixer.position
    real = torch.ones(2, LENGTH, dtype=torch.long)
    real[1, 15:] = 0
    ctx = Context.of(2, LENGTH, torch.device("cpu"), attention_mask=real)
    keep = real[..., None].double()
    match(
        ours,
        theirs,
        rules(),
        lambda x: ours(x, ctx) * keep,
        lambda x: theirs.encoder(x, real).last_hidden_state * keep,
        [torch.randn(2, LENGTH, DIM, dtype=torch.float64)],
        tol=SINGLE,
        unused=("embeddings.",),
    )
