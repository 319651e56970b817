"""The pages of docs/algorithms: their Python and their commands run, their pictures are drawn."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from dovetail.cli.main import main

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(page.stem for page in (DOCS / "algorithms").glob("*.md") if page.stem != "index")
SHOWN = re.compile(r'^--8<-- "docs/generated/algorithms/(.*)\.svg"$', re.MULTILINE)


@pytest.fixture
def frame(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("algorithms_pictures")


def text(page: str) -> str:
    return (DOCS / "algorithms" / f"{page}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_python_and_commands_of_a_page_run_in_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"^```(python|bash)\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL)
    assert "python" in dict(blocks)
    (tmp_path / "assets").symlink_to(DOCS.parent / "assets")
    monkeypatch.chdir(tmp_path)
    session: dict[str, Any] = {}
    for language, block in blocks:
        if language == "python":
            exec(compile(block, f"docs/algorithms/{page}.md", "exec"), session)
            continue
        for line in block.replace("\\\n", " ").splitlines():
            argv, to = line.split("  #")[0].split(" > ")[0], re.findall(r" > (\S+)", line)
            monkeypatch.setattr(sys, "argv", shlex.split(argv))
            capsys.readouterr()
            with pytest.raises(SystemExit) as end:
                main()
            assert not end.value.code, line
            out = capsys.readouterr().out
            if to:
                Path(to[0]).write_text(out)


@pytest.mark.parametrize("page", PAGES)
def test_pictures_of_a_page_are_drawn(page: str, frame: Any) -> None:
    assert page in frame.TOPICS
    pictures = frame.pictures(page)
    assert pictures
    assert sorted(SHOWN.findall(text(page))) == sorted(f"{page}-{name}" for name in pictures)
    for painter in pictures.values():
        html = frame.picture(painter)
        assert re.match(r'<figure>\n<svg style="[^"]*" role="img" aria-label="[^"]{8,}"', html)
        assert html.count("<path") > 5


def test_every_topic_has_a_page_in_the_index(frame: Any) -> None:
    assert sorted(frame.TOPICS) == PAGES
    assert set(re.findall(r"\]\((\w+)\.md\)", text("index"))) == set(PAGES)
