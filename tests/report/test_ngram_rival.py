"""N-grams beside models: asked exactly what the models are asked, in every report that has a loss of tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dovetail as dt
from dovetail.data import TokenSet, prepare, rows_of
from dovetail.data.corpus import TextFile
from dovetail.data.rows import IGNORED
from dovetail.data.tokenizer import encode_documents
from dovetail.errors import DataError, SpecError
from dovetail.report.ngram_rival import count_ngrams
from dovetail.report.recipe import Comparison, NGrams
from dovetail.report.study import Study, _key, _run, study
from dovetail.report.text import encoded, rows_within
from dovetail.stats import NGram

SPLIT = {"kind": "text", "separator": "glue"}


@pytest.fixture()
def data(tmp_path: Path, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """train and held_out as corpora of several documents."""
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path / "cache"))
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return {name: SPLIT | {"path": str(tmp_path / name)} for name in texts}


def documents(data: dict[str, Any], name: str) -> list[str]:
    return [text for text in TextFile(**{k: v for k, v in data[name].items() if k != "kind"}).documents() if text]


def fitted(tokenizer: Any, data: dict[str, Any], order: int) -> NGram:
    return NGram.fit(encode_documents(tokenizer, documents(data, "train")), order, vocab=tokenizer.vocab_size)


def test_a_comparison_sets_them_beside_every_arm(checkpoint: Path, data: dict[str, Any], tmp_path: Path) -> None:
    recipe = {
        "name": "test",
        "model": {"path": str(checkpoint), "device": "cpu"},
        "data": {"corpus": data["held_out"] | {"separator": None}, "tokens": 256},
        "arms": [{"name": "short"}, {"name": "long", "length": 128}, {"name": "cut", "length": 128, "truncate": 32}],
        "ngram": {"data": data["train"], "order": 3},
        "speed": {"rounds": 1, "new": 2},
    }
    result = dt.compare(recipe, out=tmp_path / "out", quiet=True)
    tokenizer = dt.load_tokenizer(checkpoint)
    model = fitted(tokenizer, data, 3)
    rows = rows_within([encoded(tokenizer, (tmp_path / "held_out").read_text())[0]], 128, 256).tolist()
    wanted = -np.mean([[model.logprob(row[:i], row[i]) for i in range(1, 129)] for row in rows])
    ngram = result.ngram
    assert ngram is not None and ngram.at(128).nats == pytest.approx(wanted, rel=1e-12)
    assert ngram.at(32).nats != ngram.at(128).nats and ngram.at(32).tokens == ngram.at(128).tokens == 256
    arms = {arm.name: arm for arm in result.arms}
    assert {v.arm: v.gap for v in ngram.verdicts} == pytest.approx(
        {name: ngram.at(arm.length).nats - arm.nats for name, arm in arms.items()}
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    beside = [r for r in report["rows"] if r["peer"] == "3-gram"]
    assert [r["case"] for r in beside] == list(arms) and beside[1]["theirs"] == pytest.approx(wanted)
    assert report["ngram"]["tokens"] == ngram.tokens and report["recipe"]["ngram"]["order"] == 3
    for said in (str(result), (tmp_path / "out" / "index.html").read_text()):
        flat = " ".join(said.split())
        assert f"{wanted:.4f}" in flat and "3-gram: the trivial rival, interpolated modified Kneser-Ney" in flat
        assert "loses to its trivial rival" in flat, "an untrained model does"

    with pytest.raises(SpecError, match="counted on the text that they are scored on"):
        Comparison.load(recipe | {"ngram": {"data": recipe["data"]["corpus"]}})
    with pytest.raises(SpecError, match="an arm is called that"):
        Comparison.load(recipe | {"arms": [{"name": "5-gram"}], "ngram": {"data": data["train"]}})
    with pytest.raises(SpecError, match="did you mean 'order'"):
        Comparison.load(recipe | {"ngram": {"data": data["train"], "ordr": 3}})
    (tmp_path / "copy").write_text((tmp_path / "held_out").read_text())
    copy = recipe | {"ngram": {"data": {"kind": "text", "path": str(tmp_path / "copy")}}, "arms": [{"name": "short"}]}
    with pytest.raises(DataError, match="counted on the text that is scored"):
        dt.compare(copy, out=tmp_path / "not", quiet=True)


@pytest.mark.parametrize("pack", ["documents", "none"])
def test_labels_of_training_rows(pack: str, checkpoint: Path, data: dict[str, Any]) -> None:
    """Every label is asked after the tokens of its row that its document has, and no other."""
    tokenizer = dt.load_tokenizer(checkpoint)
    corpus, held_out = (TextFile.parse("corpus", data[name]) for name in ("train", "held_out"))
    tokens: TokenSet = prepare(held_out, tokenizer)  # type: ignore[arg-type]
    rows, model, values = rows_of(tokens, 40, pack), fitted(tokenizer, data, 4), []
    for index in range(12):
        row: Any = rows[index]
        for t in np.flatnonzero(row.labels != IGNORED):
            seen = row.tokens[: t + 1][row.segments[: t + 1] == row.segments[t]]
            values.append(-model.logprob(seen.tolist(), int(row.labels[t])))
    counted = count_ngrams(NGrams(order=4), corpus, tokenizer)  # type: ignore[arg-type]
    assert counted.held_out(rows, 12) == (pytest.approx(np.mean(values), rel=1e-12), len(values))
    every: list[Any] = [rows[i] for i in range(len(rows))]
    assert counted.held_out(rows)[1] == sum(int((row.labels != IGNORED).sum()) for row in every)


def test_a_study_has_them_as_its_rival(checkpoint: Path, data: dict[str, Any], tmp_path: Path) -> None:
    train = {"steps": 1, "batch": 2, "length": 24, "autocast": "none", "device": "cpu", "eval_batches": 3}
    asked: dict[str, Any] = {
        "name": "tiny",
        "base": {"model": str(checkpoint), "data": data, "train": train},
        "arms": [{"name": "a"}],
        "seeds": [0],
        "ngram": {"order": 2},
        "published": [
            {"metric": metric, "source": "print", "order": [["a"], ["2-gram"]]} for metric in ("nats", "accuracy")
        ],
        "out": str(tmp_path / "out"),
    }
    said = Study.load(asked)
    arm = said.arms[0]
    _run(said, arm, 0, _key(said, arm, 0), tmp_path / "out" / "runs" / "a" / "0", None)  # here, in no other process
    found = study(said, quiet=True)
    tokenizer = dt.load_tokenizer(checkpoint)
    corpora: Any = said.recipe(arm, 0).data
    counted = count_ngrams(NGrams(order=2), corpora.train, tokenizer)
    rows = rows_of(prepare(corpora.held_out, tokenizer), 24, "documents")
    nats, labels = counted.held_out(rows, 6)
    assert found.rival is not None and found.rival.name == "2-gram" and found.rival.metrics == {"nats": (nats, 0.0)}
    assert [(o.first, o.second) for o in found.orders()] == [("a", "2-gram")]
    twice = replace(found, seeds=(0, 1))  # as if these were means of two seeds
    assert twice.orders()[0].outcome == "below", "an untrained model is"
    told = [pair for table in found.tables for pair in twice.against_print(table)]
    assert told == [("a", "2-gram", "above", "below"), ("a", "2-gram", "above", "unresolved")], "it has no accuracy"
    assert "modified Kneser-Ney" in found.note and f"the same {labels:,} tokens" in found.note
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {(r["peer"], r["theirs"]) for r in report["rows"] if r["metric"] == "nats/token"} == {
        ("2-gram", round(nats, 4))
    }
    assert "2-gram" in (tmp_path / "out" / "index.html").read_text() and "2-gram" in str(found)

    for change, why in (
        ({"arms": [{"name": "a"}, {"name": "b", "change": {"train.length": 16}}]}, "in other tokens or rows"),
        ({"arms": [{"name": "a", "change": {"objective": "distillation"}}]}, "asked otherwise"),
        ({"base": asked["base"] | {"data": {"train": data["train"]}}}, "nothing is held out"),
        ({"main": "accuracy"}, "leave ngram out"),
        ({"arms": [{"name": "2-gram"}]}, "two rows are called '2-gram'"),
        ({"ngram": {"order": 99}}, "order"),
    ):
        with pytest.raises(SpecError, match=why):
            Study.load(asked | change)
