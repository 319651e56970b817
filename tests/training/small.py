"""A recipe that trains in a blink, and its pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXT, HELD_OUT = (
    "".join(f"def f{i}(x):\n    return x * {i} + {i * i}\n<sep>" for i in numbers)
    for numbers in (range(300), range(300, 400))
)


def recipe(folder: Path, **train: Any) -> dict[str, Any]:
    """A tiny dropout model on a generated text; everything it writes lies under `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text").write_text(TEXT)
    (folder / "held_out").write_text(HELD_OUT)
    corpus, held_out = ({"kind": "text", "path": str(folder / n), "separator": "<sep>"} for n in ("text", "held_out"))
    options = {"steps": 6, "batch": 2, "length": 32, "lr": 1e-2, "log_every": 1, "autocast": "none", "device": "cpu"}
    return {
        "model": {"kind": "decoder", "dim": 16, "depth": 2, "blocks": {"dropout": 0.1}},
        "tokenizer": {"train": 300},
        "data": {"train": corpus, "held_out": held_out, "cache": str(folder / "cache")},
        "train": options | {"eval_batches": 2} | train,
        "out": str(folder / "out"),
    }
