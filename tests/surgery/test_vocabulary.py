"""Ids added and trimmed, and changed models in the published layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_models import VOCAB, gpt2, llama, made, tokens

import dovetail as dt
from dovetail import surgery
from dovetail.errors import SpecError


@pytest.mark.parametrize("make", [llama, gpt2, lambda: llama(head={"kind": "linear", "bias": True})])
def test_new_ids_are_means_and_old_logits_stay(make: Any) -> None:
    old = make()
    pieces = [[3], [1, 4, 7]]
    for new, added, mass in ((5, 5, 5 / VOCAB), (pieces, 2, 1 + 1 / 3)):
        done = surgery.extend_vocabulary(old, new)
        before, after = old(tokens()).logits, done.model(tokens()).logits
        assert done.model.spec.vocab == VOCAB + added == after.shape[-1]
        torch.testing.assert_close(after[..., :VOCAB], before, rtol=0, atol=1e-12)
        wanted = [before.mean(-1)] * 5 if new == 5 else [before[..., ids].mean(-1) for ids in pieces]
        torch.testing.assert_close(after[..., VOCAB:], torch.stack(wanted, -1), rtol=0, atol=1e-12)
        fall = (before.log_softmax(-1) - after.log_softmax(-1)[..., :VOCAB]).max()
        assert 0 < fall <= math.log1p(mass), "the stated bound holds"
        assert {m.exactness for m in done.moves} == {"exact"}
        assert all(f"at most {math.log1p(mass):.3g} nats" in m.how for m in done.moves)
        rows = done.model.embedding.table.weight.data
        piece = range(VOCAB) if new == 5 else pieces[1]
        torch.testing.assert_close(rows[-1], old.embedding.table.weight.data[list(piece)].mean(0))


def test_noise_is_on_new_rows_alone() -> None:
    old = llama()
    one, again, other = (surgery.extend_vocabulary(old, 400, noise=0.5, seed=s).model for s in (0, 0, 1))
    rows, head = one.embedding.table.weight.data, one.head_part.linear.weight.data
    assert torch.equal(rows, again.embedding.table.weight) and not torch.equal(rows, other.embedding.table.weight)
    assert torch.equal(rows[:VOCAB], old.embedding.table.weight) and not torch.equal(rows[VOCAB:], head[VOCAB:])
    spread = rows[VOCAB:].std(0) / old.embedding.table.weight.data.std(0)
    assert torch.all((spread - 0.5).abs() < 0.12), "half of the old spread, column by column"


@pytest.mark.parametrize("make", [llama, gpt2, lambda: llama(head={"kind": "linear", "bias": True})])
def test_kept_ids_keep_their_logits(make: Any) -> None:
    old, keep = make(), [7, 0, 40, 3, 12]
    done = surgery.trim_vocabulary(old, keep)
    ids = tokens(vocab=5)
    before, after = old(torch.tensor(keep)[ids]).logits, done.model(ids).logits
    assert after.shape[-1] == 5 == done.model.spec.vocab
    torch.testing.assert_close(after, before[..., keep], rtol=0, atol=1e-12)
    assert {m.exactness for m in done.moves} == {"exact"} and "5 of 41" in done.moves[0].how


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: surgery.extend_vocabulary(llama(), 0), "number of new ids is 0"),
        (lambda: surgery.extend_vocabulary(llama(), []), "no new ids"),
        (lambda: surgery.extend_vocabulary(llama(), [[1], []]), "empty list"),
        (lambda: surgery.extend_vocabulary(llama(), [[41]]), "no id 41"),
        (lambda: surgery.extend_vocabulary(llama(), 3, noise=-1.0), "noise is -1.0"),
        (lambda: surgery.trim_vocabulary(llama(), [1, 2, 1]), "stands twice"),
        (lambda: surgery.trim_vocabulary(llama(), [-1]), "no id -1"),
        (lambda: surgery.trim_vocabulary(made({"streams": 2, "blocks": "reversible"}), [1]), "one stream"),
        (
            lambda: surgery.trim_vocabulary(dt.build({"kind": "encoder_decoder", "vocab": 9, "dim": 8}), [1]),
            "only decoders",
        ),
    ],
)
def test_refusals(call: Any, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        call()


def peer(kind: str, folder: Path) -> None:
    import transformers

    ids = {"vocab_size": 31, "bos_token_id": 1, "eos_token_id": [2, 9], "pad_token_id": 5}
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(n_embd=16, n_head=4, n_layer=3, n_positions=16, n_inner=24, **ids)
    else:
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=16, tie_word_embeddings=kind == "tied llama", **ids,
        )  # fmt: skip
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(config).double().save_pretrained(folder)


CHANGES: dict[str, Any] = {
    "extended": lambda m: surgery.extend_vocabulary(m, [[3, 4], [5]]),
    "trimmed": lambda m: surgery.trim_vocabulary(m, [*range(9, 31), 2, 1]),
    "dropped": lambda m: surgery.drop_blocks(m, [1]),
    "grown": lambda m: surgery.grow_depth(m, [0, 1, 0, 1, 2]),
    "identities": lambda m: surgery.grow_depth(m, [0, 1, 2, 2], identity=True),
    "fewer neurons": lambda m: surgery.prune_neurons(m, 10),
    "pruned": lambda m: surgery.magnitude_prune(m, (2, 4)),
    "untied": lambda m: surgery.untie(m),
    "tied": lambda m: surgery.tie(m),
    "fewer heads": lambda m: surgery.prune_heads(m, 1),
}


@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2"])
def test_a_changed_model_loads_in_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    peer(kind, tmp_path / "in")
    (tmp_path / "in/tokenizer.json").write_text("{}")
    old = dt.load(tmp_path / "in")
    sayable = (
        set(CHANGES) - ({"tied"} if kind != "llama" else {"untied"}) - ({"fewer heads"} if kind == "gpt2" else set())
    )
    for name in sorted(sayable):
        new = CHANGES[name](old).model
        folder = dt.save(new, tmp_path / name)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        ids = tokens(12, vocab=new.spec.vocab)
        torch.testing.assert_close(new(ids).logits, theirs(ids).logits, rtol=0, atol=1e-6, msg=name)
        again = dt.load(folder)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), new.parameters(), strict=True)), name
        config = json.loads((folder / "config.json").read_text())
        ends = (22 + 1, [22, 0], None) if name == "trimmed" else (1, [2, 9], 5)
        assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == ends
        assert (folder / "tokenizer.json").exists() == (name != "trimmed"), "a tokenizer that no longer fits"
    assert old.origin.config["vocab_size"] == 31 and old.origin.folder == tmp_path / "in"
