"""The picture of algorithms/words.md."""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.figure import Figure

from dovetail.data.pydoc import Pydoc
from dovetail.report.plots import COLOURS
from dovetail.stats import WordVectors, sentences_of

GROUPS = {
    "numbers": ["two", "three", "four", "five", "six", "seven", "eight"],
    "errors": ["valueerror", "typeerror", "keyerror", "indexerror", "attributeerror", "runtimeerror"],
    "days": ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"],
    "files": ["file", "directory", "filename", "path", "folder", "pathname"],
    "threads": ["thread", "threads", "lock", "locks", "semaphore", "executor"],
}


def map_of_words() -> Figure:
    """Words of five kinds on the two main axes of their vectors: each kind lies together."""
    sentences = (words for text in Pydoc(limit=5_000_000).documents() for words in sentences_of(text))
    vectors = WordVectors.fit(sentences, "pmi", dim=64, window=5, min_count=5)
    known = {kind: [word for word in words if word in vectors] for kind, words in GROUPS.items()}
    words = [word for group in known.values() for word in group]
    rows = torch.stack([vectors.unit[vectors.id(word)] for word in words])
    rows -= rows.mean(0)
    across, up = (rows @ torch.linalg.svd(rows, full_matrices=False).Vh[:2].mT).mT
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.subplots()
    at = 0
    for colour, (kind, group) in zip(COLOURS, known.items(), strict=False):
        part = slice(at, at + len(group))
        axes.plot(across[part], up[part], "o", ms=4, color=colour, label=kind)
        for x, y, word in zip(across[part].tolist(), up[part].tolist(), group, strict=True):
            axes.annotate(word, (x, y), xytext=(4, 2), textcoords="offset points", color=colour, fontsize=8)
        at += len(group)
    axes.set(xlabel="first axis", ylabel="second axis")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(known), frameon=False)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {"map": map_of_words}
