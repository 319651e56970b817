"""Neighbours, analogies and rank correlation: the same answers and scores as gensim and scipy on the same vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from dovetail.errors import DataError, UserError
from dovetail.stats import WordVectors, spearman

gensim = pytest.importorskip("gensim")
COUNTRIES = {"Athens": "Greece", "Oslo": "Norway", "Rome": "Italy", "Paris": "France", "Cairo": "Egypt"}


@pytest.fixture(scope="module")
def vectors() -> WordVectors:
    """Capitals are countries plus one direction and some noise; the rest is filler."""
    rng = torch.Generator().manual_seed(0)
    words, rows, shift = [], [], torch.randn(12, generator=rng)
    for capital, country in COUNTRIES.items():
        base = torch.randn(12, generator=rng)
        words += [country, capital]
        rows += [base, base + shift + 0.5 * torch.randn(12, generator=rng)]
    filler = 3 * torch.randn(80, 12, generator=rng)
    return WordVectors([*words, *(f"filler{i}" for i in range(80))], torch.cat([torch.stack(rows), filler]))


@pytest.fixture(scope="module")
def peer(vectors: WordVectors) -> object:
    made = gensim.models.KeyedVectors(12)
    made.add_vectors(list(vectors.words), vectors.matrix.numpy())
    return made


def same(ours: list[tuple[str, float]], theirs: list[tuple[str, float]]) -> None:
    assert [w for w, _ in ours] == [w for w, _ in theirs]
    np.testing.assert_allclose([s for _, s in ours], [s for _, s in theirs], atol=1e-5)


def test_neighbours_are_gensims(vectors: WordVectors, peer: object) -> None:
    for word in vectors.words[:15]:
        same(vectors.nearest(word, 9), peer.most_similar(word, topn=9))  # type: ignore[attr-defined]
        assert vectors.similarity(word, "Oslo") == pytest.approx(peer.similarity(word, "Oslo"), abs=1e-6)  # type: ignore[attr-defined]
    assert vectors.nearest(vectors["Rome"], 1)[0][0] == "Rome"
    assert len(vectors.nearest("Rome", 1000)) == len(vectors) - 1


def test_analogies_are_gensims(vectors: WordVectors, peer: object) -> None:
    for a, b, c in [("Athens", "Greece", "Oslo"), ("Italy", "Rome", "France"), ("filler1", "Rome", "filler2")]:
        ours = [w for w, _ in vectors.analogy(a, b, c, 9)]
        assert ours == [w for w, _ in peer.most_similar(positive=[b, c], negative=[a], topn=9)]  # type: ignore[attr-defined]
        product = vectors.analogy(a, b, c, 9, rule="3cosmul")
        theirs = peer.most_similar_cosmul(positive=[b, c], negative=[a], topn=9)  # type: ignore[attr-defined]
        assert [w for w, _ in product[:5]] == [w for w, _ in theirs[:5]]  # gensim divides by 1e-6 more, the paper 1e-3
        near = [(vectors.similarity(product[0][0], w) + 1) / 2 for w in (a, b, c)]
        assert product[0][1] == pytest.approx(near[1] * near[2] / (near[0] + 0.001), abs=1e-5)
        assert not {a, b, c} & set(ours)
    assert vectors.analogy("Athens", "Greece", "Oslo", 1)[0][0] == "Norway"


def test_accuracy_is_gensims(vectors: WordVectors, peer: object, tmp_path: Path) -> None:
    lines = [": capital-common-countries"]
    names = list(COUNTRIES.items())
    lines += [f"{a.upper()} {x} {b} {y.lower()}" for a, x in names for b, y in names if a != b]
    lines += [": nonsense", "Athens filler1 Oslo filler2", "Athens Greece Bern Switzerland"]
    path = tmp_path / "questions.txt"
    path.write_text("\n".join(lines) + "\n")
    ours = vectors.score_analogies(path)
    accuracy, sections = peer.evaluate_word_analogies(str(path))  # type: ignore[attr-defined]
    assert ours.accuracy == pytest.approx(accuracy)
    assert 0.2 < ours.accuracy < 1
    assert ours.skipped == 1
    theirs = [(s["section"], len(s["correct"]), len(s["correct"]) + len(s["incorrect"])) for s in sections[:-1]]
    assert list(ours.sections) == theirs
    assert vectors.score_analogies(path, "3cosmul").asked == 21


def test_similarity_is_gensims(vectors: WordVectors, peer: object, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "pairs.tsv"
    pairs = [(rng.choice(vectors.words), rng.choice(vectors.words), rng.integers(0, 10)) for _ in range(60)]
    lines = [f"{a}\t{b.lower()}\t{s}" for a, b, s in pairs]
    path.write_text("# people\n" + "\n".join([*lines, "unheard\tRome\t3"]) + "\n")
    ours, used, missing = vectors.score_similarity(path)
    theirs = peer.evaluate_word_pairs(str(path))[1].statistic  # type: ignore[attr-defined]
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert (used, missing) == (60, 1)


def test_spearman_is_scipys() -> None:
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        x, y = torch.randint(0, 8, (30,), generator=rng).double(), torch.randn(30, generator=rng).double()
        assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert np.isnan(spearman(torch.ones(5), torch.arange(5)))
    assert np.isnan(spearman(torch.zeros(0), torch.zeros(0)))


def test_an_embedding_in_a_tokenizers_order(vectors: WordVectors) -> None:
    made = vectors.embedding(["Rome", "<pad>", "Oslo"], missing="mean")
    assert torch.equal(made["Rome"], vectors["Rome"])
    torch.testing.assert_close(made.matrix[1], vectors.matrix.mean(0))
    with pytest.raises(DataError, match="1 of 2 tokens have no vector: '<pad>'"):
        vectors.embedding(["Rome", "<pad>"])


def test_what_cannot_be_asked(vectors: WordVectors, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'Rome'"):
        vectors.nearest("Rom")
    with pytest.raises(UserError, match="3cosmul"):
        vectors.analogy("Rome", "Italy", "Oslo", rule="3cosdiv")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no file"):
        vectors.score_analogies(tmp_path / "none")
    (tmp_path / "q").write_text(": s\none two three\n")
    with pytest.raises(DataError, match="line 2 has 3 words"):
        vectors.score_analogies(tmp_path / "q")
    (tmp_path / "p").write_text("word1 word2 score\nRome Oslo high\n")
    with pytest.raises(DataError, match="line 2 is not two words"):
        vectors.score_similarity(tmp_path / "p")
