"""Corpora, tokenizer, token sets: what is on disk comes back exactly, and bad input says what was wrong."""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dovetail.data import TokenSet, prepare, train_tokenizer
from dovetail.data.corpus import Files, Folder, JsonLines, TextFile
from dovetail.data.generated import write_numbers
from dovetail.data.pydoc import HELD_OUT, TRAIN, Pydoc
from dovetail.data.tokenizer import encode_documents
from dovetail.errors import DataError, RunError, SpecError
from dovetail.spec import Spec
from oracles import oracle_for

TEXTS = ["def f(x):\n    return x + 12345\n", "龙飞凤舞 — naïve café\n", "", "a b c\n" * 50]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: Any) -> Any:
    return train_tokenizer(TEXTS, 290, tmp_path_factory.mktemp("tokenizer"))


@oracle_for("corpus", "text", "files", "folder", "jsonl")
def test_every_source_gives_the_same_documents(tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "z.md").write_text("other", encoding="utf-8")
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"id": 1, "body": t}) + "\n\n" for t in TEXTS))
    (tmp_path / "joined").write_text("<sep>".join(TEXTS), encoding="utf-8")
    names = [str(tmp_path / f"{i}.txt") for i in range(4)]
    for corpus in (
        Files(paths=tuple(names)),
        Spec.parse("corpus", {"kind": "files", "paths": names}),
        Folder(path=str(tmp_path)),
        JsonLines(path=str(tmp_path / "all.jsonl"), field="body"),
        TextFile(path=str(tmp_path / "joined"), separator="<sep>"),
    ):
        assert list(corpus.documents()) == TEXTS  # type: ignore[attr-defined]
    assert list(TextFile(path=names[1]).documents()) == [TEXTS[1]]
    assert list(Folder(path=str(tmp_path), glob="**/*.md").documents()) == ["other"]
    assert Files(paths=tuple(names)).fingerprint() == Folder(path=str(tmp_path)).fingerprint()
    assert Files(paths=tuple(names[:2])).fingerprint() != Files(paths=tuple(names[:3])).fingerprint()


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"ok \xff\xfe")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (tmp_path / "long.jsonl").write_text('{"text": "a"}\n{"text": "b", "id": ' + "1" * 5000 + "}\n")
    (tmp_path / "deep.jsonl").write_text('{"text": "a", "tree": ' + "[" * 99_999 + "]" * 99_999 + "}\n")
    for corpus, message in [
        (TextFile(path=str(tmp_path / "nowhere")), "nowhere"),
        (TextFile(path=str(tmp_path / "bytes")), "not UTF-8.*byte 3"),
        (Folder(path=str(tmp_path / "nowhere")), "no such folder"),
        (Folder(path=str(tmp_path), glob="*.rst"), "no file matches"),
        (TextFile(path="a\0b"), "cannot be read"),
        (Folder(path=str(tmp_path), glob="/*.txt"), "'/\\*.txt' cannot be searched"),
        (Folder(path=str(tmp_path), glob=""), "'' cannot be searched"),
        (JsonLines(path=str(tmp_path / "broken.jsonl")), "broken.jsonl:2"),
        (JsonLines(path=str(tmp_path / "long.jsonl")), "long.jsonl:2"),
        (JsonLines(path=str(tmp_path / "deep.jsonl")), "deep.jsonl:1"),
        (JsonLines(path=str(tmp_path / "other.jsonl")), "(?s)other.jsonl:2.*body"),
    ]:
        with pytest.raises(DataError, match=message):
            list(corpus.documents())


def test_line_ends_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"a\r\nb\rc\n\r\n---\r\nd\r\n")
    assert list(TextFile(path=str(tmp_path / "t")).documents()) == ["a\r\nb\rc\n\r\n---\r\nd\r\n"]
    assert list(TextFile(path=str(tmp_path / "t"), separator="\n---\n").documents()) == ["a\r\nb\rc\n", "d\r\n"]


def test_a_byte_order_mark_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert list(JsonLines(path=str(tmp_path / "t.jsonl")).documents()) == ["a", "b"]


def test_half_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n{"text": "x\\ud800y"}\n')
    with pytest.raises(DataError, match=r"(?s)'\\ud800', is no character.*t\.jsonl:2"):
        JsonLines(path=str(tmp_path / "t.jsonl")).fingerprint()


