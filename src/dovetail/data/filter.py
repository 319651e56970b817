"""A quality filter for training text: which documents read like a reference, by their perplexity under an n-gram model.

Source: Wenzek et al. 2020, CCNet, section 4.2 (perplexity under a Kneser-Ney model of Wikipedia, cut at quantiles).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dovetail.errors import DataError, UserError
from dovetail.stats import NGram


@dataclass(frozen=True)
class Filtered:
    """perplexity: of each document, NaN for one without a token. keep: which are kept. bounds: the perplexities between
    which they lie, both included."""

    perplexity: tuple[float, ...]
    keep: tuple[bool, ...]
    bounds: tuple[float, float]


def filter_documents(documents: Sequence[str], model: NGram, *, low: float = 0.0, high: float = 0.5) -> Filtered:
    """Keeps the documents whose perplexity lies between the quantiles `low` and `high` of all of them.

    model: fitted on text of the wanted sort, with its `unit`; lines are its sentences. low: above 0 leaves out the most
    predictable too (lists, repetitions). Unknown tokens count, with the probability of <unk>; a document without a
    token is dropped. Raises UserError for quantiles out of order or a model without a unit, DataError where no document
    has a token.
    """
    if not 0 <= low < high <= 1:
        raise UserError(f"quantiles from {low} to {high}", remedy="give 0 <= low < high <= 1")
    if model.unit is None:
        raise UserError("the model does not say what its tokens are", remedy="fit it with a unit")
    found = np.array([model.perplexity(text) if text.strip() else np.nan for text in documents])
    known = found[~np.isnan(found)]
    if len(known) == 0:
        raise DataError("no document has a token")
    bounds = (float(np.quantile(known, low, method="lower")), float(np.quantile(known, high, method="lower")))
    keep = (found >= bounds[0]) & (found <= bounds[1])
    return Filtered(tuple(found.tolist()), tuple(keep.tolist()), bounds)
