"""`dovetail algo words`: train on a text, save, ask the file again, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dovetail.cli.main import main
from stats import planted


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[Any, str, str]:
    monkeypatch.setattr(sys, "argv", ["dovetail", "algo", "words", *argv])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


def test_train_save_and_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    letters = str.maketrans("0123456789", "abcdefghij")
    text = ". ".join(" ".join(words).translate(letters) for words in planted.sentences(400))
    (tmp_path / "text.txt").write_text(text)
    code, out, _ = run(
        monkeypatch, capsys, str(tmp_path / "text.txt"), "--method", "pmi", "--set", "dim=16", "--nearest", "tawa",
        "--save", str(tmp_path / "v.bin"), "--json",
    )  # fmt: skip
    made = json.loads(out.splitlines()[-1])
    assert (code, made["words"], made["dim"]) == (0, 51, 16)
    assert all(word.startswith("taw") for word, _ in made["answers"]["tawa"][:5])
    again = run(
        monkeypatch, capsys, str(tmp_path / "v.bin"), "--nearest", "tawa", "--analogy", "tawa tawb tbwa", "--json"
    )
    assert json.loads(again[1].splitlines()[-1])["answers"]["tawa"] == made["answers"]["tawa"]
    for argv, message in [
        (("v.bin", "--set", "dim=3"), "say how to train"),
        (("v.bin", "--analogy", "one two"), "not three words"),
        (("text.txt", "--set", "dim"), "not name=value"),
        (("text.txt", "--set", "dim=[1"), "the value of dim is not YAML"),
        (("text.txt", "--set", "min_count=3"), "give --min-count"),
        (("text.txt", "--save", str(tmp_path / "text.txt")), "would be overwritten"),
        (("v.bin", "--rule", "3cosmul", "--nearest", "tawa"), "does not read --rule"),
        (("v.bin", "--count", "3"), "does not read --count"),
        (("text.txt", "--set", "widow=3"), "did you mean 'window'"),
        (("none.txt",), "no text file"),
    ]:
        code, _, err = run(monkeypatch, capsys, str(tmp_path / argv[0]), *argv[1:])
        assert code == 2
        assert message in err
    assert (tmp_path / "text.txt").read_text() == text
    (tmp_path / "one.tsv").write_text("tawa\ttawb\t3\n")
    asked = (str(tmp_path / "v.bin"), "--pairs", str(tmp_path / "one.tsv"))
    assert json.loads(run(monkeypatch, capsys, *asked, "--json")[1])["similarity"]["spearman"] is None
    assert "nan" not in run(monkeypatch, capsys, *asked)[1]
