"""Table-to-text: E2E and WebNLG from their own files, as prompt-completion pairs."""

from __future__ import annotations

import csv
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dovetail.data.corpus import read_text
from dovetail.data.pairs import Pairs
from dovetail.errors import DataError
from dovetail.spec import register

_SLOT = re.compile(r"\s*([^,\[\]]+?)\[([^\[\]]*)\]\s*(?:,|$)")


@register("corpus", "e2e", oracle="formula: the lines of the file", source="Novikova et al. 2017 (E2E NLG challenge)")
class E2E(Pairs):
    """Restaurants: {meaning}, such as `name : Zizzi | area : riverside`, and its {text}, a reference an item.

    path: the challenge's CSV (columns mr and ref; slots `name[Zizzi]` are written out as above), or the lines
    `meaning||text` that the prefix-tuning and LoRA papers train on.
    """

    path: str
    prompt: str = "{meaning} |||"
    completion: str = " {text}"

    def items(self) -> Iterator[tuple[str, dict[str, Any]]]:
        text = read_text(Path(self.path))
        return self._rows(text) if self.path.lower().endswith(".csv") else self._lines(text)

    def _lines(self, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            meaning, mark, said = line.partition("||")
            where = f"{self.path}:{number}"
            if not mark:
                raise DataError("no || in this line", where=where, remedy="give lines 'meaning||text', or a .csv")
            yield where, {"meaning": meaning.strip(), "text": said.strip()}

    def _rows(self, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
        rows = csv.DictReader(text.removeprefix("\ufeff").splitlines(keepends=True))
        try:
            yield from self._slots(rows)
        except csv.Error as error:
            raise DataError(
                f"not CSV: {error}", where=f"{self.path}:{rows.line_num}", remedy="look for a quote that is not closed"
            ) from None

    def _slots(self, rows: csv.DictReader[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        if not {"mr", "ref"} <= set(rows.fieldnames or ()):
            raise DataError(
                f"the columns are {', '.join(rows.fieldnames or ()) or 'none'}",
                where=self.path, remedy="give a CSV with columns mr and ref (a test set with its references)",
            )  # fmt: skip
        for row in rows:
            where = f"{self.path}:{rows.line_num}"
            slots = _SLOT.findall(row["mr"] or "")
            if not slots or _SLOT.sub("", row["mr"]).strip():
                raise DataError(f"not a meaning: {row['mr']!r}", where=where, remedy="write name[value], name[value]")
            meaning = " | ".join(f"{name} : {value}" for name, value in slots)
            yield where, {"meaning": meaning, "text": (row["ref"] or "").strip()}


@register("corpus", "webnlg", oracle="formula: the entries of the XML", source="Gardent et al. 2017 (WebNLG challenge)")
class WebNLG(Pairs):
    """Facts: {triples}, such as `Abilene : isPartOf : Texas | ...`, their {category}, and a {text}, one an item.

    path: an XML file of the challenge, or a folder of them (all below it, in the order of their paths). The triples
    are those of the modified set, which the challenge gives as input. Verbalisations marked bad or toFix are left out.
    """

    path: str
    prompt: str = "{triples} |||"
    completion: str = " {text}"

    def items(self) -> Iterator[tuple[str, dict[str, Any]]]:
        root = Path(self.path)
        files = sorted(root.rglob("*.xml"), key=lambda p: p.relative_to(root).as_posix()) if root.is_dir() else [root]
        if not files:
            raise DataError("no XML file is here", where=self.path, remedy="give the folder of the challenge's files")
        for file in files:
            yield from _entries(file)


def _entries(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        tree = ElementTree.fromstring(read_text(file).encode())
    except ElementTree.ParseError as error:
        raise DataError(f"not XML: {error}", where=str(file)) from None
    for entry in tree.iter("entry"):
        where = f"{file}, entry {entry.get('eid')}"
        triples = [_triple(t.text or "", where) for t in entry.iterfind("modifiedtripleset/mtriple")]
        if not triples:
            raise DataError("an entry without triples", where=where, remedy="give the challenge's XML")
        for said in entry.iterfind("lex"):
            if said.get("comment") in ("bad", "toFix"):
                continue
            fields = {"triples": " | ".join(triples), "category": entry.get("category", "")}
            yield where, fields | {"text": (said.findtext("text") or said.text or "").strip()}


def _triple(text: str, where: str) -> str:
    """`subject | property | object` with colons between, as bars stand between triples."""
    parts = [part.strip() for part in text.split(" | ")]
    if len(parts) != 3:
        raise DataError(f"not a triple: {text!r}", where=where, remedy="write subject | property | object")
    return " : ".join(parts)
