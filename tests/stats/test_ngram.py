"""N-gram models against slow formulas, nltk and kenlm; sums over the vocabulary; ARPA both ways; counting on disk."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dovetail.errors import DataError, UserError
from dovetail.stats import AddK, GoodTuring, KneserNey, NGram, StupidBackoff
from dovetail.stats.ngram import NAMES, Vocabulary, count, count_file, tokenise
from dovetail.stats.ngram.sorting import Packing, collapse
from stats.ngram_oracles import Slow, SlowKatz, SlowKneserNey, SlowWittenBell

DATA = Path(__file__).parents[3] / "shared" / "data"
CORPORA = {"tiny shakespeare": DATA / "tinyshakespeare/input.txt", "wikitext-2": DATA / "wikitext2/valid.txt"}


def sentences(count: int = 400, seed: int = 0) -> list[list[str]]:
    """Sentences of a random Markov chain with Zipf's frequencies: n-grams of all counts, at all orders."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(60)]
    out = []
    for _ in range(count):
        sentence, at = [], rng.randrange(8)
        for _ in range(rng.randrange(1, 12)):
            at = min(int(rng.paretovariate(0.8)) + at // 3, 59)
            sentence.append(words[at])
        out.append(sentence)
    return out


TEXT = sentences()
QUERIES = [*sentences(60, seed=1), ["w1", "never", "w2", "w3", "w1", "w2"]]


def questions(order: int, given: list[list[str]] = QUERIES) -> list[tuple[str, tuple[str, ...]]]:
    """(token, context of at most order - 1 tokens), <s> and </s> included."""
    out = []
    for sentence in given:
        padded = ["<s>", *sentence, "</s>"]
        out += [(padded[i], tuple(padded[max(0, i - order + 1) : i])) for i in range(1, len(padded))]
    return out


def known(slow: Slow, token: str) -> str:
    return token if token in slow.words or token == "<s>" else "<unk>"


def check(model: NGram, slow: Any, given: list[list[str]] = QUERIES, rtol: float = 1e-10) -> None:
    asked = questions(model.order, given)
    expected = [math.log(slow.p(known(slow, w), tuple(known(slow, x) for x in h))) for w, h in asked]
    np.testing.assert_allclose(model.logprobs(given), expected, rtol=0, atol=rtol)
    for (w, h), value in list(zip(asked, expected, strict=True))[::17]:
        assert math.isclose(model.logprob(h, w), value, abs_tol=rtol)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_modified_kneser_ney_is_the_formula(order: int) -> None:
    model = NGram.fit(TEXT, order)
    assert not model.notes
    check(model, SlowKneserNey(TEXT, order))


def test_fixed_discounts_where_counts_of_counts_give_none() -> None:
    few = [list("abab"), list("abba")] * 9
    model = NGram.fit(few, 2)
    assert len(model.notes) == 2 and "order 1: counts of counts" in model.notes[0]
    check(model, SlowKneserNey(few, 2, fallback=True), [list("aab"), list("bbc")])


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("order", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_modified_kneser_ney_on_real_text(corpus: str, order: int) -> None:
    if not CORPORA[corpus].exists():
        pytest.skip(f"{CORPORA[corpus]} is not here")
    lines = tokenise(CORPORA[corpus].read_text(), "word")
    test, train = lines[:30], lines[30 : None if corpus == "tiny shakespeare" else 400]
    model = NGram.fit(train, order)
    assert not model.notes
    check(model, SlowKneserNey(train, order), test, rtol=1e-6)
    for h in [(), ("<s>",), tuple(test[0][:4]), ("never", "seen")]:
        assert math.isclose(model.distribution(h).sum(), 1, abs_tol=1e-9)


def test_plain_kneser_ney_takes_one_discount() -> None:
    slow = SlowKneserNey(TEXT, 3, fallback=True)
    slow.discount = {n: [0, 0.75, 0.75, 0.75] for n in (1, 2, 3)}
    check(NGram.fit(TEXT, 3, KneserNey(modified=False, discount=0.75)), slow)
    model = NGram.fit(TEXT, 3, "kneser-ney")
    counts = [c for gram, c in slow.adjusted.items() if len(gram) == 3]
    y = counts.count(1) / (counts.count(1) + 2 * counts.count(2))
    assert isinstance(model.smoothing, KneserNey)
    assert model.smoothing.discounts(np.array(counts), 3, []) == (0.0, y, y, y)


def test_good_turing_and_witten_bell_are_the_formulas() -> None:
    check(NGram.fit(TEXT, 3, "good-turing"), SlowKatz(TEXT, 3))
    check(NGram.fit(TEXT, 3, "witten-bell"), SlowWittenBell(TEXT, 3))
    assert any("up to" in note for note in NGram.fit(TEXT, 1, GoodTuring(limit=50)).notes)


def test_relative_frequencies_add_k_and_stupid_backoff() -> None:
    slow = Slow(TEXT, 3)
    after = slow.followers(slow.counts)
    mle, add, stupid = (NGram.fit(TEXT, 3, s) for s in ("mle", AddK(0.1), StupidBackoff(0.4)))
    for w, h in questions(3):
        w, h = known(slow, w), tuple(known(slow, x) for x in h)
        seen, shorter = after.get(h, {}), h
        total = sum(seen.values())
        expected = (seen.get(w, 0) + 0.1) / (total + 0.1 * len(slow.words))
        assert math.isclose(math.exp(add.logprob(h, w)), expected, rel_tol=1e-10)
        while shorter not in after:
            shorter = shorter[1:]
        expected = after[shorter].get(w, 0) / sum(after[shorter].values())
        assert math.isclose(math.exp(mle.logprob(h, w)), expected, rel_tol=1e-10)
        score, shorter = 1.0, h
        while shorter and w not in after.get(shorter, {}):
            score, shorter = score * 0.4, shorter[1:]
        expected = score * after[shorter].get(w, 0) / sum(after[shorter].values())
        assert math.isclose(math.exp(stupid.logprob(h, w)), expected, rel_tol=1e-10)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "stupid-backoff"])
