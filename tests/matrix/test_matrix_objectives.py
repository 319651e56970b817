"""The shared matrix, part 5: objectives count before they run, add up over micro-batches, and go by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.spec import Entry, Spec, entry
from matrix.harness import VOCAB, all_entries, build, build_spec, close, example, gradients, name, subject, tokens

OBJECTIVES = [e for e in all_entries() if e.category == "objective"]
each = pytest.mark.parametrize("e", OBJECTIVES, ids=name)


def learner(e: Entry) -> Any:
    """A model that looks as far as the objective's answers allow."""
    if e.capabilities.get("targets"):
        return subject("model", "two_stream")
    if e.capabilities.get("labelled"):
        labels = {"classifier": "linear", "classes": VOCAB}  # of each token
        return build_spec(Spec.parse("model", subject("model", "encoder").spec.to_dict() | labels))
    return subject("model", "encoder" if e.capabilities.get("causal") is False else "decoder")


def ready(e: Entry) -> Any:
    """The objective, with another model in the place of each helper that it names."""
    objective: Any = Spec.parse(e.category, example(e))
    helper = build(entry("model", "decoder"), seed=1).requires_grad_(False)
    return objective.prepared(dict.fromkeys(objective.helpers(), helper))


def ragged() -> dict[str, Tensor]:
    """Three rows with 7, 4 and 1 labels; the rest is ignored."""
    labels = torch.randint(0, VOCAB, (3, 7))
    labels[1, 4:] = -100
    labels[2, 1:] = -100
    return {"tokens": tokens(3, 7), "labels": labels}


@each
def test_counts_are_known_before_the_model_runs(e: Entry) -> None:
    objective, batch = ready(e), ragged()
    loss = objective(learner(e), batch)
    assert objective.counts(batch) == {term: int(t.count) for term, t in loss.terms.items()}
    assert loss.scope == objective.scope


@each
def test_micro_batches_add_up(e: Entry) -> None:
    """8 rows at once == 8 rows one by one, forward and gradient, where the objective says that tokens add up."""
    objective, batch, model = ready(e), ragged(), learner(e)
    if objective.scope != "token":
        pytest.skip("a batch-scope loss must not be split")
    counts = objective.counts(batch)
    whole = objective(model, batch).total(counts)
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
    split = torch.stack([objective(model, row).total(counts) for row in rows]).sum()
    close(split[None], whole[None], 1e-12)
    a, b = gradients(model, split), gradients(model, whole)
    for key in a:
        close(a[key], b[key], 1e-12, key)


@each
def test_ignored_labels_give_nothing(e: Entry) -> None:
    objective, batch, model = ready(e), ragged(), learner(e)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    total = objective(model, batch).total()
    assert total == 0
    assert all(g.abs().max() == 0 for g in gradients(model, total).values())
