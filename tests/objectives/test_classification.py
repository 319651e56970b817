"""Classification: its sums are torch's, rows and tokens alike, and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import dovetail as dt
from dovetail.data.rows import IGNORED
from dovetail.errors import DataError, SpecError
from dovetail.objectives.classification import Classification
from dovetail.objectives.next_token import NextToken
from oracles import oracle_for

ENCODER = {"kind": "encoder", "vocab": 11, "dim": 16, "depth": 1, "classifier": "linear", "classes": 5}


def model(**more: Any) -> Any:
    return dt.build(ENCODER | more, dtype=torch.float64)


@oracle_for("objective", "classification")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("pooling", [None, "mean"])
def test_it_is_cross_entropy(pooling: str | None, smoothing: float) -> None:
    judge = model(pooling=pooling)
    labels = torch.randint(0, 5, (4, 6) if pooling is None else (4,))
    labels[0] = IGNORED
    batch = {"tokens": torch.randint(0, 11, (4, 6)), "labels": labels}
    loss = Classification(smoothing=smoothing)(judge, batch)
    logits, targets = judge(batch["tokens"]).class_logits.flatten(0, -2), labels.flatten()
    count = int((targets != IGNORED).sum())
    theirs = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
    term = loss.terms["classification"]
    torch.testing.assert_close(term.sum, theirs)
    assert int(term.count) == count == Classification().counts(batch)["classification"]
    for one, other in zip(*(torch.autograd.grad(t, judge.classifier.parameters()) for t in (term.sum, theirs))):
        torch.testing.assert_close(one, other)
    nats, hits = loss.metrics["nats"][0], loss.metrics["correct"][0]
    torch.testing.assert_close(nats, F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").detach())
    assert float(hits) == float((logits.argmax(-1) == targets).sum()) and not nats.requires_grad


def test_refusals() -> None:
    tokens = torch.randint(0, 11, (2, 6))
    bare = dt.build({name: ENCODER[name] for name in ("kind", "vocab", "dim", "depth")})
    with pytest.raises(SpecError, match="no classifier"):
        Classification()(bare, {"tokens": tokens, "labels": torch.zeros(2, dtype=torch.long)})
    with pytest.raises(DataError, match="do not stand beside"):
        Classification()(model(), {"tokens": tokens, "labels": torch.zeros(2, dtype=torch.long)})
    judge = dt.build({"kind": "sequence_classifier", "features": 2, "dim": 16, "classes": 3})
    with pytest.raises(SpecError, match="next_token"):
        NextToken()(judge, {"tokens": tokens, "labels": tokens})