@pytest.mark.parametrize("order", [1, 3, 4])
def test_probabilities_sum_to_one_and_agree_with_queries(name: str, order: int) -> None:
    model = NGram.fit(TEXT, order, name)
    contexts = [(), ("<s>",), ("<s>", "w1"), ("w1", "w2"), ("w2", "w1", "w1"), ("never",), ("never", "w1"), ("</s>",)]
    for h in contexts:
        p = model.distribution(h)
        assert math.isclose(p.sum(), 1, abs_tol=1e-12)
        with np.errstate(divide="ignore"):
            asked = [model.logprob(h, w) for w in model.vocabulary.names]
            np.testing.assert_allclose(np.exp(asked)[[0, *range(2, len(p))]], p[[0, *range(2, len(p))]], atol=1e-14)


def test_nltk_recursions() -> None:
    lm = pytest.importorskip("nltk.lm")
    text = TEXT[:120]
    for ours, theirs in (
        (KneserNey(modified=False, discount=0.1), lm.KneserNeyInterpolated),
        ("witten-bell", lm.WittenBellInterpolated),
    ):
        model = NGram.fit(text, 2, ours)
        peer = theirs(2)
        everygrams = [[("<s>",)] + [(w,) for w in (*s, "</s>")] + list(pairwise(["<s>", *s, "</s>"])) for s in text]
        peer.fit(everygrams, ["<s>", *(w for s in text for w in (*s, "</s>"))])
        peer.estimator.unigram_score = lambda word, m=model: math.exp(
            m.logprob((), word)
        )  # theirs has no uniform one below
        for w, h in questions(2, text[:40]):
            assert math.isclose(peer.score(w, h), math.exp(model.logprob(h, w)), rel_tol=1e-9), (ours, w, h)


