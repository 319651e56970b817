"""Control codes before documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dovetail.data import prepare, train_tokenizer
from dovetail.data.control import Controlled
from dovetail.errors import DataError, SpecError
from dovetail.spec import Spec
from oracles import oracle_for


@oracle_for("corpus", "controlled")
def test_every_document_stands_behind_the_code_of_its_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("once upon<sep><sep>a time")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("x = 1", "y = 2")))
    corpora = [
        {"kind": "text", "path": str(tmp_path / "a.txt"), "separator": "<sep>"},
        {"kind": "jsonl", "path": str(tmp_path / "b.jsonl")},
    ]
    corpus = Spec.parse("corpus", {"kind": "controlled", "codes": ["Books", "Code"], "corpora": corpora})
    assert isinstance(corpus, Controlled)
    assert list(corpus.documents()) == ["Books once upon", "", "Books a time", "Code x = 1", "Code y = 2"]
    assert Spec.parse("corpus", corpus.to_dict()) == corpus
    tokenizer = train_tokenizer(corpus.documents(), 262, tmp_path / "tokenizer")
    made = prepare(corpus, tokenizer, tmp_path)
    first = [made.tokens[a:b] for a, b in zip(made.offsets, made.offsets[1:], strict=False)]
    assert made.documents == 4
    assert [tokenizer.fast.decode(ids.tolist()).split()[0] for ids in first] == ["Books"] * 2 + ["Code"] * 2


def test_labelled_examples_are_no_documents(tmp_path: Path) -> None:
    images = {"kind": "mnist", "path": str(tmp_path), "split": "train"}
    for corpus in (
        {"kind": "controlled", "codes": ["A"], "corpora": [images]},
        {"kind": "echoed", "corpus": {"kind": "pixels", "of": images}},
    ):
        with pytest.raises(DataError, match="has labelled examples, and no text"):
            Spec.parse("corpus", corpus).fingerprint()  # type: ignore[attr-defined]


def test_codes_are_one_each_and_different(tmp_path: Path) -> None:
    text = {"kind": "text", "path": "a.txt"}
    for codes in (["A"], [], ["A", "A"], ["A", " B"], ["A", ""]):
        with pytest.raises(SpecError, match="codes"):
            Spec.parse("corpus", {"kind": "controlled", "codes": codes, "corpora": [text, text]})
