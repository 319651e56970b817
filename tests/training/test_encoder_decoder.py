"""An encoder-decoder is trained on pairs: rows and masks, the loss against one pair at a time, and a task that it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import dovetail as dt
from dovetail.data.rows import collate, real_tokens
from dovetail.data.source_rows import SourceRows
from dovetail.errors import DataError
from dovetail.objectives.next_token import NextToken
from dovetail.training import fit, preflight
from training.small import recipe

MODEL: dict[str, Any] = {
    "kind": "encoder_decoder", "dim": 32,
    "encoder": {"depth": 1, "blocks": {"feedforward": {"kind": "mlp", "hidden": 64}}},
    "decoder": {"depth": 1, "blocks": {"mixer": "attention", "cross": {"kind": "attention", "position": "none"},
                                       "feedforward": {"kind": "mlp", "hidden": 64}}},
}  # fmt: skip


class Pairs:
    """A token set in memory."""

    def __init__(self, pairs: list[tuple[list[int], list[int]]]):
        rows = [a + b for a, b in pairs]
        self.tokens = np.concatenate([np.asarray(r, np.uint16) for r in rows])
        self.offsets = np.cumsum([0, *map(len, rows)])
        self.prompts: Any = np.asarray([len(a) for a, _ in pairs], np.uint32)


PAIRS = Pairs([([5, 6, 7], [8, 9]), ([4], [5, 6, 7, 8]), ([9, 8, 7, 6, 5], [4])])


def test_rows_and_batches() -> None:
    rows: Any = SourceRows(PAIRS, 4, start=1)  # type: ignore[arg-type]
    assert len(rows) == 3 and rows.cut == 1
    assert [x.tolist() for x in rows[0]] == [[5, 6, 7], [1, 8], [8, 9]]
    assert [x.tolist() for x in rows[2]] == [[9, 8, 7, 6], [1], [4]]
    batch = collate([rows[0], rows[1]])
    assert batch["tokens"].tolist() == [[5, 6, 7], [4, 0, 0]] and batch["attention_mask"].tolist()[1] == [
        True,
        False,
        False,
    ]
    assert batch["decoder_tokens"].tolist() == [[1, 8, 0, 0], [1, 5, 6, 7]]
    assert batch["labels"].tolist() == [[8, 9, -100, -100], [5, 6, 7, 8]]
    assert real_tokens(batch) == 3 + 1 + 2 + 4 and "attention_mask" not in collate([rows[1], rows[1]])
    PAIRS_OFF = Pairs([([1], [2])])
    PAIRS_OFF.prompts = None
    with pytest.raises(DataError, match="trained on pairs"):
        SourceRows(PAIRS_OFF, 4, start=1)  # type: ignore[arg-type]


def test_the_loss_of_a_batch_is_that_of_its_pairs() -> None:
    model = dt.build(MODEL | {"vocab": 12, "decoder_start": 1}).double()
    rows: Any = SourceRows(PAIRS, 8, start=1)  # type: ignore[arg-type]
    ours = NextToken()(model, collate([rows[i] for i in range(3)])).total()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for i in range(3):
        source, decoder, labels = (torch.from_numpy(x)[None] for x in rows[i])
        logits = model(source, decoder).logits
        total, count = total + F.cross_entropy(logits[0], labels[0], reduction="sum"), count + labels.numel()
    assert torch.allclose(ours, total / count, atol=1e-10)


def test_learns_to_repeat_and_exports(tmp_path: Path) -> None:
    words = ["ab", "cd", "ef", "gh", "ij", "kl"]
    data = recipe(tmp_path, steps=120, batch=16, lr=1e-2)
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{a} {b}", "completion": f"{b}"} for a in words for b in words]
    file.write_text("\n".join(map(json.dumps, rows)))
    (some := tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, rows[::2])))
    corpus, again = ({"kind": "pairs", "path": str(path)} for path in (file, some))
    data |= {"model": MODEL, "data": {"train": corpus, "held_out": again, "cache": str(tmp_path / "cache")}}
    found = preflight(data).to_dict()
    assert found["labels"] and not found["pairs_cut"]
    result = fit(data, progress=False)
    assert result.held_out is not None and result.held_out["nats"] < 0.2
    model, tokenizer = dt.load(tmp_path / "out"), dt.load_tokenizer(tmp_path / "out")
    assert model.spec.decoder_start is not None
    said = dt.generate(model, tokenizer, ["ab ef", "kl cd"], max_new_tokens=8)
    assert [text.strip() for text in said] == ["ef", "cd"]