@pytest.mark.parametrize("name", ["modified-kneser-ney", "good-turing", "witten-bell", "mle"])
def test_arpa_round_trip_and_what_kenlm_says_of_it(name: str, tmp_path: Path, capfd: Any) -> None:
    model = NGram.fit(TEXT, 4, name)
    model.save_arpa(tmp_path / "a.arpa")
    again = NGram.load_arpa(tmp_path / "a.arpa")
    assert again.sizes == model.sizes
    np.testing.assert_allclose(again.logprobs(QUERIES), model.logprobs(QUERIES), atol=1e-8)
    again.save_arpa(tmp_path / "b.arpa")
    assert (tmp_path / "a.arpa").read_bytes() == (tmp_path / "b.arpa").read_bytes()
    kenlm = pytest.importorskip("kenlm")
    if name == "mle":
        return  # kenlm does not add -99 up as probability 0
    peer = kenlm.Model(str(tmp_path / "a.arpa"))
    for sentence in QUERIES:
        text = " ".join(sentence)
        theirs = [p for p, _, _ in peer.full_scores(text)]
        np.testing.assert_allclose(model.logprobs(sentence) / math.log(10), theirs, atol=1e-5)
        assert math.isclose(model.perplexity(sentence), peer.perplexity(text), rel_tol=1e-4)


def test_counts_on_disk_are_those_in_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.zipf(1.3, 60_000) + 1, 40_000).astype(np.int64)
    ids[ids == 1] = 3
    for order in (1, 3, 5):
        with (
            count([ids], order, 40_001) as whole,
            count(np.array_split(ids, 7), order, 40_001, memory=1, folder=tmp_path) as parts,
        ):
            assert parts.rows[-1].on_disk and not whole.rows[-1].on_disk
            assert parts.tokens == whole.tokens == len(ids)
            for n in range(1, order + 1):
                for ours, theirs in zip(whole.columns(n), parts.columns(n), strict=True):
                    np.testing.assert_array_equal(ours, theirs)
    assert list(tmp_path.iterdir()) == []


def test_counts_are_those_of_dictionaries() -> None:
    slow = Slow(TEXT, 4)
    model_words = NGram.fit(TEXT, 4).vocabulary
    stream = np.concatenate([np.append(model_words.encode(s), 2) for s in TEXT])
    with count([stream], 4, len(model_words)) as found:
        for n in range(1, 5):
            ids, counts, adjusted = found.columns(n)
            ours = {
                tuple(model_words.decode(g)): v for g, *v in zip(ids.T.tolist(), counts.tolist(), adjusted.tolist())
            }
            theirs = {g: [c, slow.adjusted[g]] for g, c in slow.counts.items() if len(g) == n}
            assert ours == theirs


def test_rows_of_several_limbs() -> None:
    packing = Packing(5, 20)
    assert packing.words == (3, 1, 1)
    ids = torch.randint(0, 3, (5, 400)).numpy() * 2**18
    np.testing.assert_array_equal(packing.unpack(packing.pack(ids)), ids)
    rows, sums = collapse(packing.pack(ids), packing.widths, None)
    expected, counts = np.unique(ids, axis=1, return_counts=True)
    np.testing.assert_array_equal(packing.unpack(rows), expected)
    np.testing.assert_array_equal(sums[0], counts)


@pytest.mark.parametrize("unit", ["word", "character", "byte"])
def test_files_and_texts_give_one_model(unit: Any, tmp_path: Path) -> None:
    text = "Ein Haus.\nZwei Häuser, 三座房子\n\nund ein Haus\n" * 20
    (tmp_path / "a.txt").write_text(text)
    file = NGram.fit_file(tmp_path / "a.txt", 3, "witten-bell", unit=unit)
    held = NGram.fit(text, 3, "witten-bell", unit=unit)
    assert held.sizes[1:] == file.sizes[1:]
    query = "ein Haus, und\nZwei 三"
    known_ids = [i for i, t in enumerate(tokenise(query, unit)[0]) if t in held.vocabulary]
    if unit != "byte":  # the file's vocabulary has all 256 bytes
        np.testing.assert_allclose(file.logprobs(query), held.logprobs(query), atol=1e-12)
    assert known_ids
    file.save_arpa(tmp_path / "a.arpa")
    again = NGram.load_arpa(tmp_path / "a.arpa", unit=unit)
    np.testing.assert_allclose(again.logprobs(query), file.logprobs(query), atol=1e-8)
    assert math.isclose(again.perplexity(query), math.exp(-file.logprobs(query).mean()), rel_tol=1e-7)


