"""Which test compares which part with its oracle: `@oracle_for("norm", "rms")` above the test says so.

The table is read from the sources, so that the matrix knows it however few test files are collected.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

Test = TypeVar("Test", bound=Callable[..., object])


def oracle_for(category: str, *kinds: str) -> Callable[[Test], Test]:
    """Claims that the test compares these parts with an independent implementation or formula."""
    assert kinds, f"oracle_for({category!r}) names no kind"
    return lambda test: test


@cache
def claims() -> dict[tuple[str, str], list[str]]:
    """(category, kind) -> the tests that claim it, as file::test."""
    table: dict[tuple[str, str], list[str]] = {}
    here = Path(__file__).parent
    for file in sorted(here.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and getattr(mark.func, "id", "") == "oracle_for":
                    category, *kinds = (ast.literal_eval(arg) for arg in mark.args)
                    for kind in kinds:
                        table.setdefault((category, kind), []).append(f"{file.relative_to(here)}::{node.name}")
    return table