@oracle_for("corpus", "pydoc")
def test_pydoc_holds_the_modules_sources() -> None:
    documents = list(Pydoc(split="held_out").documents())
    for name in ("statistics", "heapq", "graphlib", "tarfile"):
        assert inspect.getsource(importlib.import_module(name)) in documents
    assert not set(TRAIN) & set(HELD_OUT)
    assert set(TRAIN + HELD_OUT) <= set(sys.stdlib_module_names)
    train = set(Pydoc().documents())
    assert not train & set(documents) and sum(map(len, train)) > 4_000_000
    few = list(Pydoc(limit=50_000).documents())
    assert 0 < sum(map(len, few)) <= 50_000 and few == list(Pydoc().documents())[: len(few)]
    with pytest.raises(SpecError, match="limit"):
        Spec.parse("corpus", {"kind": "pydoc", "limit": 0})


def test_tokenizer_is_lossless_and_marks_documents(tokenizer: Any) -> None:
    assert tokenizer.vocab_size == 290
    for text in [*TEXTS, "\x00\t😀 unseen ß"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("ab")[0] == tokenizer.bos_id
    (ids,) = encode_documents(tokenizer, ["a12"])
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_ids[0]
    assert [tokenizer.decode([i]) for i in ids[1:-1]] == ["a", "1", "2"]


def test_tokenizer_loads_in_transformers(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    again = train_tokenizer(TEXTS, 290, tmp_path)
    assert again.fast.to_str() == tokenizer.fast.to_str()  # training is deterministic
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x): return 龙 12\n"
    assert theirs(text)["input_ids"] == again.encode(text)
    assert theirs.bos_token_id == again.bos_id and theirs.eos_token_id == again.eos_ids[0]


def test_tokenizer_refuses(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="258"):
        train_tokenizer(TEXTS, 100, tmp_path)
    with pytest.raises(DataError, match="empty"):
        train_tokenizer([], 300, tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for write in (lambda to: train_tokenizer(TEXTS, 300, to), lambda to: write_numbers(5, to)):
        with pytest.raises(RunError, match=r"(?s)could not be written: Not a directory.*data\.cache"):
            write(tmp_path / "file" / "tokenizers")


def test_token_set_is_the_documents_end_to_end(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("<sep>".join(TEXTS), encoding="utf-8")
    corpus = TextFile(path=str(tmp_path / "t"), separator="<sep>")
    made = prepare(corpus, tokenizer, tmp_path / "cache")
    real = encode_documents(tokenizer, [t for t in TEXTS if t])
    assert made.documents == 3 and made.tokens.tolist() == [i for ids in real for i in ids]
    assert np.diff(made.offsets).tolist() == [len(ids) for ids in real]
    assert isinstance(made.tokens, np.memmap) and made.tokens.dtype == np.uint16
    assert made.meta["text_sha256"] == corpus.fingerprint()
    stamp = Path(made.tokens.filename).stat().st_mtime_ns  # type: ignore[arg-type]
    again = prepare(corpus, tokenizer, tmp_path / "cache")
    assert Path(again.tokens.filename).stat().st_mtime_ns == stamp  # type: ignore[arg-type]
    (tmp_path / "t").write_text("other")
    assert prepare(corpus, tokenizer, tmp_path / "cache").meta["text_sha256"] != made.meta["text_sha256"]


def test_a_full_disk_while_tokenising_leaves_nothing(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    corpus = Files(paths=(str(tmp_path / "t"),))
    (tmp_path / "t").write_text("some text here")

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    for broken in ("fsync", "replace"):
        monkeypatch.setattr(os, broken, full)
        with pytest.raises(RunError, match=r"(?s)could not be written: No space left.*data\.cache"):
            prepare(corpus, tokenizer, tmp_path)
        if broken == "replace":
            with pytest.raises(RunError, match="tokenizer could not be written"):
                train_tokenizer(TEXTS, 258, tmp_path / "words")
            assert not list((tmp_path / "words").iterdir())
        monkeypatch.undo()
        assert not list((tmp_path / "tokens").iterdir())
    assert prepare(corpus, tokenizer, tmp_path).documents == 1


def test_damaged_or_empty_sets_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("some text here")
    (tmp_path / "empty").write_text("")
    made = prepare(TextFile(path=str(tmp_path / "t")), tokenizer, tmp_path)
    data = Path(made.tokens.filename)  # type: ignore[arg-type]
    data.write_bytes(data.read_bytes()[:-2])
    with pytest.raises(DataError, match="do not belong together"):
        TokenSet.open(data.with_suffix(".json"))
    with pytest.raises(DataError, match="empty"):
        prepare(TextFile(path=str(tmp_path / "empty")), tokenizer, tmp_path)
    assert not list((tmp_path / "tokens").glob("*.part"))