def test_integers_in_arrays_tensors_and_mapped_files(tmp_path: Path) -> None:
    ids = torch.randint(0, 50, (3000,))
    model = NGram.fit(ids, 3, vocab=64)
    np.save(tmp_path / "ids.npy", ids.numpy().astype(np.uint16))
    mapped = NGram.fit(np.load(tmp_path / "ids.npy", mmap_mode="r"), 3, vocab=64)
    contexts, tokens = torch.randint(0, 64, (40, 5)), torch.randint(0, 70, (40,))
    batch = model.logprob(contexts, tokens)
    assert isinstance(batch, torch.Tensor) and batch.shape == (40,)
    for c, t, value in zip(contexts.tolist(), tokens.tolist(), batch.tolist(), strict=True):
        assert math.isclose(model.logprob(c, t), value, abs_tol=1e-12)
    np.testing.assert_array_equal(mapped.logprob(contexts.numpy(), tokens.numpy()), batch.numpy())
    rows = NGram.fit(ids.view(30, 100), 3, vocab=64)
    assert math.isclose(rows.perplexity(ids.view(30, 100)), rows.perplexity(ids.view(30, 100).tolist()))
    model.save_arpa(tmp_path / "a.arpa")
    again = NGram.load_arpa(tmp_path / "a.arpa", integers=True)
    torch.testing.assert_close(again.logprob(contexts, tokens), batch, atol=1e-8, rtol=0)


def test_long_streams_are_scored_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = NGram.fit(TEXT, 4)
    whole = model.logprobs(TEXT)
    monkeypatch.setattr("dovetail.stats.ngram.model._PIECE", 7)
    np.testing.assert_array_equal(model.logprobs(TEXT), whole)
    assert not np.allclose(model.logprobs(TEXT, bos=False, eos=False), model.logprobs(TEXT, eos=False))


def test_perplexity_with_and_without_unknown_tokens() -> None:
    model = NGram.fit(TEXT, 3)
    sentence = ["w1", "never", "w2"]
    values = model.logprobs(sentence)
    assert math.isclose(model.perplexity(sentence), math.exp(-values.mean()))
    assert math.isclose(model.perplexity(sentence, oov=False), math.exp(-values[[0, 2, 3]].mean()))
    score = model.sentences([sentence, ["w1"]])[0]
    assert (score.tokens, score.oov) == (4, 1) and math.isclose(score.perplexity, model.perplexity(sentence))
    with pytest.raises(DataError, match="no tokens"):
        model.perplexity(["never"], oov=False, eos=False)


