"""From a finished run of recipes/pydoc.yaml to the bundled checkpoint and its measured record.

python bench/bundle.py RUN [ASSETS [RESULTS]]   (assets/pydoc-llama and docs/results unless given)

Drops what only training needs (dropout), rounds to bf16, and scores the rounded model on the held-out modules
beside the rivals that know no context: uniform over the vocabulary, and the unigram of the training tokens.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from common import row, write

import dovetail as dt
from dovetail.surgery import transplant
from dovetail.training.loop import evaluate
from dovetail.training.recipe import Recipe
from dovetail.training.setup import set_up

IGNORED = -100


def unigram(train: np.ndarray, labels: np.ndarray, vocab: int) -> float:
    """Nats a token of add-one unigram counts of `train` on `labels`."""
    counts = np.bincount(train, minlength=vocab) + 1.0
    return float(-np.log(counts / counts.sum())[labels].mean())


def main(run: Path, assets: Path, results: Path) -> None:
    model = dt.load(run)
    spec = dt.override(model.spec, {"blocks.*.dropout": 0.0})
    model = transplant(model, spec).model.to(torch.bfloat16)
    dt.save(model, assets, format="hf", tokenizer_from=run)

    parts = set_up(Recipe.load(run / "recipe.yaml"))
    assert parts.held_out is not None
    rows = parts.rows(parts.held_out)
    labels = np.concatenate([rows[i].labels for i in range(len(rows))])
    labels = labels[labels != IGNORED]
    device = parts.device
    exact = evaluate(dt.load(assets, dtype="float32", device=device), parts.recipe.objective, rows, batch=32)
    assert exact["tokens"] == len(labels)
    vocab = model.spec.vocab
    rivals = {"uniform": math.log(vocab), "unigram": unigram(parts.train.tokens, labels, vocab)}
    done = json.loads((run / "result.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    made = {
        "parameters": done["parameters"],
        "train_tokens": len(parts.train),
        "tokens_seen": done["tokens"],
        "text_sha256": done["text_sha256"],
        "train_device": done["device"],
        "log": log,
    }
    case = f"held-out standard library, {exact['tokens']:,} tokens"
    cases = [
        row(case, "nats/token", round(exact["nats"], 4), round(nats, 4), peer, smaller=True, **(made if i == 0 else {}))
        for i, (peer, nats) in enumerate(rivals.items())
    ]
    write("pydoc", cases, "dovetail train recipes/pydoc.yaml && python bench/bundle.py runs/pydoc", results)


if __name__ == "__main__":
    paths = [Path(p) for p in sys.argv[1:]]
    defaults = [Path("runs/pydoc"), Path("assets/pydoc-llama"), Path("docs/results")]
    main(*[*paths, *defaults[len(paths) :]])
