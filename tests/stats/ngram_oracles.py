"""Slow independent n-gram models: one dictionary a formula, loops over words, float64."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

Gram = tuple[str, ...]


class Slow:
    """Counts of padded sentences, as the papers define them. `p(w, h)` by the recursion of a subclass."""

    def __init__(self, sentences: Sequence[Sequence[str]], order: int):
        self.order = order
        self.words = {"<unk>", "</s>"} | {w for s in sentences for w in s}
        self.counts: Counter[Gram] = Counter()
        left: dict[Gram, set[str]] = defaultdict(set)
        for sentence in sentences:
            padded = ["<s>", *sentence, "</s>"]
            for end in range(1, len(padded)):
                for n in range(1, order + 1):
                    start = end - n + 1
                    if start < 0:
                        break
                    gram = tuple(padded[start : end + 1])
                    self.counts[gram] += 1
                    if start > 0:
                        left[gram].add(padded[start - 1])
        self.adjusted: dict[Gram, int] = {}
        for gram, count in self.counts.items():
            whole = len(gram) == order or gram[0] == "<s>"
            self.adjusted[gram] = count if whole else len(left[gram])

    def followers(self, table: dict[Gram, int] | Counter[Gram]) -> dict[Gram, dict[str, int]]:
        """context -> {word: count}."""
        out: dict[Gram, dict[str, int]] = defaultdict(dict)
        for gram, count in table.items():
            out[gram[:-1]][gram[-1]] = count
        return out


class SlowKneserNey(Slow):
    """Chen and Goodman 1998, section 3 (equations 26 and 27), interpolated, uniform below the unigrams."""

    def __init__(self, sentences: Sequence[Sequence[str]], order: int, fallback: bool = False):
        super().__init__(sentences, order)
        self.after = self.followers(self.adjusted)
        self.mass: dict[Gram, tuple[int, float]] = {}  # of each context asked: Σ of its counts, weight of the shorter
        self.discount: dict[int, list[float]] = {}
        for n in range(1, order + 1):
            of_count = Counter(c for gram, c in self.adjusted.items() if len(gram) == n)
            if fallback:
                self.discount[n] = [0, 0.5, 1, 1.5]
                continue
            y = of_count[1] / (of_count[1] + 2 * of_count[2])
            self.discount[n] = [0] + [r - (r + 1) * y * of_count[r + 1] / of_count[r] for r in (1, 2, 3)]

    def p(self, word: str, context: Gram) -> float:
        """p(word | context), the context at most order - 1 words."""
        seen = self.after.get(context)
        lower = 1 / len(self.words) if not context else None
        if seen is None:
            return self.p(word, context[1:])
        d = self.discount[len(context) + 1]
        if context not in self.mass:
            total = sum(seen.values())
            self.mass[context] = total, sum(d[min(c, 3)] for c in seen.values()) / total
        total, gamma = self.mass[context]
        if lower is None:
            lower = self.p(word, context[1:])
        count = seen.get(word, 0)
        return (count - d[min(count, 3)]) / total + gamma * lower


class SlowKatz(Slow):
    """Katz 1987 with Good-Turing discounts for counts up to `limit`, the largest that works up to 5."""

    def __init__(self, sentences: Sequence[Sequence[str]], order: int):
        super().__init__(sentences, order)
        self.after = self.followers(self.counts)
        self.kept = {n: self._kept(n) for n in range(1, order + 1)}

    def _kept(self, n: int) -> dict[int, float]:
        of = Counter(c for gram, c in self.counts.items() if len(gram) == n)
        for k in range(5, 0, -1):
            if any(of[r] == 0 for r in range(1, k + 2)):
                continue
            a = (k + 1) * of[k + 1] / of[1]
            if a >= 1:
                continue
            found = {r: ((r + 1) * of[r + 1] / of[r] / r - a) / (1 - a) for r in range(1, k + 1)}
            if all(0 < v <= 1 for v in found.values()):
                return found
        return {}

    def p(self, word: str, context: Gram) -> float:
        seen = self.after.get(context)
        if seen is None:
            return self.p(word, context[1:])
        kept = self.kept[len(context) + 1]
        total = sum(seen.values())
        used = {w: c * kept.get(c, 1.0) for w, c in seen.items()}
        if total - sum(used.values()) < 1e-9:
            total += 1
        if word in used:
            return used[word] / total
        lower = (lambda w: self.p(w, context[1:])) if context else (lambda w: 1 / len(self.words))
        return (1 - sum(used.values()) / total) * lower(word) / (1 - sum(lower(w) for w in seen))


class SlowWittenBell(Slow):
    """(c(hw) + T(h) p(w | h')) / (c(h) + T(h))."""

    def __init__(self, sentences: Sequence[Sequence[str]], order: int):
        super().__init__(sentences, order)
        self.after = self.followers(self.counts)

    def p(self, word: str, context: Gram) -> float:
        seen = self.after.get(context)
        if seen is None:
            return self.p(word, context[1:])
        lower = self.p(word, context[1:]) if context else 1 / len(self.words)
        return (seen.get(word, 0) + len(seen) * lower) / (sum(seen.values()) + len(seen))
