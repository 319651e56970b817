"""Reformer: two streams through reversible layers, and the backward that recomputes from the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ReformerConfig, ReformerModelWithLMHead

from contracts.skeleton import TIGHT, build, close, joined, keys, match, randomise
from dovetail.errors import BuildError
from dovetail.models.keymap import Rule
from dovetail.parts.context import Context
from dovetail.spec import Slot, Spec
from oracles import oracle_for

VOCAB, DIM, HEADS, WIDTH, HIDDEN, CHUNK, LENGTH = 19, 12, 2, 6, 20, 4, 16
BOTH = ("weight", "bias")


def spec(depth: int = 2, dropout: float = 0.0, **fields: Any) -> dict[str, Any]:
    mixer = {"kind": "attention", "heads": HEADS, "head_dim": WIDTH, "position": "none"}
    mixer["mask"] = {"kind": "chunks", "size": CHUNK, "before": 1}
    feedforward = {"kind": "mlp", "hidden": HIDDEN, "activation": "relu"}
    norm = {"kind": "layer", "eps": 1e-12}
    block = {"kind": "reversible", "mixer": mixer, "feedforward": feedforward, "norm": norm, "dropout": dropout}
    return {
        "kind": "decoder", "vocab": VOCAB, "dim": DIM, "depth": depth, "context": LENGTH, "streams": 2, "norm": norm,
        "position": "learned", "blocks": block, "head": "linear",
        "init": {"kind": "normal", "std": 0.2},
    } | fields  # fmt: skip


def oracle() -> ReformerModelWithLMHead:
    config = ReformerConfig(
        vocab_size=VOCAB, hidden_size=DIM, num_attention_heads=HEADS, attention_head_size=WIDTH, hidden_act="relu",
        feed_forward_size=HIDDEN, attn_layers=["local", "local"], local_attn_chunk_length=CHUNK, is_decoder=True,
        local_num_chunks_before=1, local_num_chunks_after=0, axial_pos_embds=False, max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0, tie_word_embeddings=False,
    )  # fmt: skip
    return randomise(ReformerModelWithLMHead(config)).train()  # type: ignore[return-value]


def rules() -> list[Rule]:
    top = "reformer.encoder"
    found = keys(
        ("reformer.embeddings.word_embeddings", "embedding.table"),
        ("reformer.embeddings.position_embeddings.embedding", "position.table"),
    )
    found += keys((f"{top}.layer_norm", "norm"), kinds=BOTH)
    found += keys(("lm_head.decoder", "head_part.linear"))
    for i in range(2):
        theirs, ours = f"{top}.layers.{i}", f"blocks.{i}"
        maps = [f"{theirs}.attention.self_attention.{n}" for n in ("query", "key", "value")]
        found += joined(maps, f"{ours}.mixer.qkv", [HEADS * WIDTH] * 3)
        found += keys((f"{theirs}.attention.output.dense", f"{ours}.mixer.out"))
        found += keys(
            (f"{theirs}.attention.layer_norm", f"{ours}.norm_mixer"),
            (f"{theirs}.feed_forward.layer_norm", f"{ours}.norm_feedforward"),
            (f"{theirs}.feed_forward.dense.dense", f"{ours}.feedforward.up"),
            (f"{theirs}.feed_forward.output.dense", f"{ours}.feedforward.down"),
            kinds=BOTH,
        )
    return found


@oracle_for("block", "reversible")
@oracle_for("mask", "chunks")
def test_outputs_and_gradients() -> None:
    ours, theirs = build("model", spec(), dim=0), oracle()
    tokens = torch.randint(VOCAB, (2, LENGTH))
    match(
        ours, theirs, rules(), lambda: ours(tokens).logits, lambda: theirs(input_ids=tokens).logits,
        tol=TIGHT, unused=("lm_head.bias",),  # stored, and never added
    )  # fmt: skip


def plainly(model: Any, x: Tensor, ctx: Context) -> Tensor:
    """The two streams by their formula, with autograd keeping every activation."""
    a = b = x
    for block in model.blocks:
        a = a + block.dropout(block.mixer(block.norm_mixer(b), ctx))
        b = b + block.dropout(block.feedforward(block.norm_feedforward(a)))
    return model.norm(torch.cat([a, b], -1))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_recomputing_backward_is_autograd(dropout: float) -> None:
    """Also with dropout, whose random numbers the backward draws again, and with a feed-forward shared by a ref."""
    given = spec(depth=3, dropout=dropout)
    own = given["blocks"]
    tied = own | {"feedforward": {"kind": "ref", "path": "blocks.0.feedforward"}}
    given["blocks"] = [{"layers": "0"} | own, {"layers": "1:"} | tied]
    model = build("model", given, dim=0).train()
    ctx = Context.of(2, LENGTH, torch.device("cpu"))
    x = torch.randn(2, LENGTH, DIM, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(2, LENGTH, 2 * DIM, dtype=torch.float64)
    followed = [x, *model.blocks.parameters()]
    found = []
    for run in (lambda: model.run(x, ctx), lambda: plainly(model, x, ctx)):
        torch.manual_seed(3)
        y = run()
        found.append((y, torch.autograd.grad((y * pull).sum(), followed)))
    (mine, grads), (plain, wanted) = found
    close(mine, plain, 1e-12, "output")
    for i, (g, w) in enumerate(zip(grads, wanted, strict=True)):
        close(g, w, 1e-8, f"gradient {i}")


def test_activations_do_not_grow_with_depth() -> None:
    def kept(depth: int) -> int:
        model = build("model", spec(depth=depth), dim=0).train()
        owned = {p.data_ptr() for p in model.parameters()}
        bytes_kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            if t.data_ptr() not in owned:
                bytes_kept[t.data_ptr()] = t.nbytes
            return t

        x = torch.randn(2, LENGTH, DIM, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.run(x, Context.of(2, LENGTH, torch.device("cpu")))
        return sum(bytes_kept.values())

    assert kept(6) == kept(2) > 0


def test_shapes_are_known_without_numbers() -> None:
    """On the meta device, with gradients: autocast, which the backward puts back, is unknown there."""
    model = build("model", spec(), dim=0).to("meta").train()
    logits = model(torch.zeros(2, LENGTH, dtype=torch.long, device="meta")).logits
    logits.sum().backward()
    assert logits.shape == (2, LENGTH, VOCAB)
    assert all(p.grad.is_meta for p in model.parameters())


def test_decoding_equals_the_whole_forward() -> None:
    model = build("model", spec(), dim=0)
    tokens = torch.randint(VOCAB, (2, LENGTH))
    with torch.no_grad():
        whole, state = model(tokens).logits, model.new_state(2, LENGTH)
        assert state.layers[0]["mixer"].timeline.kept == (2 * CHUNK, 0)  # nothing older than the chunk before is kept
        parts = [model(tokens[:, :5], state=state).logits]
        parts += [model(tokens[:, i : i + 1], state=state).logits for i in range(5, LENGTH)]
    close(torch.cat(parts, 1), whole, 1e-12, "decoding")


def test_streams_are_checked() -> None:
    with pytest.raises(BuildError, match="carries 2 streams, and its stack has 1"):
        Spec.parse("model", spec(streams=1)).build(Slot(dim=0))
    with pytest.raises(BuildError, match="carries 1 stream, and its stack has 2"):
        Spec.parse("model", spec(blocks="pre")).build(Slot(dim=0))
    with pytest.raises(BuildError, match="tied head"):
        Spec.parse("model", spec(head={"kind": "ref", "path": "embedding"})).build(Slot(dim=0))
    stack = {"kind": "stack", "streams": 2, "blocks": spec()["blocks"]}
    for encoder in (stack, "stages"):
        whole = Spec.parse("model", {"kind": "encoder_decoder", "vocab": VOCAB, "dim": DIM, "encoder": encoder})
        with pytest.raises(BuildError, match="not one stream of blocks"):
            whole.build(Slot(dim=0))
