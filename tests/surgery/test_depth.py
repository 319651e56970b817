"""Layers dropped and repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_models import EXACT, gap, gpt2, llama, made, tokens
from torch import Tensor

from dovetail import surgery
from dovetail.errors import DataError, SpecError


@torch.no_grad()
def by_hand(model: Any, layers: list[int], ids: Tensor) -> Tensor:
    """The logits of a model whose blocks are run in the given order."""
    blocks = model.blocks
    model.blocks = torch.nn.ModuleList([blocks[i] for i in layers])
    try:
        return model(ids).logits
    finally:
        model.blocks = blocks


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("layers", [[0, 1, 0, 1, 2], [2, 0], [1, 1, 1]], ids=str)
def test_new_layers_are_the_old_ones_named(make: Any, layers: list[int]) -> None:
    old = make()
    done = surgery.grow_depth(old, layers)
    assert done.model.spec.depth == len(done.model.blocks) == len(layers)
    torch.testing.assert_close(done.model(tokens()).logits, by_hand(old, layers, tokens()), rtol=0, atol=1e-12)
    (move,) = done.moves
    assert move.exactness == "approximate" and "no bound" in move.how
    assert not done.reinitialised and not done.approximated, "every weight is what it was"
    gone = {i for i in range(3) if i not in layers}
    assert {int(n.split(".")[1]) for n in done.dropped} == gone
    copies = [p.data_ptr() for p in done.model.parameters()]
    assert len(set(copies)) == len(copies), "copies do not share memory"


@pytest.mark.parametrize("make", [llama, gpt2, lambda: gpt2(block={"kind": "parallel"})])
def test_added_identities_are_exact_and_can_learn(make: Any) -> None:
    old = make()
    done = surgery.grow_depth(old, [0, 1, 1, 2, 2, 2], identity=True)
    assert gap(old, done.model) < EXACT
    assert {(m.path, m.exactness) for m in done.moves} == {(f"blocks.{i}", "exact") for i in (2, 4, 5)}
    assert all(m.count == sum(p.numel() for p in done.model.blocks[2].parameters()) for m in done.moves)
    done.model(tokens()).logits.logsumexp(-1).mean().backward()
    assert all(float(b.mixer.out.weight.grad.abs().max()) > 0 for b in done.model.blocks)


def test_blocks_are_dropped_by_number_or_by_the_smallest_turn() -> None:
    old = made({"depth": 6})
    for i in (2, 3):  # two layers that hardly do anything
        for name in ("mixer.out", "feedforward.down"):
            old.blocks[i].get_submodule(name).weight.data *= 1e-3
    ids = tokens(rows=3)
    found = surgery.angular_distances(old, ids, 2)
    assert found.shape == (5,) and int(found.argmin()) == 2
    start = int(found.argmin())
    done = surgery.drop_blocks(old, range(start, start + 2))
    torch.testing.assert_close(done.model(ids).logits, by_hand(old, [0, 1, 4, 5], ids), rtol=0, atol=1e-12)
    assert gap(old, done.model) < 0.05 < gap(old, surgery.drop_blocks(old, [0, 1]).model)
    assert "layers 2, 3 of 6 dropped" in done.moves[0].how and done.moves[0].exactness == "approximate"


@torch.no_grad()
def test_angular_distance_is_the_formula() -> None:
    model, ids = llama(), tokens(7, rows=4)
    x, streams = model.embedding(ids), []
    for i in range(3):
        streams.append(x[:, -1])
        cut = surgery.drop_blocks(model, range(i + 1, 3)).model if i < 2 else model
        cut.norm = None
        x = cut(ids).last_hidden_state
    streams.append(x[:, -1])
    for count in (1, 2, 3):
        expected = []
        for l in range(4 - count):  # noqa: E741
            a, b = streams[l], streams[l + count]
            angles = torch.arccos((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))) / torch.pi
            expected.append(angles.mean())
        torch.testing.assert_close(surgery.angular_distances(model, ids, count), torch.stack(expected))
    assert not model.blocks[0]._forward_pre_hooks and not model.blocks[-1]._forward_hooks


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: surgery.drop_blocks(llama(), [3]), "no layer 3"),
        (lambda: surgery.drop_blocks(llama(), []), "no layers given"),
        (lambda: surgery.drop_blocks(llama(), [0, 1, 2]), "no layer would be left"),
        (lambda: surgery.grow_depth(llama(), [0, -1]), "no layer -1"),
        (lambda: surgery.grow_depth(llama(), [0, 0, 2], identity=True), "beside every old layer, in order"),
        (lambda: surgery.grow_depth(llama(), [1, 0, 2, 2], identity=True), "beside every old layer, in order"),
        (
            lambda: surgery.grow_depth(made({"blocks": {"kind": "post"}}), [0, 1, 2, 2], identity=True),
            "a 'post' block",
        ),
        (lambda: surgery.grow_depth(made({"blocks": {"mixer": "lstm"}}), [0, 1, 2, 2], identity=True), "'lstm'"),
        (lambda: surgery.angular_distances(llama(), tokens(), 4), "count is 4"),
        (lambda: surgery.angular_distances(llama(), tokens()[0], 1), "give .batch, length."),
    ],
)
def test_refusals(call: Any, says: str) -> None:
    with pytest.raises((SpecError, DataError), match=says):
        call()


def test_layers_that_share_a_part_stay() -> None:
    mixers = [
        {"kind": "attention", "heads": 4, "position": position}
        for position in ("t5_buckets", {"kind": "ref", "path": "blocks.0.mixer.position"})
    ]
    blocks = [{"layers": "0", "mixer": mixers[0]}, {"layers": "1:", "mixer": mixers[1]}]
    with pytest.raises(SpecError, match=r"blocks\.1\.mixer\.position shares blocks\.0\.mixer\.position"):
        surgery.drop_blocks(made({"blocks": blocks}), [0])


def test_window_layers_keep_their_config(tmp_path: Path) -> None:
    """Some layouts say the sort of every layer in a list, which must follow the layers."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    import dovetail as dt

    config = Qwen2Config(
        vocab_size=31, hidden_size=16, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_position_embeddings=16,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    Qwen2ForCausalLM(config).double().save_pretrained(tmp_path / "in")
    new = surgery.drop_blocks(dt.load(tmp_path / "in"), [0]).model
    theirs = AutoModelForCausalLM.from_pretrained(dt.save(new, tmp_path / "out"), dtype=torch.float64)
    assert theirs.config.layer_types == ["sliding_attention", "full_attention"]
    ids = tokens(12, vocab=31)
    torch.testing.assert_close(new(ids).logits, theirs(ids).logits, rtol=0, atol=1e-6)
