"""DETR's decoder: positions go into q and k alone, and cross-attention's keys and values have different inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DetrConfig
from transformers.models.detr.modeling_detr import DetrDecoder, DetrSinePositionEmbedding

from contracts.skeleton import SINGLE, build, close, joined, keys, match, randomise
from dovetail.errors import BuildError
from dovetail.models.keymap import Rename, Rule
from dovetail.parts.context import Context
from dovetail.parts.state import Room
from dovetail.spec import Spec
from oracles import oracle_for

DIM, HEADS, HIDDEN, QUERIES, HEIGHT, WIDTH = 16, 2, 24, 7, 3, 5
BOTH = ("weight", "bias")


def spec() -> dict[str, Any]:
    """Two post-norm layers; the first owns the object queries and the sine of the memory, all others refer to them."""
    queries = {"kind": "added", "query": {"kind": "learned", "length": QUERIES}}
    grid = {"kind": "sinusoidal", "axes": 2}
    reads = {"kind": "added", "query": {"kind": "ref", "path": "blocks.0.mixer.position.query"}, "key": grid}

    def block(layers: str, own: Any, cross: Any) -> dict[str, Any]:
        def mixer(position: Any) -> dict[str, Any]:
            return {"kind": "attention", "heads": HEADS, "bias": "all", "position": position}

        feedforward = {"kind": "mlp", "hidden": HIDDEN, "activation": "relu"}
        return {
            "layers": layers,
            "kind": "post",
            "mixer": mixer(own),
            "cross": mixer(cross),
            "feedforward": feedforward,
        }

    shared = [{"kind": "ref", "path": f"blocks.0.{name}.position"} for name in ("mixer", "cross")]
    return {"kind": "stack", "depth": 2, "norm": "layer", "blocks": [block("0", queries, reads), block("1", *shared)]}


class Oracle(nn.Module):
    """transformers' decoder with its learned queries and its sine over the memory's mask."""

    def __init__(self) -> None:
        super().__init__()
        config = DetrConfig(
            d_model=DIM, decoder_layers=2, decoder_attention_heads=HEADS, decoder_ffn_dim=HIDDEN, dropout=0.0,
            attention_dropout=0.0, activation_dropout=0.0, use_timm_backbone=False, use_pretrained_backbone=False,
            backbone_config={"model_type": "resnet"}, backbone=None,
        )  # fmt: skip
        self.decoder = DetrDecoder(config)
        self.query_position_embeddings = nn.Embedding(QUERIES, DIM)
        self.sine = DetrSinePositionEmbedding(DIM // 2, normalize=True)

    def forward(self, x: Tensor, memory: Tensor, real: Tensor) -> Tensor:
        shape = torch.Size((memory.shape[0], DIM, HEIGHT, WIDTH))
        sine = self.sine(shape, memory.device, memory.dtype, mask=real).flatten(2).transpose(1, 2)
        queries = self.query_position_embeddings.weight[None].expand(memory.shape[0], -1, -1)
        return self.decoder(
            inputs_embeds=x,
            encoder_hidden_states=memory,
            encoder_attention_mask=real.flatten(1),
            spatial_position_embeddings=sine,
            object_queries_position_embeddings=queries,
        ).last_hidden_state


def rules() -> list[Rule]:
    found: list[Rule] = [Rename("query_position_embeddings.weight", "blocks.0.mixer.position.query.table.weight")]
    found += keys(("decoder.layernorm", "norm"), kinds=BOTH)
    for i in range(2):
        theirs, ours = f"decoder.layers.{i}", f"blocks.{i}"
        found += joined([f"{theirs}.self_attn.{n}_proj" for n in "qkv"], f"{ours}.mixer.qkv", [DIM] * 3, BOTH)
        found += joined([f"{theirs}.encoder_attn.{n}_proj" for n in "kv"], f"{ours}.cross.kv", [DIM] * 2, BOTH)
        found += keys(
            (f"{theirs}.self_attn.o_proj", f"{ours}.mixer.out"),
            (f"{theirs}.self_attn_layer_norm", f"{ours}.norm_mixer"),
            (f"{theirs}.encoder_attn.q_proj", f"{ours}.cross.q"),
            (f"{theirs}.encoder_attn.o_proj", f"{ours}.cross.out"),
            (f"{theirs}.encoder_attn_layer_norm", f"{ours}.norm_cross"),
            (f"{theirs}.mlp.fc1", f"{ours}.feedforward.up"),
            (f"{theirs}.mlp.fc2", f"{ours}.feedforward.down"),
            (f"{theirs}.final_layer_norm", f"{ours}.norm_feedforward"),
            kinds=BOTH,
        )
    return found


def normalised(real: Tensor) -> Tensor:
    """Where each cell stands on its image, rows and columns from 0 to 2π: (B,H,W) mask -> (B,H·W,2)."""
    rows, columns = real.double().cumsum(1), real.double().cumsum(2)
    rows, columns = rows / (rows[:, -1:] + 1e-6), columns / (columns[:, :, -1:] + 1e-6)
    return torch.stack([rows, columns], -1).flatten(1, 2) * 2 * math.pi


@oracle_for("position", "added")
@pytest.mark.parametrize("padded", [False, True])
def test_outputs_and_gradients(padded: bool) -> None:
    ours = build("container", spec(), dim=DIM, causal=False, memory_dim=DIM)
    theirs = randomise(Oracle())
    real = torch.ones(2, HEIGHT, WIDTH, dtype=torch.long)
    if padded:
        real[1, :, 3:] = 0
        real[1, 2:] = 0
    segments = (real.flatten(1) - 1) if padded else None
    ctx = Context.of(2, QUERIES, torch.device("cpu"))
    inputs = [torch.randn(2, n, DIM, dtype=torch.float64) for n in (QUERIES, HEIGHT * WIDTH)]
    match(
        ours,
        theirs,
        rules(),
        lambda x, memory: ours(x, ctx.with_memory(memory, segments, normalised(real))),
        lambda x, memory: theirs(x, memory, real),
        inputs,
        tol=SINGLE,
    )


def test_values_see_no_position() -> None:
    """With one key only, whatever is added to keys cancels in the softmax: the output must not move."""
    ours = build("container", spec(), dim=DIM, causal=False, memory_dim=DIM)
    x, memory = torch.randn(1, QUERIES, DIM, dtype=torch.float64), torch.randn(1, 1, DIM, dtype=torch.float64)
    ctx = Context.of(1, QUERIES, torch.device("cpu"))
    here, there = (ours(x, ctx.with_memory(memory, None, torch.full((1, 1, 2), at))) for at in (0.3, 2.0))
    assert torch.allclose(here, there, atol=1e-12)


def test_keys_with_positions_keep_no_state() -> None:
    ours = build("container", spec(), dim=DIM, causal=True, memory_dim=DIM)
    with pytest.raises(BuildError, match="cannot be projected once"):
        ours.new_layers(Room(1, 4, torch.device("cpu"), torch.float64))


@pytest.mark.parametrize("init", [{"kind": "normal", "std": 0.2}, {"kind": "ntk"}], ids=["normal", "ntk"])
def test_adding_nothing_is_plain_attention(init: dict[str, Any]) -> None:
    """q, k and v projected apart are what the fused map gives, under a parametrisation with multipliers too."""
    slot = {"dim": DIM, "causal": False, "init": Spec.parse("init", init)}
    added = {"kind": "added", "query": {"kind": "learned", "length": QUERIES}}
    ours, plain = (build("mixer", {"kind": "attention", "heads": 2, "position": p}, **slot) for p in (added, "none"))
    torch.nn.init.zeros_(ours.position.query.table.weight)
    plain.load_state_dict({n: p for n, p in ours.state_dict().items() if "position" not in n})
    x, ctx = torch.randn(2, QUERIES, DIM, dtype=torch.float64), Context.of(2, QUERIES, torch.device("cpu"))
    close(ours(x, ctx), plain(x, ctx), 1e-12, "nothing added")