def test_suggest_generate_and_draft() -> None:
    model = NGram.fit("the cat sat on the mat\nthe cat sat on the hat\nthe dog sat\n" * 5, 3, unit="word")
    (first, p), *_ = model.suggest(["the", "cat"], 3)
    assert first == "sat" and math.isclose(p, math.exp(model.logprob(["the", "cat"], "sat")))
    assert model.generate(seed=1) == model.generate(seed=1) != model.generate(seed=2)
    assert model.generate(["the", "cat"], temperature=0, max_new_tokens=3) == ["sat", "on", "the"]
    assert model.draft(["the", "cat"], 3) == ["sat", "on", "the"]
    draws = [model.generate(["the"], 1, seed=s) for s in range(600)]
    p = model.distribution(["<s>", "the"])
    p[0] = 0
    share = sum(d == ["cat"] for d in draws) / 600
    assert abs(share - p[model.encode(["cat"])[0]] / p.sum()) < 4 * 0.5 / math.sqrt(600)
    ids = torch.tensor([[0, 1, 2, 3] * 5, [1, 2, 3, 0] * 5])
    repeat = NGram.fit(ids, 3)
    torch.testing.assert_close(repeat.draft(ids, 4), torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'witten-bell'"):
        NGram.fit(TEXT, 3, "witen-bell")
    with pytest.raises(UserError, match="no unit"):
        NGram.fit("a text", 3)
    with pytest.raises(DataError, match="order 0"):
        NGram.fit(TEXT, 0)
    with pytest.raises(DataError, match="<s>"):
        NGram.fit([["a", "<s>"]], 2)
    with pytest.raises(UserError, match="not probabilities"):
        NGram.fit(TEXT, 2, "stupid-backoff").perplexity(TEXT)
    with pytest.raises(UserError, match="no back-off model"):
        NGram.fit(TEXT, 2, "add-k").save_arpa(tmp_path / "a")
    with pytest.raises(UserError, match="strings"):
        NGram.fit(TEXT, 2).logprobs([[1, 2]])
    with pytest.raises(DataError, match="no text"):
        (tmp_path / "empty").write_text("\n \n")
        count_file(tmp_path / "empty", 2)
    with pytest.raises(DataError, match="UTF-8"):
        (tmp_path / "bad").write_bytes(b"a \xff b\n")
        NGram.fit_file(tmp_path / "bad")
    with pytest.raises(DataError, match="cannot be read"):
        NGram.fit_file(tmp_path / "none")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\\end\\", "", "cut short"),
        ("\\data\\", "", "no .data. section"),
        ("\\2-grams:", "\\3-grams:", "should be"),
        ("\tw1 w2", "\tw1 w2 w3 w4", "no 2-gram"),
        ("\tw1 w2", "\tw1 other", "no unigram"),
        ("\tw1 w2", "\tw2 w1", "twice"),
        ("ngram 2=", "ngram 2=9", "missing"),
        ("\n-", "\n", "above 0"),
    ],
)
def test_broken_arpa_files(old: str, new: str, message: str, tmp_path: Path) -> None:
    NGram.fit([["w1", "w2", "w1"], ["w2", "w2"]] * 3, 2, "witten-bell").save_arpa(tmp_path / "a.arpa")
    text = (tmp_path / "a.arpa").read_text()
    assert old in text
    (tmp_path / "a.arpa").write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        NGram.load_arpa(tmp_path / "a.arpa")


def test_words_of_a_long_text_are_those_of_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked up all at once: words of 1 to 40 bytes that share beginnings, at every blank that split knows."""
    rng = random.Random(0)
    pieces = ["a", "b", "abcdefgh", "é", "漢字", "\x7f", "\x01"]
    names = list(dict.fromkeys("".join(rng.choices(pieces, k=rng.randint(1, 5))) for _ in range(300)))
    vocabulary = Vocabulary(names[::2])
    for blanks in ([" ", "\n"], [" ", "\t", "\r\n", "\x0b", "\x0c", "\x1c", "\x1f", "\n", "\n \n", "  "]):
        text = "".join(rng.choice(names) + rng.choice(blanks) for _ in range(3000)) + rng.choice(["", "end"])
        lines = [words for line in text.split("\n") if (words := line.split())]
        found = vocabulary.lines(text)
        assert found is not None
        assert found[0].tolist() == [i for words in lines for i in vocabulary.encode(words)]
        assert found[1].tolist() == np.cumsum([0, *map(len, lines)])[:-1].tolist()
    assert [part.tolist() for part in vocabulary.lines(" \n\t") or ()] == [[], []]
    for character in ("\0", "\x85", "\xa0", "\u2003", "\u2028", "\u3000"):
        assert vocabulary.lines(f"a{character}b") is None, "split cuts there, or a word is no number of its bytes"
    for character in map(chr, range(1, 0x3100)):
        assert character.isspace() == (len(f"a{character}b".split()) == 2)
        if character.isspace() and not character.isascii():
            assert vocabulary.lines(f"a{character}b") is None
    model = NGram.fit(text, 2, unit="word")
    slow = [model.sentence_logprobs(text[at : at + 9000]).tolist() for at in (0, 900)]
    monkeypatch.setattr("dovetail.stats.ngram.model._LONG", 1)
    assert [model.sentence_logprobs(text[at : at + 9000]).tolist() for at in (0, 900)] == slow
    for bad, error in (("a <s> b", UserError), (" \n", DataError)):
        with pytest.raises(error):
            model.perplexity(bad)
