"""Co-occurrences, PPMI, truncated SVD and GloVe, against loops, dense formulas, torch's SVD and autograd."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from dovetail.errors import DivergedError, UserError
from dovetail.stats import Corpus, WordVectors, cooccurrences, ppmi
from dovetail.stats.words import counts as counting
from dovetail.stats.words.counts import truncated_svd
from dovetail.stats.words.glove import glove_gradient
from stats import planted

WEIGHTS = {"none": lambda s: 1.0, "linear": lambda s: (4 - s) / 3, "harmonic": lambda s: 1 / s}


@pytest.mark.parametrize("decay", list(WEIGHTS))
def test_cooccurrences_by_loops(decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "_STRETCH", 100)  # several stretches, merged
    sentences = planted.sentences(40)
    corpus = Corpus.read(sentences, min_count=1)
    theirs: Counter[tuple[int, int]] = Counter()
    for sentence in sentences:
        ids = [corpus.vocabulary.id(word) for word in sentence]
        for i, a in enumerate(ids):
            for j, b in enumerate(ids):
                if 0 < abs(i - j) <= 3:
                    theirs[a, b] += WEIGHTS[decay](abs(i - j))  # type: ignore[assignment]
    ours = cooccurrences(corpus, 3, decay)  # type: ignore[arg-type]
    pairs = dict(zip(zip(ours.row.tolist(), ours.column.tolist()), ours.value.tolist()))
    assert set(pairs) == set(theirs)
    assert all(math.isclose(pairs[key], value, rel_tol=1e-12) for key, value in theirs.items())


def test_ppmi_is_the_dense_formula() -> None:
    counts = cooccurrences(Corpus.read(planted.sentences(60), min_count=1), 4, "none")
    dense = torch.zeros(counts.size, counts.size).double().index_put_((counts.row, counts.column), counts.value)
    p = dense / dense.sum()
    context = dense.sum(0) ** 0.75
    pmi = (p / (p.sum(1, keepdim=True) * context / context.sum())).log() - math.log(1.5)
    ours = ppmi(counts, shift=1.5, smoothing=0.75).to_dense()
    torch.testing.assert_close(ours, pmi.clamp(min=0), atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("size", [60, 1100])  # the transpose of a larger one stays sparse
def test_truncated_svd_is_torchs(size: int) -> None:
    rng = torch.Generator().manual_seed(0)
    dense = torch.randn(size, 12, generator=rng).double() @ torch.randn(12, size, generator=rng).double()
    dense *= torch.rand(size, size, generator=rng) < 0.3
    u, s = truncated_svd(dense.to_sparse_csr(), 8, passes=20)
    full_u, full_s, _ = torch.linalg.svd(dense)
    torch.testing.assert_close(s, full_s[:8], atol=0, rtol=1e-6)
    torch.testing.assert_close((u.mT @ full_u[:, :8]).abs(), torch.eye(8).double(), atol=1e-3, rtol=0)
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


def test_glove_gradient_is_autograds() -> None:
    w, c = (torch.randn(7, 6).double() for _ in range(2))
    w[:, -1], c[:, -2] = 1, 1
    w, c = w.requires_grad_(), c.requires_grad_()
    log_x, weight = torch.randn(7).double(), torch.rand(7).double()
    predicted = (w[:, :4] * c[:, :4]).sum(1) + w[:, 4] + c[:, 5]  # vector · vector and two biases
    theirs = torch.autograd.grad((weight * (predicted - log_x) ** 2).sum() / 2, (w, c))
    with torch.no_grad():
        ours = glove_gradient(w, c, log_x, weight)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


@pytest.mark.parametrize("method", ["pmi", "glove"])
def test_planted_topics_are_found(method: str) -> None:
    extra = {"epochs": 15, "batch": 512, "x_max": 10.0} if method == "glove" else {}
    corpus = Corpus.read(planted.sentences(), min_count=1)
    vectors, again = (WordVectors.fit(corpus, method, dim=16, window=5, **extra) for _ in range(2))
    assert planted.found(vectors) > 0.95
    assert torch.equal(vectors.matrix, again.matrix)


def test_what_cannot_be_asked() -> None:
    corpus = Corpus.read([["a", "b", "a", "b"]], min_count=1)
    with pytest.raises(UserError, match="dim 100 of a matrix over 2 words"):
        WordVectors.fit(corpus, "pmi")
    with pytest.raises(UserError, match="harmonic"):
        cooccurrences(corpus, 2, "cubic")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="on the CPU"):
        WordVectors.fit(corpus, "pmi", dim=1, device="meta")
    with pytest.raises(DivergedError):
        WordVectors.fit(corpus, "glove", dim=4, lr=1e38, epochs=3)
