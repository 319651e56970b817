"""A token embedding that starts from a file of word vectors: row i is id i, the rest as the base scheme draws it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dovetail as dt
from dovetail.errors import BuildError, DataError
from dovetail.stats import WordVectors
from oracles import oracle_for

TOKENS = ("<pad>", "a", "b", "c")


def build(path: Path | str, **more: Any) -> Any:
    init = {"kind": "word_vectors", "path": str(path), "base": {"kind": "normal", "std": 0.5}}
    model = {"kind": "decoder", "vocab": 4, "dim": 16, "depth": 1, "blocks": {"mixer": {"kind": "attention"}}}
    return dt.build(model | {"init": init} | more)


@oracle_for("init", "word_vectors")
def test_the_embedding_is_the_file(tmp_path: Path) -> None:
    trained = WordVectors(["c", "a", "z", "b"], torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    trained.embedding(TOKENS, missing="mean").save(tmp_path / "rows.bin")
    model = build(tmp_path / "rows.bin")
    expected = torch.stack([trained.matrix.mean(0), trained["a"], trained["b"], trained["c"]])
    torch.testing.assert_close(model.embedding.table.weight.data, expected)
    plain = build(tmp_path / "rows.bin", init={"kind": "normal", "std": 0.5})
    ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    changed = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert changed == ["embedding.table.weight"]
    encoder = {"kind": "encoder", "token_types": 2, "blocks": {"mixer": {"kind": "attention"}}, "depth": 1}
    types = build(tmp_path / "rows.bin", **encoder).types.weight
    assert types.shape == (2, 16) and types.std() > 0.2


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    WordVectors(TOKENS, torch.zeros(4, 8)).save(tmp_path / "narrow.txt")
    with pytest.raises(BuildError, match="4 vectors of width 8, the embedding 4 of width 16"):
        build(tmp_path / "narrow.txt")
    with pytest.raises(DataError, match="no file"):
        build(tmp_path / "missing.txt")
