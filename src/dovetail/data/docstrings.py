"""Functions of the standard library and the first line of their docstrings: summaries that every machine has."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from dovetail.data.corpus import read_text
from dovetail.data.pairs import Pairs
from dovetail.data.pydoc import HELD_OUT, TRAIN, module_files
from dovetail.spec import register


@register("corpus", "docstrings", oracle="formula: ast.get_docstring", source="the Python standard library")
class Docstrings(Pairs):
    """{source}: a function without its docstring; {summary}: the docstring's first line. Modules as in `pydoc`.

    Functions that are nothing but a docstring, or share its lines with code, are left out. limit: at most so many.
    """

    split: Literal["train", "held_out"] = "train"
    limit: int | None = Field(default=None, ge=1)
    prompt: str = "{source}\n#"
    completion: str = " {summary}"

    def items(self) -> Iterator[tuple[str, dict[str, Any]]]:
        found = 0
        for path in module_files(TRAIN if self.split == "train" else HELD_OUT):
            text = read_text(path)
            for line, source, summary in functions(text):
                if found == self.limit:
                    return
                found += 1
                yield f"{path}:{line}", {"source": source, "summary": summary}


def functions(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, source without docstring, first line of the docstring) of each function, in the order of the source."""
    lines = text.split("\n")  # as the parser counts; form feeds stay within a line
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for node in sorted(nodes, key=lambda n: (n.lineno, n.col_offset)):
        said = (ast.get_docstring(node) or "").strip()
        if not said or len(node.body) == 1:
            continue
        first, doc, rest = node.lineno, node.body[0], node.body[1]
        assert doc.end_lineno is not None and node.end_lineno is not None
        if doc.lineno <= first or doc.end_lineno >= rest.lineno or lines[doc.lineno - 1][: doc.col_offset].strip():
            continue
        kept = lines[first - 1 : doc.lineno - 1] + lines[doc.end_lineno : node.end_lineno]
        yield first, textwrap.dedent("\n".join(kept)).strip(), said.split("\n")[0].strip()
