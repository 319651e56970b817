"""A tiny checkpoint with a tokenizer of its own, and texts that it can be scored on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dovetail as dt
from dovetail.data import train_tokenizer

CONTEXT = 32
WORDS = [
    "the",
    "dovetail",
    "joint",
    "holds",
    "two",
    "pieces",
    "of",
    "wood",
    "together",
    "exactly",
    "without",
    "any",
    "glue",
    "or",
    "nail",
    "at",
    "all",
]


def words(start: int, count: int) -> str:
    """A text that repeats itself only after a long while."""
    return " ".join(WORDS[(start + i * i + i // 7) % len(WORDS)] for i in range(count)) + "."


@pytest.fixture(scope="session")
def texts() -> dict[str, str]:
    return {"train": words(0, 4000), "held_out": words(5, 1200)}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str]) -> Path:
    """A directory with a two-layer model of 4 heads, context 32, and a tokenizer with a BOS."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer([texts["train"]], 280, folder)
    spec: dict[str, Any] = {
        "kind": "decoder", "vocab": tokenizer.vocab_size, "dim": 32, "depth": 2, "context": CONTEXT,
        "blocks": {"mixer": {"kind": "attention", "heads": 4}, "feedforward": {"kind": "glu", "hidden": 48}},
    }  # fmt: skip
    return dt.save(dt.build(spec), folder, tokenizer_from=folder)


@pytest.fixture()
def model(checkpoint: Path) -> Any:
    return dt.load(checkpoint)


@pytest.fixture()
def tokenizer(checkpoint: Path) -> Any:
    return dt.load_tokenizer(checkpoint)
