"""Preflight: the known memory figures, what is shown of the first batch, and what is refused."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import dovetail as dt
from dovetail.errors import DataError
from dovetail.parts.storage.int4 import Int4
from dovetail.parts.storage.int8 import Int8
from dovetail.parts.storage.nf4 import Nf4
from dovetail.surgery import quantise
from dovetail.training import preflight
from dovetail.training.flops import parameter_count
from dovetail.training.memory import estimate, remedies, train_flops
from training.small import recipe


def llama(dim: int, depth: int, hidden: int, heads: int, vocab: int = 151_936) -> Any:
    """On the meta device: nothing of it is in memory."""
    blocks = {
        "mixer": {"kind": "attention", "heads": heads, "bias": "qkv"},
        "feedforward": {"kind": "glu", "hidden": hidden},
    }
    return dt.build({"kind": "decoder", "vocab": vocab, "dim": dim, "depth": depth, "blocks": blocks}, weights=False)


def test_reproduces_the_known_figures() -> None:
    """Full fine-tuning in mixed precision: Qwen1.5-7B about 160 GB, Qwen1.5-72B at least 1,600 GB (80 GB devices)."""
    small, large = llama(4096, 32, 11_008, 32), llama(8192, 80, 24_576, 64, 152_064)
    assert parameter_count(small) == pytest.approx(7.7e9, rel=0.01)
    assert parameter_count(large) == pytest.approx(72.3e9, rel=0.01)
    assert estimate(small).total == pytest.approx(160e9, rel=0.06)
    assert 1_600e9 <= estimate(large).total < 1_800e9
    assert estimate(large).devices >= 20  # type: ignore[operator]
    assert 15e9 < estimate(small, "lora").total < 24e9 and estimate(small, "lora").fits
    assert 6e9 < estimate(small, "qlora").total < 12e9


@pytest.mark.parametrize("storage", [None, Nf4(double=False), Int8(), Int4(block=32)])
def test_codes_have_the_bytes_of_their_storage(storage: Any) -> None:
    blocks = {"mixer": {"kind": "attention"}, "feedforward": {"kind": "glu"}}
    spec = {"kind": "decoder", "vocab": 64, "dim": 64, "depth": 2, "blocks": blocks}
    model = dt.build(spec).to(torch.bfloat16).requires_grad_(False)
    found = estimate(model, "qlora", storage=storage)
    quantise(model, storage or Nf4())
    assert found.sharded["weights"] == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert (
        found.name == f"qlora ({(storage or Nf4()).kind})" and estimate(model, "lora", storage=storage).name == "lora"
    )


def test_names_the_storage_of_the_recipe(tmp_path: Path) -> None:
    data = recipe(tmp_path) | {"adapter": {"kind": "lora", "rank": 2}, "storage": {"kind": "int8"}}
    found, plain = preflight(data), preflight(recipe(tmp_path))
    screen = Console(file=StringIO(), width=160)
    screen.print(found)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "qlora (int8)  (this recipe)" in text and "nf4" not in text
    kept = [[(e["method"], e["storage"]) for e in f.to_dict()["estimates"]] for f in (found, plain)]
    assert kept == [[("full", None), ("lora", None), ("qlora", name)] for name in ("int8", "nf4")]
    assert found.estimates[2].sharded["weights"] != plain.estimates[2].sharded["weights"]


def test_moves_as_it_should() -> None:
    model = llama(1024, 8, 2816, 16, 32_000)
    base = estimate(model, batch=4)
    assert base.fits and base.total == pytest.approx(sum(base.sharded.values()) + sum(base.each.values()))
    assert sum(base.sharded.values()) == 20 * parameter_count(model)
    assert estimate(model, batch=4, checkpointing=False).total > estimate(model, batch=8).total > base.total
    assert estimate(model, "lora", batch=4).total > estimate(model, "qlora", batch=4).total
    assert estimate(model, device_bytes=1e8).devices is None
    plain, again = (train_flops(model, "full", 2048, c) for c in (False, True))
    assert again == pytest.approx(plain * 4 / 3) and train_flops(model, "lora", 2048, False) == pytest.approx(
        plain * 2 / 3
    )


def test_says_what_to_change() -> None:
    model = llama(4096, 32, 11_008, 32)
    found = estimate(model, batch=4, checkpointing=False)
    lines = remedies(model, found, batch=4, length=2048, checkpointing=False)
    assert "checkpointing" in lines[0] and "accumulate=4" in lines[1]
    assert any(line.startswith("lora") and line.endswith("which fits") for line in lines) and "sharded" in lines[-1]


def test_shows_the_first_batch_and_times_it(tmp_path: Path) -> None:
    found = preflight(recipe(tmp_path))
    assert found.fits and found.batch is not None and found.dry_run is not None
    assert found.dry_run["seconds"] > 0 and found.hours == pytest.approx(found.dry_run["seconds"] * 6 / 3600)
    screen = Console(file=StringIO(), width=120, force_terminal=True, color_system="standard")
    screen.print(found)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[32m" in text and "return" in text and "qlora" in text
    assert not found.uncounted and found.way is not None and "the step, counted" in text
    assert "GB of the whole process" in text and "not compiled" not in text
    data = json.loads(json.dumps(found.to_dict()))
    assert data["labels"] == int((found.batch["labels"] != -100).sum()) and data["tokens"] == 64
    assert not (tmp_path / "out").exists()


def test_a_batch_without_labels_is_refused(tmp_path: Path) -> None:
    data = recipe(tmp_path)
    fits = preflight(data)
    assert fits.to_dict()["labels"] > 0
    tokenizer = next((tmp_path / "cache/tokenizers").iterdir())
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": None, "eos_token": None}))
    (tmp_path / "text").write_text("<sep>".join("abcdefgh" * 8))  # documents of one token: nothing to predict
    with pytest.raises(DataError, match="no label for next_token"):
        preflight(data, [f"tokenizer={tokenizer}"])


def test_a_model_that_does_not_fit_is_never_built(tmp_path: Path) -> None:
    found = preflight(recipe(tmp_path), ["model.dim=16384", "model.depth=200"])
    assert not found.fits and found.dry_run is None and found.advice and found.hours > 0
    screen = Console(file=StringIO(), width=160)
    screen.print(found)
    assert "does not fit" in screen.file.getvalue()  # type: ignore[attr-defined]
