"""Classification: which of a few classes a row, or each of its tokens, belongs to."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from dovetail.errors import DataError, SpecError
from dovetail.objectives.base import IGNORED, Batch, Loss, Objective, Term
from dovetail.spec import register
from dovetail.spec.ranges import Chance


@register(
    "objective",
    "classification",
    oracle="torch.nn.functional.cross_entropy",
    source="Bishop 2006, eq. 4.108; smoothing: Szegedy et al. 2016, section 7",
    labelled=True,
)
class Classification(Objective):
    """−log p(class), summed over the labels that are not -100.

    batch["labels"] stands beside the model's class logits: (B,) where it pools its rows, (B,T) where it judges every
    token. smoothing: share of the target spread evenly over the classes.
    Metrics: "nats" (cross-entropy without smoothing) and "correct" (top-1 hits).
    """

    smoothing: Chance = 0.0

    def counts(self, batch: Batch) -> dict[str, int]:
        return {self.kind: int((batch["labels"] != IGNORED).sum())}

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """Raises SpecError for a model without a classifier, DataError when labels do not stand beside its logits."""
        labels = batch["labels"]
        out = model(**{name: value for name, value in batch.items() if name != "labels"}, logits=False)
        if out.aux:
            raise DataError(f"the model returns {', '.join(out.aux)}, for which {self.kind} has no term")
        if out.class_logits is None:
            raise no_classes(model.spec.kind)
        if out.class_logits.shape[:-1] != labels.shape:
            raise DataError(
                f"labels {tuple(labels.shape)} do not stand beside class logits {tuple(out.class_logits.shape)}",
                remedy="give one label a row to a model with a pooling, one a token to a model without",
            )
        wide = torch.promote_types(out.class_logits.dtype, torch.float32)
        logits, targets = out.class_logits.flatten(0, -2).to(wide), labels.flatten()
        log_p = torch.log_softmax(logits, -1)
        nats = F.nll_loss(log_p, targets, ignore_index=IGNORED, reduction="sum")
        total = nats
        if self.smoothing:
            spread = -log_p.mean(-1).masked_fill(targets == IGNORED, 0.0).sum()
            total = (1 - self.smoothing) * nats + self.smoothing * spread
        count = (targets != IGNORED).sum()
        correct = (logits.argmax(-1) == targets).sum().to(wide)
        metrics = {"nats": (nats.detach(), count), "correct": (correct, count)}
        return Loss({self.kind: Term(total, count)}, metrics=metrics)


def no_classes(kind: str) -> SpecError:
    """The error for a model that gives no class logits."""
    return SpecError(
        f"classification needs class logits, and this {kind} has no classifier",
        where="objective",
        remedy="give an encoder classifier and classes, or train a sequence_classifier",
    )
