"""Estimates of p(token | context) from counts: how much seen n-grams give up, and how it goes to unseen ones.

All but add-k and stupid back-off become one form, that of ARPA files: a probability for each n-gram and a weight b for
each context, with p(w | h) = the n-gram's where it was seen, else b(h) p(w | h without its first word).
Names: c(hw) count, c(h) = Σ_w c(hw), T(h) distinct w after h, n_r how many n-grams of that order have count r,
V the vocabulary with <unk> and </s>, without <s>.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dovetail.errors import UserError, did_you_mean
from dovetail.stats.ngram.counts import Counts
from dovetail.stats.ngram.trie import Ints, Trie, of_columns
from dovetail.stats.ngram.vocabulary import BOS

Floats = NDArray[np.float64]


@dataclass
class Estimate:
    """What was estimated. p[n - 1]: (M,) of each n-gram; back[n - 1]: (M,) weight of each n-gram as a context.

    p of <s> is 0: nothing predicts it. notes: what was done where a formula has no value.
    """

    trie: Trie
    p: list[Floats]
    back: list[Floats]
    notes: list[str] = field(default_factory=list)


@dataclass
class Order:
    """The n-grams of one order. counts, adjusted: (M,). context: (M,) row of the first n - 1 ids, of `contexts`.

    lower: (M,) probability of the same token after one word less; 1 / vocabulary for n = 1. vocabulary: V.
    """

    n: int
    counts: Ints
    adjusted: Ints
    context: Ints
    contexts: int
    lower: Floats
    vocabulary: int

    def sums(self, values: NDArray) -> Floats:
        """Σ of values (M,) over the n-grams of each context (contexts,)."""
        return np.bincount(self.context, weights=values, minlength=self.contexts).astype(np.float64)


class Smoothing(ABC):
    """Base of the estimates. form: how `back` is used; see `NGram.score`."""

    form: Literal["back-off", "add-k", "stupid"] = "back-off"

    @abstractmethod
    def weigh(self, order: Order, notes: list[str]) -> tuple[Floats, Floats]:
        """(p (M,) of each n-gram, weight (contexts,) that each context gives to shorter ones)."""


@dataclass(frozen=True)
class MaximumLikelihood(Smoothing):
    """p = c(hw) / c(h): nothing for what was not seen after h. A context that was never seen is shortened."""

    def weigh(self, order: Order, notes: list[str]) -> tuple[Floats, Floats]:
        return order.counts / order.sums(order.counts)[order.context], np.zeros(order.contexts)


@dataclass(frozen=True)
class AddK(Smoothing):
    """p = (c(hw) + k) / (c(h) + k V), of the longest context alone (Lidstone 1920). k: above 0; 1 is Laplace's."""

    k: float = 1.0
    form = "add-k"

    def __post_init__(self) -> None:
        if not self.k > 0:
            raise UserError(f"add-k with k = {self.k}", remedy="give k above 0, or take maximum likelihood")

    def weigh(self, order: Order, notes: list[str]) -> tuple[Floats, Floats]:
        total = order.sums(order.counts) + self.k * order.vocabulary
        return (order.counts + self.k) / total[order.context], self.k * order.vocabulary / total


@dataclass(frozen=True)
class StupidBackoff(Smoothing):
    """S = c(hw) / c(h) where seen, else alpha S(w | shorter h): scores, no probabilities (Brants et al. 2007)."""

    alpha: float = 0.4
    form = "stupid"

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise UserError(f"stupid back-off with alpha = {self.alpha}", remedy="give 0 < alpha <= 1")

    def weigh(self, order: Order, notes: list[str]) -> tuple[Floats, Floats]:
        below = self.alpha if order.n > 1 else 0.0
        return order.counts / order.sums(order.counts)[order.context], np.full(order.contexts, below)


@dataclass(frozen=True)
class WittenBell(Smoothing):
    """p = (c(hw) + T(h) p(w | shorter h)) / (c(h) + T(h)); the unigrams' shorter one is 1 / V (Witten and Bell 1991,
    method C; interpolated as Chen and Goodman 1998, section 2.6)."""

    def weigh(self, order: Order, notes: list[str]) -> tuple[Floats, Floats]:
        types = order.sums(np.ones(len(order.counts)))
        total = order.sums(order.counts) + types
        back = np.divide(types, total, out=np.ones(order.contexts), where=total > 0)
        return order.counts / total[order.context] + back[order.context] * order.lower, back


@dataclass(frozen=True)
class GoodTuring(Smoothing):
    """Counts r up to `limit` become r* = (r + 1) n_{r+1} / n_r; what they give up goes to unseen tokens in proportion
    to p(w | shorter h) (Good 1953; Katz 1987, whose discounts keep the counts above the limit as they are).

    Where n_r makes no discount between 0 and 1, the limit of that order is lowered. A context whose every count is
    kept has its c(h) raised by 1, as SRILM does, so that unseen tokens after it have some probability.
    """

    limit: int = 5

    def weigh(self, order: Order, notes: list[str]) -> tuple[Floats, Floats]:
        kept, limit = self._kept(order.counts)
        if limit < self.limit:
            notes.append(f"order {order.n}: Good-Turing discounts for counts up to {limit} only, not {self.limit}")
        used = order.counts * kept[np.minimum(order.counts, limit + 1)]
        total, spent = order.sums(order.counts), order.sums(used)
        whole = (total > 0) & (total - spent < 1e-9)
        p = used / (total + whole)[order.context]
        left = np.where(total > 0, 1 - order.sums(p), 1.0)
        free = np.where(total > 0, 1 - order.sums(order.lower), 1.0)  # what shorter contexts give to the unseen
        everything = free < 1e-12  # all of the vocabulary was seen after this context: nothing is left to give to
        if everything.any():
            p = p / np.where(everything, order.sums(p), 1.0)[order.context]
            left = np.where(everything, 0.0, left)
        return p, np.divide(left, free, out=np.zeros_like(left), where=~everything)

    def _kept(self, counts: Ints) -> tuple[Floats, int]:
        """The share of its count that an n-gram keeps, by count 0 .. limit + 1, and the limit that works."""
        n = np.bincount(np.minimum(counts, self.limit + 2), minlength=self.limit + 3).astype(float)
        for limit in range(self.limit, 0, -1):
            r = np.arange(1, limit + 1)
            if not n[1 : limit + 2].all():
                continue
            beyond = (limit + 1) * n[limit + 1] / n[1]
            kept = ((r + 1) * n[r + 1] / (r * n[r]) - beyond) / (1 - beyond) if beyond < 1 else np.full(limit, np.nan)
            if ((kept > 0) & (kept <= 1)).all():
                return np.concatenate([[1.0], kept, [1.0]]), limit
        return np.ones(2), 0


