"""N-grams as feature vectors against scikit-learn's counts; logistic regression against its solution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dovetail.errors import DataError, UserError
from dovetail.stats.ngram.classifier import LogisticRegression
from dovetail.stats.ngram.features import NGramFeatures

TEXTS = [
    "the cat sat on the mat",
    "Der Hund lief über die Straße",
    "le chat est là",
    "the dog ran",
    "三座房子 the",
    "",
    "a a a",
] * 3


@pytest.mark.parametrize("unit", ["character", "word"])
@pytest.mark.parametrize(("low", "high", "least"), [(1, 1, 1), (1, 3, 1), (2, 4, 3)])
def test_counts_are_those_of_scikit_learn(unit: Any, low: int, high: int, least: int) -> None:
    text = pytest.importorskip("sklearn.feature_extraction.text")
    analyser = {"character": "char", "word": "word"}[unit]
    peer = text.CountVectorizer(
        analyzer=analyser, ngram_range=(low, high), min_df=least, lowercase=False, token_pattern=r"\S+"
    )
    theirs = peer.fit_transform(TEXTS).toarray()
    features = NGramFeatures(unit, low, high, least=least).fit(TEXTS)
    ours = features.transform(TEXTS).to_dense().numpy()
    assert sorted(features.names) == sorted(peer.vocabulary_)
    np.testing.assert_array_equal(ours, theirs[:, [peer.vocabulary_[name] for name in features.names]])


def test_hashing_is_the_vocabulary_folded() -> None:
    known = NGramFeatures("byte", 1, 3).fit(TEXTS)
    hashed = NGramFeatures("byte", 1, 3, columns=64)
    fold = torch.zeros(known.width, 64)
    for i, code in zip(known._column.tolist(), known._known):
        column, sign = hashed._place(np.array([code], np.uint64))
        fold[i, column[0]] = sign[0]
    assert set(fold.unique().tolist()) == {-1.0, 0.0, 1.0}
    torch.testing.assert_close(hashed.transform(TEXTS).to_dense(), known.transform(TEXTS).to_dense() @ fold)
    long = NGramFeatures("byte", 1, 3, columns=64, scale="l2").transform(TEXTS).to_dense().norm(dim=1)
    torch.testing.assert_close(long, torch.tensor([float(bool(t)) for t in TEXTS]))
    assert set(NGramFeatures(scale="binary").fit(TEXTS).transform(TEXTS).values().tolist()) == {1.0}


def test_hashes_do_not_change() -> None:
    row = NGramFeatures("word", 1, 2, columns=1000).transform(["to be or not"])
    again = NGramFeatures("word", 1, 2, columns=1000).transform(["to be or not"])
    assert row.col_indices().tolist() == again.col_indices().tolist()
    assert len(row.col_indices()) == 7


def test_logistic_regression_is_scikit_learns() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(120, 10, generator=rng, dtype=torch.float64)
    y = (x @ torch.randn(10, 3, generator=rng, dtype=torch.float64)).argmax(1)
    y[:12] = torch.randint(0, 3, (12,), generator=rng)
    ours = LogisticRegression.fit(x.to_sparse_csr(), y.tolist(), l2=0.01)
    peer = linear.LogisticRegression(C=1 / (0.01 * 120), tol=1e-10, max_iter=5000).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(ours.log_probabilities(x).numpy(), peer.predict_log_proba(x.numpy()), atol=1e-4)
    assert ours.predict(x) == peer.predict(x.numpy()).tolist()


def test_a_classifier_tells_languages_apart() -> None:
    english = [
        "the cat sat on the mat",
        "a dog ran to the house",
        "she said that it was the end",
        "this is not the way",
    ]
    german = [
        "die Katze saß auf der Matte",
        "ein Hund lief zum Haus",
        "sie sagte, das sei das Ende",
        "dies ist nicht der Weg",
    ]
    features = NGramFeatures("character", 1, 3, columns=2**12, scale="l2")
    labels = ["en"] * 4 + ["de"] * 4
    model = LogisticRegression.fit(features.transform(english + german), labels)
    assert model.predict(features.transform(["the other man was there", "der andere Mann ist nicht da"])) == [
        "en",
        "de",
    ]


def test_refusals() -> None:
    with pytest.raises(UserError, match="not known yet"):
        NGramFeatures().transform(TEXTS)
    with pytest.raises(UserError, match="no vocabulary to fit"):
        NGramFeatures(columns=8).fit(TEXTS)
    with pytest.raises(UserError, match="no threshold"):
        NGramFeatures(columns=8, least=2)
    with pytest.raises(DataError, match="lower least"):
        NGramFeatures(least=1000).fit(TEXTS)
    with pytest.raises(DataError, match="1 class"):
        LogisticRegression.fit(torch.ones(3, 2), ["a", "a", "a"])
