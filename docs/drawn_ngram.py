"""The pictures of algorithms/ngram.md. The text is the design of this project, split at white space."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dovetail.report.plots import COLOURS
from dovetail.stats import NGram
from dovetail.stats.ngram import NAMES, tokenise

TEXT = Path(__file__).resolve().parent / "design.md"
PLAIN = [name for name in NAMES if name not in ("stupid-backoff", "mle")]


def _halves() -> tuple[str, str]:
    """Every sixth line is held out."""
    lines = TEXT.read_text(encoding="utf-8").lower().splitlines()
    held = "\n".join(line for i, line in enumerate(lines) if i % 6 == 0)
    return "\n".join(line for i, line in enumerate(lines) if i % 6), held


def orders() -> Figure:
    """Perplexity of held-out characters against the order of the model, by smoothing."""
    known, held = _halves()
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    axes = figure.subplots()
    at = range(1, 8)
    for i, name in enumerate(PLAIN):
        values = [NGram.fit(known, n, name, unit="character").perplexity(held) for n in at]
        axes.plot(at, values, "o-", ms=3, lw=1, color=COLOURS[i % len(COLOURS)], label=name)
    axes.set(xlabel="order n", ylabel="perplexity a character", yscale="log")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def counts() -> Figure:
    """How often n-grams stand in a text, as counted and as Kneser-Ney counts them: by different words before."""
    known, _ = _halves()
    model = NGram.fit(known, 2, "witten-bell", unit="word")
    words = model.vocabulary
    raw = np.zeros(len(words))
    for sentence in tokenise(known, "word"):
        np.add.at(raw, words.encode(sentence), 1)
    bigrams = model.trie.columns(2)
    adjusted = np.bincount(bigrams[1], minlength=len(words))
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    axes = figure.subplots()
    seen = raw > 0
    axes.loglog(raw[seen], adjusted[seen], "o", ms=3, color=COLOURS[0], alpha=0.5)
    top = float(raw.max())
    axes.loglog([1, top], [1, top], lw=0.8, color=COLOURS[7])
    gap = np.where(seen, raw / np.maximum(adjusted, 1), 0)
    for i in np.argsort(-gap)[:6]:
        axes.annotate(words.names[i], (raw[i], adjusted[i]), fontsize=8, xytext=(4, -8), textcoords="offset points")
    axes.set(xlabel="times in the text", ylabel="different words before")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {"orders": orders, "counts": counts}