@dataclass(frozen=True)
class KneserNey(Smoothing):
    """p = (a(hw) - D(a)) / a(h) + b(h) p(w | shorter h), b(h) = Σ_w D(a(hw)) / a(h), with a the adjusted counts; the
    unigrams' shorter one is 1 / V (Kneser and Ney 1995; modified and interpolated: Chen and Goodman 1998, section 3).

    modified: D1, D2, D3+ = r - (r + 1) Y n_{r+1} / n_r with Y = n1 / (n1 + 2 n2), else Y for all counts; n_r of each
    order's adjusted counts, as KenLM's lmplz (Heafield et al. 2013). discount: one fixed number for all orders instead.
    Where n_r gives no discount in 0 .. r (few characters, tiny texts), an order takes 0.5, 1, 1.5 (or 0.5), lmplz's
    --discount_fallback, and says so in `notes`.
    """

    modified: bool = True
    discount: float | None = None

    def __post_init__(self) -> None:
        if self.discount is not None and (self.modified or not 0 < self.discount < 1):
            raise UserError(
                f"Kneser-Ney with a discount of {self.discount}",
                remedy="give KneserNey(modified=False, discount=...) something between 0 and 1",
            )

    def weigh(self, order: Order, notes: list[str]) -> tuple[Floats, Floats]:
        each = np.array(self.discounts(order.adjusted, order.n, notes))
        taken = each[np.minimum(order.adjusted, 3)]
        total = order.sums(order.adjusted)
        back = np.divide(order.sums(taken), total, out=np.ones(order.contexts), where=total > 0)
        return (order.adjusted - taken) / total[order.context] + back[order.context] * order.lower, back

    def discounts(self, adjusted: Ints, n: int, notes: list[str]) -> tuple[float, float, float, float]:
        """(0, D1, D2, D3+) from the adjusted counts (M,) of order n."""
        if self.discount is not None:
            return (0.0, self.discount, self.discount, self.discount)
        n1, n2, n3, n4 = (int((adjusted == r).sum()) for r in (1, 2, 3, 4))
        if not self.modified and n1 and n2:
            y = n1 / (n1 + 2 * n2)
            return (0.0, y, y, y)
        if self.modified and n1 and n2 and n3:
            y = n1 / (n1 + 2 * n2)
            found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
            if all(0 <= d <= r for r, d in enumerate(found, 1)):
                return (0.0, *found)
        notes.append(f"order {n}: counts of counts {n1}, {n2}, {n3}, {n4} give no discounts; fixed ones were taken")
        return (0.0, 0.5, 1.0, 1.5) if self.modified else (0.0, 0.5, 0.5, 0.5)


NAMES: dict[str, Smoothing] = {
    "mle": MaximumLikelihood(),
    "add-k": AddK(),
    "good-turing": GoodTuring(),
    "witten-bell": WittenBell(),
    "kneser-ney": KneserNey(modified=False),
    "modified-kneser-ney": KneserNey(),
    "stupid-backoff": StupidBackoff(),
}


def smoothing_of(given: str | Smoothing) -> Smoothing:
    """One of `NAMES`, or the object itself. Raises UserError for an unknown name."""
    if isinstance(given, Smoothing):
        return given
    if given not in NAMES:
        raise UserError(f"no smoothing {given!r}", where="smoothing", remedy=did_you_mean(given, NAMES))
    return NAMES[given]


def estimate(counts: Counts, smoothing: Smoothing) -> Estimate:
    """Probabilities of all n-grams counted. Holds them in memory: about 60 bytes an n-gram while it runs."""
    orders = [counts.columns(n) for n in range(1, counts.order + 1)]
    vocab = counts.vocab
    trie = of_columns(vocab, [ids for ids, _, _ in orders[1:]])
    uniform = 1 / (vocab - 1)
    result = Estimate(trie, [], [])
    for n, (ids, raw, adjusted) in enumerate(orders, 1):
        if n == 1:
            context, contexts, lower = np.zeros(len(raw), np.int64), 1, np.full(len(raw), uniform)
        else:
            context, contexts = trie.parents(n), trie.size(n - 1)
            lower = result.p[-1][trie.suffixes(n)]
        p, back = smoothing.weigh(Order(n, raw, adjusted, context, contexts, lower, vocab - 1), result.notes)
        if n == 1:
            unigrams = np.full(vocab, back[0] * uniform)  # what was never seen: <unk>
            unigrams[ids[0]] = p
            unigrams[BOS] = 0
            result.p.append(unigrams)
        else:
            result.p.append(p)
            seen = np.zeros(contexts, dtype=bool)
            seen[context] = True
            result.back.append(np.where(seen, back, 1.0))  # a context that nothing followed only passes on
    result.back.append(np.ones(trie.size(counts.order)))
    return result
