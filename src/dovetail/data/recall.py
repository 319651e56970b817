"""Multi-query associative recall: pairs of a key and a value, and then the keys once more, each asking for its value."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from dovetail.data.generated import Drawn, Generated, generator
from dovetail.data.rows import IGNORED
from dovetail.spec import register
from dovetail.spec.ranges import Count, Positive

BLANK = 0  # stands where nothing is said


@register(
    "corpus",
    "recall",
    oracle="formula: a label is what stood behind the same key before",
    source="Arora et al. 2023 (Zoology): MQAR; HazyResearch/zoology, multiquery_ar",
)
class Recall(Generated):
    """k₁ v₁ .. k_P v_P, and then each key once more with its value behind it, in some order, blanks between them.

    Labels are the values behind the keys that come again, and nothing else. pairs: P. vocab: ids, of which 0 is the
    blank, those below half of it are keys and the others values; the keys of a row are different, and so are its
    values. length: tokens of a row. power: a of the gaps' power law: a key comes again in the s-th place after the pairs
    with a probability of s^(a-1), 1 for all alike. split: rows to train on, or held-out ones, which are never the same
    draws. (The authors' sampler leaves blank where a repeated key's value stands here, which no earlier token sees.)
    """

    pairs: Count = 8
    vocab: Annotated[int, Field(ge=4)] = 256
    length: Annotated[int, Field(ge=4)] = 64
    power: Positive = 0.01
    split: Literal["train", "held_out"] = "train"

    @model_validator(mode="after")
    def _room(self) -> Recall:
        if self.length < 4 * self.pairs:
            raise ValueError(
                f"{self.pairs} pairs, told and asked, take {4 * self.pairs} tokens; length is {self.length}"
            )
        if self.pairs > self.vocab // 2 - 1:
            raise ValueError(
                f"{self.pairs} pairs need as many keys, and a vocab of {self.vocab} has {self.vocab // 2 - 1}"
            )
        return self

    @property
    def ids(self) -> int:
        return self.vocab

    @property
    def tokens(self) -> int:
        return self.length

    def draw(self, seed: int, epoch: int) -> Drawn:
        rng = generator(self.split, seed, epoch)
        half, told = self.vocab // 2, 2 * self.pairs
        keys = 1 + _chosen(rng, np.ones(half - 1), self.pairs, self.examples)
        values = half + _chosen(rng, np.ones(self.vocab - half), self.pairs, self.examples)
        steps = np.arange(1, (self.length - told) // 2 + 1, dtype=np.float64)
        places = told + 2 * _chosen(rng, steps ** (self.power - 1), self.pairs, self.examples)
        tokens = np.full((self.examples, self.length), BLANK, np.int64)
        labels = np.full((self.examples, self.length), IGNORED, np.int64)
        tokens[:, 0:told:2], tokens[:, 1:told:2] = keys, values
        np.put_along_axis(tokens, places, keys, 1)
        np.put_along_axis(tokens, places + 1, values, 1)
        np.put_along_axis(labels, places, values, 1)
        return tokens, labels


def _chosen(rng: np.random.Generator, weights: np.ndarray, count: int, rows: int) -> np.ndarray:
    """(rows, count) numbers below len(weights), each row drawn one after another by those weights and without putting
    back: exponential clocks of these rates, in the order in which they ring (Efraimidis and Spirakis 2006)."""
    rings = rng.standard_exponential((rows, len(weights))) / weights
    first = np.argpartition(rings, count - 1, axis=1)[:, :count]
    return np.take_along_axis(first, np.take_along_axis(rings, first, 1).argsort(1), 1)
