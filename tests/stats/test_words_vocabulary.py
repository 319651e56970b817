"""Counting, encoding, subsampling, noise and one-hot, against gensim and plain Python."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dovetail.errors import DataError, UserError
from dovetail.stats import Corpus, one_hot, sentences_of

gensim = pytest.importorskip("gensim")
SENTENCES = [["a", "b", "a", "c"], [], ["b", "a", "rare"], ["c", "c", "b", "a"]]


def test_counts_and_ids() -> None:
    corpus = Corpus.read(iter(SENTENCES), min_count=2)
    assert corpus.vocabulary.words == ("a", "b", "c")
    assert corpus.vocabulary.counts.tolist() == [4, 3, 3]
    assert corpus.raw == 11
    spelled = [corpus.vocabulary.words[i] for i in corpus.ids.tolist()]
    assert spelled == ["a", "b", "a", "c", "b", "a", "c", "c", "b", "a"]
    assert corpus.sentence.tolist() == [0, 0, 0, 0, 2, 2, 3, 3, 3, 3]
    assert Corpus.read(SENTENCES, min_count=1, max_words=2).vocabulary.words == ("a", "b")


def test_sampling_and_noise_are_gensims() -> None:
    rng = torch.Generator().manual_seed(0)
    sizes = torch.randint(5, 4000, (60,), generator=rng).tolist()
    sentences = [[f"w{i}"] * n for i, n in enumerate(sizes)]
    vocabulary = Corpus.read(sentences, min_count=6).vocabulary
    peer = gensim.models.Word2Vec(min_count=6, sample=1e-2)
    peer.build_vocab(sentences)
    assert set(vocabulary.words) == set(peer.wv.index_to_key)
    kept = vocabulary.kept(1e-2)
    for i, word in enumerate(vocabulary.words):
        assert vocabulary.counts[i] == peer.wv.get_vecattr(word, "count")
        assert kept[i].item() == pytest.approx(min(1, peer.wv.get_vecattr(word, "sample_int") / (2**32 - 1)), abs=1e-6)
    # gensim keeps the noise as cumulative sums, in its own order of ties
    cumulative = torch.tensor(peer.cum_table.tolist()).double() / int(peer.cum_table[-1])
    torch.testing.assert_close(vocabulary.noise(0.75).cumsum(0), cumulative, atol=1e-6, rtol=0)
    assert (vocabulary.kept(0) == 1).all()


def test_one_hot_times_matrix_is_the_row() -> None:
    matrix, ids = torch.randn(7, 4), torch.tensor([[3, 0], [6, 3]])
    assert one_hot(ids, 7).sum(-1).eq(1).all()
    assert torch.equal(one_hot(ids, 7) @ matrix, matrix[ids])


def test_sentences_of_english_and_chinese() -> None:
    text = "It isn't 42 dogs.\nOr is it? 床前明月光,疑是地上霜。\n\nÉcole–straße"
    assert list(sentences_of(text)) == [
        ["it", "isn't", "dogs"],
        ["or", "is", "it"],
        list("床前明月光疑是地上霜"),
        ["école", "straße"],
    ]


def test_text_that_cannot_be_used() -> None:
    with pytest.raises(DataError, match="list of words"):
        Corpus.read(["a string"])
    with pytest.raises(DataError, match="smaller min_count"):
        Corpus.read([["a", "b"]], min_count=2)
    with pytest.raises(DataError):
        Corpus.read([])
    with pytest.raises(UserError, match="start at 1"):
        Corpus.read(SENTENCES, min_count=0)
    with pytest.raises(UserError, match="not in the vocabulary"):
        Corpus.read(SENTENCES, min_count=1).vocabulary.id("z")
    counts = Counter(w for s in SENTENCES for w in s)
    assert Corpus.read(SENTENCES, min_count=1).vocabulary.counts.tolist() == sorted(counts.values(), reverse=True)
