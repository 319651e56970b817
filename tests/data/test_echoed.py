"""Echoes: the text without them is as it was, and each of them stands before itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.data.echoed import Echoed
from dovetail.errors import SpecError
from dovetail.spec import Spec
from oracles import oracle_for

TEXT = " ".join(f"word{i}" for i in range(300)) + "\n\nend  \n"


def echoed(path: Path, **options: object) -> Echoed:
    given = {"kind": "echoed", "corpus": {"kind": "text", "path": str(path)}}
    return Spec.parse("corpus", given | options)  # type: ignore[return-value]


@oracle_for("corpus", "echoed")
@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 40), st.integers(0, 3))
def test_echoes_are_of_what_was_said(low: int, more: int, further: int, seed: int) -> None:
    span = (low, low + more)
    corpus = echoed(Path("any"), span=list(span), reach=span[1] + further, seed=seed)
    pieces = list(corpus.pieces(TEXT))
    assert "".join(itertools.chain(*pieces[::2])) == TEXT
    for i in range(1, len(pieces), 2):
        echo, before = pieces[i], list(itertools.chain(*pieces[:i]))
        if echo:
            assert low <= len(echo) <= span[1]
            starts = range(max(0, len(before) - corpus.reach), len(before) - len(echo) + 1)
            assert any(before[s : s + len(echo)] == echo for s in starts)
    assert not pieces[-1]


def test_the_draw_is_the_seeds(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text(TEXT, encoding="utf-8")
    one, other = echoed(file), echoed(file, seed=1)
    assert list(one.documents()) == list(one.documents()) != list(other.documents())
    assert one.fingerprint() != other.fingerprint()
    assert len(next(echoed(file, share=1.0).documents())) > 1.5 * len(TEXT)
    with pytest.raises(SpecError, match="span"):
        echoed(file, span=[9, 4])
