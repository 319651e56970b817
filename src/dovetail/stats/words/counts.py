"""Counting instead of predicting: co-occurrences, their pointwise mutual information, and its truncated SVD.

The count-based twin of skip-gram: negative sampling with k words factorises PMI - log k implicitly (Levy and
Goldberg 2014), this does so explicitly.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dovetail.errors import UserError
from dovetail.stats.words.vocabulary import Corpus

_STRETCH = 4_194_304  # tokens whose pairs are held at once


@dataclass(frozen=True)
class Counts:
    """Co-occurrences, both directions. row, column: (E,) int64 ids in row-major order; value: (E,) float64, > 0."""

    row: Tensor
    column: Tensor
    value: Tensor
    size: int

    def total(self) -> Tensor:
        """(V,) float64: sums of rows, which are those of columns too."""
        return torch.zeros(self.size, dtype=torch.float64).index_add_(0, self.row, self.value)


def cooccurrences(corpus: Corpus, window: int, decay: Literal["none", "linear", "harmonic"] = "harmonic") -> Counts:
    """How often two words stand within `window` words of each other in a sentence, by distance.

    A pair at distance s counts 1 ("none"), (window - s + 1) / window ("linear": the mean of word2vec's drawn
    windows) or 1 / s ("harmonic": GloVe). Raises UserError for a window below 1 or an unknown decay.
    """
    if window < 1 or decay not in ("none", "linear", "harmonic"):
        raise UserError("window starts at 1, decay is none, linear or harmonic", where=f"window {window}, {decay!r}")
    size = len(corpus.vocabulary)
    keys, values = np.zeros(0, np.int64), np.zeros(0)
    for key, weight in _pairs(corpus, window, decay, size):
        keys, values = _merge(np.concatenate([keys, key]), np.concatenate([values, weight]))
    row, column = np.divmod(keys, size)
    return Counts(torch.from_numpy(row), torch.from_numpy(column), torch.from_numpy(values), size)


def _pairs(corpus: Corpus, window: int, decay: str, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Distinct keys (first id times V + second id) of every stretch at every distance, with their weights."""
    ids, sentence = corpus.ids.numpy(), corpus.sentence.numpy()
    for distance in range(1, window + 1):
        weight = {"none": 1.0, "linear": (window - distance + 1) / window, "harmonic": 1.0 / distance}[decay]
        for at in range(0, max(len(ids) - distance, 0), _STRETCH):
            stop = min(at + _STRETCH, len(ids) - distance)
            together = sentence[at:stop] == sentence[at + distance : stop + distance]
            a, b = ids[at:stop][together], ids[at + distance : stop + distance][together]
            keys, counts = np.unique(np.concatenate([a * size + b, b * size + a]), return_counts=True)
            yield keys, counts * weight


def _merge(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    unique, inverse = np.unique(keys, return_inverse=True)
    return unique, np.bincount(inverse, weights=values, minlength=len(unique))


@dataclass(frozen=True)
class Pmi:
    """Options of the count-based vectors (Levy, Goldberg and Dagan 2015).

    max(0, log(p(w, c) / (p(w) p_a(c))) - log shift), p_a the contexts' distribution to the power `smoothing`;
    its rank-d SVD U S Vᵀ gives the vectors U S^eigen. decay as in `cooccurrences`.
    """

    dim: int = 100
    window: int = 5
    shift: float = 1.0
    smoothing: float = 0.75
    eigen: float = 0.5
    decay: Literal["none", "linear", "harmonic"] = "linear"

    def __post_init__(self) -> None:
        if self.dim < 1 or self.shift <= 0:
            raise UserError("dim starts at 1 and shift is above 0", where=f"dim {self.dim}, shift {self.shift}")


def ppmi(counts: Counts, shift: float = 1.0, smoothing: float = 0.75) -> Tensor:
    """(V, V) sparse float64 (COO, coalesced): positive pointwise mutual information, zeros left out."""
    total = counts.total()
    context = total**smoothing
    p_word, p_context = total / total.sum(), context / context.sum()
    joint = counts.value / counts.value.sum()
    value = (joint / (p_word[counts.row] * p_context[counts.column])).log() - np.log(shift)
    keep = value > 0
    where = torch.stack([counts.row[keep], counts.column[keep]])
    return torch.sparse_coo_tensor(where, value[keep], (counts.size,) * 2, is_coalesced=True, check_invariants=False)


def pmi_vectors(corpus: Corpus, options: Pmi, *, seed: int = 0) -> Tensor:
    """(V, d) float32. Raises UserError if the vocabulary is smaller than d."""
    if options.dim > len(corpus.vocabulary):
        raise UserError(
            f"dim {options.dim} of a matrix over {len(corpus.vocabulary)} words", remedy="a smaller dim, or more text"
        )
    matrix = ppmi(cooccurrences(corpus, options.window, options.decay), options.shift, options.smoothing)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        u, s = truncated_svd(matrix.to(torch.float32).to_sparse_csr(), options.dim, seed=seed)
    return u * s**options.eigen


def truncated_svd(matrix: Tensor, rank: int, *, seed: int = 0, passes: int = 8) -> tuple[Tensor, Tensor]:
    """(U (V, rank), S (rank,)) of a sparse (V, V) matrix by randomised subspace iteration (Halko et al. 2011, 4.4).

    U's signs are fixed: the largest entry of a column is positive.
    """
    size = matrix.shape[0]
    width = min(size, rank + max(10, rank // 4))
    rng = torch.Generator().manual_seed(seed)
    back = matrix.to_dense().mT if size <= 1024 else matrix.to_sparse_coo().mT.coalesce().to_sparse_csr()
    q = torch.linalg.qr(matrix @ torch.randn(size, width, generator=rng, dtype=matrix.dtype)).Q
    for _ in range(passes):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(back @ q).Q).Q
    u, s, _ = torch.linalg.svd((back @ q).mT, full_matrices=False)
    u = (q @ u)[:, :rank]
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return u * sign, s[:rank]
