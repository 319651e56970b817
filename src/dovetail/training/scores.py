"""Held-out scores of a model."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch

from dovetail.data.rows import Rows, collate
from dovetail.errors import DataError
from dovetail.objectives import Objective
from dovetail.stats import RunningMean
from dovetail.training.device import autocast


@torch.no_grad()
def evaluate(
    model: Any, objective: Objective, rows: Rows, *, batch: int, limit: int = 0, precision: str = "none"
) -> dict[str, float]:
    """{nats, perplexity, accuracy, tokens} and the objective's other metrics over all rows (or the first `limit`
    batches); the mode is put back. Raises DataError where no row has a label."""
    device = next(model.parameters()).device
    metrics: dict[str, RunningMean] = defaultdict(RunningMean)
    was = model.training
    model.eval()
    try:
        starts = list(range(0, len(rows), batch))
        for start in starts[: limit or None]:
            made = collate([rows[i] for i in range(start, min(start + batch, len(rows)))])
            with autocast(precision, device):
                loss = objective(model, {name: x.to(device) for name, x in made.items()})
            for name, (value, count) in loss.metrics.items():
                metrics[name].update_sum(value.double(), count)
    finally:
        model.train(was)
    tokens = int(metrics["nats"].weight)
    if not tokens:
        raise DataError(
            "the held-out rows have no label to score",
            where="data.held_out",
            remedy="documents of one token have nothing to predict; check the corpus and its field or separator",
        )
    means = {name: float(metric.mean) for name, metric in metrics.items()}
    nats, correct = means.pop("nats"), means.pop("correct")
    perplexity = math.exp(nats) if nats < 700 else math.inf
    return {"nats": nats, "perplexity": perplexity, "accuracy": correct, "tokens": tokens} | means
