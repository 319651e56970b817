"""Associative recall: what is drawn, what is asked, and a study of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail import hub
from dovetail.data.generated import GeneratedRows, GeneratedSet, numbers, write_numbers
from dovetail.data.recall import Recall
from dovetail.data.rows import IGNORED, collate
from dovetail.errors import DataError, SpecError
from dovetail.objectives.next_token import NextToken
from dovetail.spec import Spec
from dovetail.training import checkpoint, fit
from dovetail.training.preflight import preflight
from dovetail.training.recipe import Recipe
from oracles import oracle_for


@oracle_for("corpus", "recall")
@given(st.integers(1, 9), st.integers(0, 12), st.integers(0, 40), st.sampled_from([0.01, 1.0]), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_labels_are_the_values_of_keys_that_come_again(
    pairs: int, room: int, words: int, power: float, seed: int
) -> None:
    corpus = Recall(pairs=pairs, vocab=2 * pairs + 2 + words, length=4 * pairs + room, power=power, examples=5)
    rows = GeneratedRows(corpus, corpus.length, seed)
    for index in range(len(rows)):
        tokens, labels, segments = (x.tolist() for x in rows[index])
        half, asked = corpus.vocab // 2, [t for t, label in enumerate(labels) if label != IGNORED]
        assert len(tokens) == corpus.length and set(segments) == {0} and len(asked) == pairs
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < half for key in keys) and all(half <= value < corpus.vocab for value in values)
        for t in asked:  # by looking back, as a model that recalls does
            assert t >= 2 * pairs and labels[t] == tokens[t + 1] == tokens[tokens.index(tokens[t]) + 1]
        assert {tokens[t] for t in asked} == set(keys)
        told = {t + i for t in asked for i in (0, 1)} | set(range(2 * pairs))
        assert all(token == 0 for t, token in enumerate(tokens) if t not in told)


def test_rows_go_by_seed_epoch_and_index() -> None:
    corpus = Recall(pairs=4, vocab=64, length=32, examples=6)
    rows, again, other = (GeneratedRows(corpus, 32, seed) for seed in (3, 3, 4))
    order = [(5, 0), (0, 1), (5, 1), (2, 7), (5, 0)]  # an epoch that was left is drawn anew
    first = {at: rows.drawn(*at).tokens.tolist() for at in order}
    assert all(again.drawn(*at).tokens.tolist() == first[at] for at in reversed(order))
    assert len({str(row) for row in first.values()}) == 4 and other[5].tokens.tolist() != first[5, 0]
    held_out = GeneratedRows(Recall(pairs=4, vocab=64, length=32, examples=6, split="held_out"), 32, 3)
    assert held_out[5].tokens.tolist() != first[5, 0]
    assert corpus.fingerprint() == Recall(pairs=4, vocab=64, length=32, examples=6).fingerprint()
    texts = list(corpus.documents())
    assert (
        len(texts) == 6 and [int(word) for word in texts[5].split()] == GeneratedRows(corpus, 32, 0)[5].tokens.tolist()
    )


def test_gaps_go_by_the_power_law() -> None:
    """The first key's place: s^(a-1) over the sum of all; the chance of a place that is drawn alone."""
    for power in (0.01, 1.0):
        corpus = Recall(pairs=1, vocab=8, length=22, power=power, examples=20_000)
        places = (corpus.draw(0, 0)[1] != IGNORED).argmax(1) // 2 - 1
        found = np.bincount(places, minlength=10) / corpus.examples
        wanted = np.arange(1, 11) ** (power - 1.0)
        wanted /= wanted.sum()
        error = np.sqrt(wanted * (1 - wanted) / corpus.examples)
        assert (abs(found - wanted) < 5 * error).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [({"pairs": 5, "length": 18}, "take 20 tokens"), ({"pairs": 4, "vocab": 8}, "as many keys"), ({"pair": 4}, "pair")],
)
def test_refusals(change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Spec.parse("corpus", {"kind": "recall", "length": 32} | change)


def recipe(folder: Path, **train: Any) -> dict[str, Any]:
    corpus = {"kind": "recall", "pairs": 2, "vocab": 16, "length": 12}
    return {
        "model": {
            "kind": "decoder", "dim": 32, "depth": 1, "init": "lecun", "position": {"kind": "cnn", "kernel": 2},
            "blocks": {"mixer": {"kind": "attention", "heads": 1, "position": "none"}, "feedforward": None},
        },
        "data": {
            "train": corpus | {"examples": 128}, "held_out": corpus | {"split": "held_out", "examples": 64},
            "cache": str(folder / "cache"),
        },
        "train": {
            "steps": 150, "batch": 64, "length": 12, "lr": 2e-2, "warmup": 10, "autocast": "none", "device": "cpu",
        } | train,
        "out": str(folder / "run"),
    }  # fmt: skip


def test_attention_learns_it_and_the_checkpoint_is_whole(tmp_path: Path) -> None:
    found = fit(recipe(tmp_path), progress=False)
    assert found.held_out is not None and found.held_out["tokens"] == 128  # two answers a row, and nothing else
    assert found.held_out["accuracy"] > 0.95  # 1/2 is a guess among the values told
    model, tokenizer = hub.load(tmp_path / "run"), hub.load_tokenizer(tmp_path / "run")
    assert numbers(tokenizer) == 16 and tokenizer.encode("3 9 5 12 5") == [3, 9, 5, 12, 5]
    row = GeneratedRows(Recall(pairs=2, vocab=16, length=12, split="held_out"), 12, 0)[0]
    said = model(torch.tensor(tokenizer.encode(" ".join(map(str, row.tokens.tolist()))))[None]).logits[0].argmax(-1)
    loss = NextToken()(model, collate([row]))
    assert int((said == torch.from_numpy(row.labels)).sum()) == int(loss.metrics["correct"][0])


def test_a_run_resumes_bitwise(tmp_path: Path) -> None:
    whole = fit(recipe(tmp_path / "a", steps=6, save_every=3), progress=False)
    data = recipe(tmp_path / "b", steps=6, save_every=3, keep=9)
    fit(data, progress=False)
    shutil.rmtree(checkpoint.found(tmp_path / "b" / "run")[-1])  # as if interrupted after three steps
    assert len(checkpoint.found(tmp_path / "b" / "run")) == 1
    again = fit(data, resume=True, progress=False)
    assert (again.loss, again.held_out) == (whole.loss, whole.held_out)


def test_what_does_not_go_with_it(tmp_path: Path) -> None:
    data = recipe(tmp_path)
    with pytest.raises(DataError, match="draws rows of 12 tokens"):
        fit(recipe(tmp_path, length=8), progress=False)
    with pytest.raises(SpecError, match="brings its own"):
        fit(data | {"tokenizer": {"train": 258}}, progress=False)
    with pytest.raises(SpecError, match="says itself what is asked"):
        fit(data | {"model": {"kind": "encoder", "dim": 8, "depth": 1}, "objective": "masked_lm"}, progress=False)
    write_numbers(15, tmp_path / "other")
    with pytest.raises(SpecError, match=r"ids 0 \.\. 15"):
        GeneratedSet.of(Recall(vocab=16, pairs=2), hub.load_tokenizer(tmp_path / "other"))
    assert json.loads((tmp_path / "other" / "tokenizer_config.json").read_text())


def test_preflight_shows_what_is_asked(tmp_path: Path) -> None:
    seen = preflight(Recipe.parse(recipe(tmp_path)))
    assert seen.to_dict()["labels"] == 2 * 64 and seen.to_dict()["tokens"] == 12 * 64
