"""Sums and counts: what an objective returns, so that micro-batches and ranks add up exactly.

A mean over a micro-batch is not a share of the mean over the batch when rows are ragged. So every term
is a sum and a count, counts are known from the labels before anything runs, and the loop divides once:
loss = Σ_terms weight · Σ_micro sum / Σ_micro count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from dovetail.errors import SpecError
from dovetail.models.build import is_causal
from dovetail.spec import Spec, entry, entry_of

IGNORED = -100  # a label that nobody is asked to predict
Batch = Mapping[str, Tensor]  # "tokens" (B,T), "labels" (B,T), and whatever else the model's forward takes by name


class Term(NamedTuple):
    """sum: a differentiable scalar. count: how many items it sums over, on its device. weight: factor in the loss."""

    sum: Tensor
    count: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class Loss:
    """terms: name -> (sum, count, weight). metrics: name -> (sum, count), detached, for the log.

    scope: a "token" sum may be split over micro-batches; a "batch" loss (contrastive) depends on the whole batch
    at once and must not be accumulated this way.
    """

    terms: dict[str, Term]
    scope: Literal["token", "batch"] = "token"
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def total(self, counts: Mapping[str, int] | Mapping[str, Tensor] | None = None) -> Tensor:
        """Σ weight · sum / count, with this batch's own counts or the global ones given. A count of 0 gives 0."""
        shares = []
        for name, term in self.terms.items():
            count = term.count if counts is None else counts[name]
            shares.append(term.weight * term.sum / (count.clamp_min(1) if isinstance(count, Tensor) else max(1, count)))
        return torch.stack(shares).sum() if len(shares) > 1 else shares[0]


class Objective(Spec):
    """Base of the objectives: a spec that is called with a model and a batch. `scope` as in Loss."""

    scope: ClassVar[Literal["token", "batch"]] = "token"

    @property
    def asked(self) -> float:
        """Share of the tokens whose hidden states reach the head."""
        return 1.0

    def helpers(self) -> dict[str, str]:
        """Models that it reads beside the one that learns: role -> directory. None unless an objective says so."""
        return {}

    def prepared(self, helpers: Mapping[str, Any]) -> Objective:
        """This objective with its helpers in hand, by role: frozen models in eval mode, on the learner's device."""
        return self

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many items each term will sum over, from the labels alone."""
        raise TypeError(f"{self.kind} does not say what it counts")

    def __call__(self, model: Any, batch: Batch) -> Loss:
        raise TypeError(f"{self.kind} does not say what it minimises")


def check_direction(kind: str, model: Any) -> None:
    """Raises SpecError where an objective asks for what the model sees anyway, or for what it is not made to see."""
    able = entry("objective", kind).capabilities
    if able.get("targets") and not entry_of(model.spec).capabilities.get("targets"):
        raise SpecError(
            f"{kind} asks for tokens in an order of its own, and a model {model.spec.kind!r} takes no ranks and targets",
            where="objective",
            remedy="give a model of two streams: {kind: two_stream}, or train it with masked_lm or next_token",
        )
    wanted = able.get("causal")
    if wanted is None or wanted == is_causal(model):
        return
    name = model.spec.kind
    raise SpecError(
        f"{kind} asks a model that looks ahead ({name}) for the token that it sees already"
        if wanted
        else f"{kind} asks for tokens in the middle of a text, and a model that writes ({name}) sees only what is before",
        where="objective",
        remedy="train it with masked_lm, or give a decoder"
        if wanted
        else "train it with next_token, or give an encoder",
    )
