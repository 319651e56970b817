"""Qwen2-VL's M-RoPE: a token stands at a time, a row and a column, and frequencies read one of the three."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

from contracts.skeleton import SINGLE, build, close, joined, keys, match, randomise
from dovetail.errors import BuildError
from dovetail.models.keymap import Rule
from oracles import oracle_for

VOCAB, DIM, HEADS, GROUPS, WIDTH, HIDDEN, SECTIONS = 19, 24, 2, 1, 12, 20, (1, 2, 3)


def spec(position: Any = None) -> dict[str, Any]:
    position = position or {"kind": "mrope", "theta": 100.0, "sections": SECTIONS}
    mixer = {"kind": "attention", "heads": HEADS, "kv_heads": GROUPS, "bias": "qkv", "position": position}
    norm = {"kind": "rms", "eps": 1e-5}
    block = {"mixer": mixer, "norm": norm, "feedforward": {"kind": "glu", "hidden": HIDDEN}}
    init = {"kind": "normal", "std": 0.2}
    return {"kind": "decoder", "vocab": VOCAB, "dim": DIM, "depth": 2, "norm": norm, "blocks": block, "init": init}


def oracle() -> Qwen2VLTextModel:
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": list(SECTIONS)}
    config = Qwen2VLTextConfig(
        vocab_size=VOCAB, hidden_size=DIM, intermediate_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, max_position_embeddings=64, rope_parameters=rope, rms_norm_eps=1e-5,
    )  # fmt: skip
    return randomise(Qwen2VLTextModel(config))  # type: ignore[return-value]


def rules() -> list[Rule]:
    found = keys(("embed_tokens", "embedding.table"), ("norm", "norm"))
    sizes = [HEADS * WIDTH, GROUPS * WIDTH, GROUPS * WIDTH]
    for i in range(2):
        theirs, ours = f"layers.{i}", f"blocks.{i}"
        found += joined([f"{theirs}.self_attn.{n}_proj" for n in "qkv"], f"{ours}.mixer.qkv", sizes, ("weight", "bias"))
        found += joined([f"{theirs}.mlp.{n}_proj" for n in ("gate", "up")], f"{ours}.feedforward.gate_up", [HIDDEN] * 2)
        found += keys(
            (f"{theirs}.self_attn.o_proj", f"{ours}.mixer.out"),
            (f"{theirs}.mlp.down_proj", f"{ours}.feedforward.down"),
            (f"{theirs}.input_layernorm", f"{ours}.norm_mixer"),
            (f"{theirs}.post_attention_layernorm", f"{ours}.norm_feedforward"),
        )
    return found


def places() -> Tensor:
    """Three words, an image of 2 x 3, and two words behind it at max(h, w): (2,11,3)."""
    words = torch.arange(3)[:, None].expand(-1, 3)
    image = torch.tensor([[3, 3 + r, 3 + c] for r in range(2) for c in range(3)])
    behind = torch.arange(6, 8)[:, None].expand(-1, 3)
    row = torch.cat([words, image, behind])
    return torch.stack([row, row * 2])


@oracle_for("position", "mrope")
def test_outputs_and_gradients() -> None:
    """The oracle has no head; ours keeps none of its own by tying it."""
    given = spec() | {"head": {"kind": "ref", "path": "embedding"}}
    ours, theirs = build("model", given, dim=0), oracle()
    tokens, at = torch.randint(VOCAB, (2, 11)), places()
    match(
        ours,
        theirs,
        rules(),
        lambda: ours(tokens, positions=at, logits=False).last_hidden_state,
        lambda: theirs(input_ids=tokens, position_ids=at.permute(2, 0, 1)).last_hidden_state,
        tol=SINGLE,
    )


def test_text_alone_is_rope() -> None:
    ours, rope = build("model", spec(), dim=0), build("model", spec({"kind": "rope", "theta": 100.0}), dim=0)
    tokens = torch.randint(VOCAB, (2, 9))
    close(ours(tokens).logits, rope(tokens).logits, 1e-12, "text")


@pytest.mark.parametrize("scaling", [None, {"kind": "dynamic", "factor": 2.0, "original": 64}], ids=["rotated", "raw"])
def test_decoding_stores_three_axes(scaling: Any) -> None:
    ours = build("model", spec({"kind": "mrope", "theta": 100.0, "sections": SECTIONS, "scaling": scaling}), dim=0)
    tokens, at = torch.randint(VOCAB, (2, 11)), places()
    with torch.no_grad():
        whole, state = ours(tokens, positions=at).logits, ours.new_state(2, 12)
        assert state.room.axes == 3
        parts = [ours(tokens[:, :5], positions=at[:, :5], state=state).logits]
        parts += [ours(tokens[:, i : i + 1], positions=at[:, i : i + 1], state=state).logits for i in range(5, 11)]
    close(torch.cat(parts, 1), whole, 1e-12, "decoding")


def test_sections_must_add_up() -> None:
    with pytest.raises(BuildError, match=r"sections \(1, 2, 4\) of 6 frequencies"):
        build("model", spec({"kind": "mrope", "sections": (1, 2, 4)}), dim=0)
