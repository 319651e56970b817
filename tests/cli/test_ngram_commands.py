"""dovetail algo ngram, dovetail data filter and the n-gram rival of dovetail eval, through the real entry point."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dovetail as dt
from dovetail.cli.main import main
from dovetail.data.filter import filter_documents
from dovetail.report.ngram_rival import ngram_rival
from dovetail.stats import NGram

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `dovetail ARGS` in this process: (exit code, stdout, stderr)."""

    def call(*args: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dovetail", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


GOOD = "the cat sat on the mat\nthe dog sat on the mat\na cat and a dog ran to the house\n" * 10


def test_fit_perplexity_suggest_generate_and_save(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(GOOD)
    (tmp_path / "b.txt").write_text("the cat ran to the moon\n")
    asked = ("--perplexity", tmp_path / "b.txt", "--suggest", "the", "--generate", 5, "--json")
    code, out, _ = run(
        "algo", "ngram", tmp_path / "a.txt", "--smoothing", "witten-bell", "--arpa", tmp_path / "m.arpa", *asked
    )
    found = json.loads(out.splitlines()[-1])
    model = NGram.fit(GOOD, 3, "witten-bell", unit="word")
    assert code == 0 and found["oov"] == 1 and found["tokens"] == 7
    assert math.isclose(found["perplexity"], model.perplexity("the cat ran to the moon"), rel_tol=1e-9)
    assert found["suggestions"][0][0] == model.suggest(["<s>", "the"])[0][0]
    code, out, _ = run("algo", "ngram", tmp_path / "m.arpa", *asked)
    assert code == 0 and json.loads(out.splitlines()[-1])["text"] == found["text"]
    code, out, _ = run("algo", "ngram", tmp_path / "a.txt", "--suggest", "the")
    assert code == 0 and "3-grams" in out and "fixed ones were taken" in out
    code, _, err = run("algo", "ngram", tmp_path / "none.txt")
    assert code == 2 and "cannot be read" in err and "Traceback" not in err
    for idle in (
        ("--generate", -5),
        ("--generate", 0),
        ("--seed", 3),
        ("--generate", 3, "--seed", -3),
        ("--prompt", "the"),
        ("--order", 0),
    ):
        code, _, err = run("algo", "ngram", tmp_path / "a.txt", *idle)
        assert code == 2 and idle[-2] in err
    for name, value in (("--order", 3), ("--smoothing", "mle"), ("--memory", 9)):
        code, _, err = run("algo", "ngram", tmp_path / "m.arpa", name, value)
        assert code == 2 and f"does not read {name}" in err
    for place, says in (
        (tmp_path, "is a folder"),
        (tmp_path / "no/m.arpa", "there is no folder"),
        (tmp_path / "a.txt", "overwritten"),
    ):
        code, out, err = run("algo", "ngram", tmp_path / "a.txt", "--arpa", place)
        assert code == 2 and says in err and not out
    assert (tmp_path / "a.txt").read_text() == GOOD
    asked = ("--smoothing", "mle", "--perplexity", tmp_path / "b.txt", "--json")
    code, out, _ = run("algo", "ngram", tmp_path / "a.txt", *asked)
    assert code == 0 and json.loads(out)["perplexity"] is None  # infinite, for which JSON has no word
    code, _, err = run("algo", "ngram", tmp_path / "a.txt", "--suggest", "\udcff")
    assert code == 2 and "not UTF-8" in err
    code, _, err = run("algo", "ngram", tmp_path / "a.txt", "--unit", "wrod")
    assert code == 2 and "did you mean 'word'" in err


def test_filter_keeps_what_reads_like_the_reference(run: Run, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text(GOOD)
    documents = ["the cat sat on the house", "zq xv qq zz", "a dog sat on the mat", "mat the on sat dog a", " "]
    lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(documents)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out.jsonl"
    asked = ("--reference", tmp_path / "good.txt", "--out", out, "--high", 0.5)
    code, said, _ = run("data", "filter", tmp_path / "in.jsonl", *asked, "--json")
    found = json.loads(said.splitlines()[-1])
    assert code == 0 and (found["documents"], found["kept"]) == (5, 2)
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [0, 2]
    (tmp_path / "in.txt").write_text("\n\n".join(documents[:4]))
    code, _, _ = run(
        "data", "filter", tmp_path / "in.txt", "--reference", tmp_path / "good.txt", "--out", tmp_path / "o"
    )
    assert code == 0 and (tmp_path / "o").read_text() == "\n\n".join([documents[0], documents[2]])
    code, _, err = run("data", "filter", tmp_path / "in.jsonl", *asked, "--field", "body")
    assert code == 2 and "no text in field 'body'" in err
    code, _, err = run("data", "filter", tmp_path / "in.jsonl", *asked, "--separator", "x")
    assert code == 2 and "JSON Lines does not read --separator" in err
    code, _, err = run("data", "filter", tmp_path / "in.txt", *asked, "--field", "x")
    assert code == 2 and "a text file does not read --field" in err
    model = NGram.fit(GOOD, unit="word")
    found = filter_documents(documents, model, low=0.5, high=1.0)
    assert found.keep[4] is False and math.isnan(found.perplexity[4]) and sum(found.keep) == 3


def test_the_rival_of_an_evaluation_is_asked_the_same_tokens(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(GOOD)
    (tmp_path / "b.txt").write_text("the cat ran to the house\n" * 4)
    tokenizer = dt.load_tokenizer(ROOT / "assets/pydoc-llama")
    code, out, _ = run(
        "eval", ROOT / "assets/pydoc-llama", "--text", tmp_path / "b.txt", "--ngram", tmp_path / "a.txt", "--json"
    )
    found = json.loads(out.splitlines()[-1])
    rival = ngram_rival(tokenizer, GOOD, "the cat ran to the house\n" * 4)
    assert code == 0 and found["ngram_nats_per_token"] == rival["nats_per_token"] > 0
    assert found["ngram_order"] == 3 and found["ngram_nats_per_token"] < found["nats_per_token"]


def test_texts_that_are_scored_may_be_pipes(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(GOOD)
    text = b"the cat ran to the house\n" * 4
    reader, writer = os.pipe()
    os.write(writer, text)
    os.close(writer)
    asked = ("--ngram", tmp_path / "a.txt", "--json")
    code, out, err = run("eval", ROOT / "assets/pydoc-llama", "--text", f"/dev/fd/{reader}", *asked)
    os.close(reader)
    assert code == 0 and json.loads(out)["bytes"] == len(text), err
    code, _, err = run("eval", ROOT / "assets/pydoc-llama", "--text", tmp_path)
    assert code == 2 and "no text file" in err
