"""Each processor against transformers', and what must hold of any scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as peers

from dovetail.sampling import Sampling, logits

ROWS, VOCAB = 3, 23


def scores_of(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def history_of(seed: int, length: int, vocab: int = 5) -> torch.Tensor:
    return torch.randint(0, vocab, (ROWS, length), generator=torch.Generator().manual_seed(seed))


CASES = {
    "temperature": (lambda s, h: logits.temperature(s, 0.7), peers.TemperatureLogitsWarper(0.7)),
    "top_k": (lambda s, h: logits.top_k(s, 5), peers.TopKLogitsWarper(5)),
    "top_k beyond": (lambda s, h: logits.top_k(s, 500), peers.TopKLogitsWarper(500)),
    "top_p": (lambda s, h: logits.top_p(s, 0.8), peers.TopPLogitsWarper(0.8)),
    "top_p tiny": (lambda s, h: logits.top_p(s, 1e-6), peers.TopPLogitsWarper(1e-6)),
    "min_p": (lambda s, h: logits.min_p(s, 0.1), peers.MinPLogitsWarper(0.1)),
    "min_p one": (lambda s, h: logits.min_p(s, 1.0), peers.MinPLogitsWarper(1.0)),
    "repetition": (lambda s, h: logits.repetition_penalty(s, h, 1.4), peers.RepetitionPenaltyLogitsProcessor(1.4)),
    "ngram 1": (lambda s, h: logits.no_repeat_ngram(s, h, 1), peers.NoRepeatNGramLogitsProcessor(1)),
    "ngram 2": (lambda s, h: logits.no_repeat_ngram(s, h, 2), peers.NoRepeatNGramLogitsProcessor(2)),
    "ngram 3": (lambda s, h: logits.no_repeat_ngram(s, h, 3), peers.NoRepeatNGramLogitsProcessor(3)),
    "suppress": (lambda s, h: logits.suppress(s, (1, 4)), peers.SuppressTokensLogitsProcessor([1, 4], device="cpu")),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [1, 2, 17])
def test_equals_transformers(name: str, length: int) -> None:
    ours, peer = CASES[name]
    changed = 0
    for seed in range(8):
        scores, history = scores_of(seed), history_of(seed, length)
        want = peer(history, scores.clone())
        torch.testing.assert_close(ours(scores, history), want, rtol=0, atol=0)
        changed += int((want != scores).sum())
    assert changed > 0 or "beyond" in name or length < 3, "the case would pass with an identity"


def test_all_together_in_transformers_order() -> None:
    sampling = Sampling(
        max_new_tokens=9, min_new_tokens=2, temperature=0.6, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=1.3,
        no_repeat_ngram=2, suppress=(7,),
    )  # fmt: skip
    chain = [
        peers.RepetitionPenaltyLogitsProcessor(1.3), peers.NoRepeatNGramLogitsProcessor(2),
        peers.SuppressTokensLogitsProcessor([3]), peers.SuppressTokensLogitsProcessor([7]),
        peers.TemperatureLogitsWarper(0.6), peers.TopKLogitsWarper(9), peers.TopPLogitsWarper(0.9),
        peers.MinPLogitsWarper(0.05),
    ]  # fmt: skip
    for seed in range(10):
        scores, history = scores_of(seed), history_of(seed, 12)
        want = scores.clone()
        for peer in chain:
            want = peer(history, want)
        got = logits.warp(logits.constrain(scores, history, sampling, 1, (3,)), sampling)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_padding_is_no_history() -> None:
    """A row with padding on its left is treated as the same row alone, token 0 included."""
    scores = scores_of(1)[:1]
    for length in range(1, 6):
        row = history_of(length, length, vocab=2)[:1]
        padded = torch.cat([torch.full((1, 4), -1), row], 1)
        for change in (
            lambda h: logits.repetition_penalty(scores, h, 1.7),
            lambda h: logits.no_repeat_ngram(scores, h, 2),
            lambda h: logits.no_repeat_ngram(scores, h, 4),
        ):
            assert torch.equal(change(padded), change(row))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), k=st.integers(1, 30), p=st.floats(0.01, 1.0), floor=st.floats(0.0, 1.0),
    heat=st.floats(0.05, 5.0),
)  # fmt: skip
def test_cuts_keep_the_best_and_never_add(seed: int, k: int, p: float, floor: float, heat: float) -> None:
    scores = scores_of(seed)
    best = scores.argmax(-1)
    hot = logits.temperature(scores, heat)
    for cut in (logits.top_k(hot, k), logits.top_p(hot, p), logits.min_p(hot, floor)):
        kept = cut.isfinite()
        assert kept.gather(1, best[:, None]).all()
        assert torch.equal(cut[kept], hot[kept])
        # What is kept is the upper end of the row: nothing cut scores above what is kept.
        assert (hot.masked_fill(kept, -1e9).amax(-1) <= cut.masked_fill(~kept, 1e9).amin(-1)).all()
    assert (logits.top_k(hot, k).isfinite().sum(-1) == min(k, VOCAB)).all()
    assert (hot.softmax(-1).masked_fill(~logits.top_p(hot, p).isfinite(), 0).sum(-1) >= p - 1e-5).all()


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=4), n=st.integers(1, 4))
def test_ngrams_do_not_repeat(rows: list[list[int]], n: int) -> None:
    width = max(map(len, rows))
    history = torch.tensor([[-1] * (width - len(r)) + r for r in rows])
    barred = ~logits.no_repeat_ngram(torch.zeros(len(rows), 5), history, n).isfinite()
    for row, out in zip(rows, barred):
        seen = {tuple(row[i : i + n]) for i in range(len(row) - n + 1)}
        want = {t for t in range(5) if len(row) >= n - 1 and (*row[len(row) - n + 1 :], t) in seen}
        assert set(out.nonzero().flatten().tolist()) == want


def test_draws_follow_the_distribution() -> None:
    chance = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    uniform = torch.from_numpy(np.random.default_rng(0).random(60_000))
    drawn = logits.draw(chance.log().expand(60_000, -1), uniform).bincount(minlength=6) / 60_000
    assert drawn[chance == 0].sum() == 0
    # Three standard deviations of a share of 60,000 draws.
    assert ((drawn - chance).abs() <= 3 * (chance * (1 - chance) / 60_000).sqrt()).all()
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert logits.draw(chance.log().expand(2, -1), edges).tolist() == [1, 4]
