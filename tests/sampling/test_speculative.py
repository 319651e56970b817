"""Drafts: the same text greedily, the same distribution drawn, whatever the draft is worth."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import dovetail as dt
from dovetail.errors import UserError
from dovetail.sampling import (
    DraftModel,
    NgramDraft,
    PromptLookup,
    Sampling,
    Speculation,
    SpeculativeDecoding,
    sample,
    stream,
)
from dovetail.sampling.drafts import look_up
from dovetail.sampling.speculative import acceptance, residual, verified
from dovetail.stats import NGram

V = 13  # so small that drafts are often right
PROMPTS = [[5, 7, 9, 5, 7], [1], [8, 8, 3, 5, 6, 7, 12, 8, 8, 3], [9, 3]]


def decoder(mixer: Any = "attention", *, seed: int = 1, vocab: int = V, **more: Any) -> Any:
    """A random model that is sure of itself, so that rounding decides nothing."""
    spec = {"kind": "decoder", "vocab": vocab, "dim": 32, "depth": 2, "blocks": {"mixer": mixer}}
    model = dt.build(spec | more, seed=seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(6 if p.dim() == 2 and "head" in name else 2 if p.dim() == 2 else 1)
    return model.eval()


def near(model: Any, noise: float = 0.02) -> Any:
    """A draft that is often right: the model with a little noise on its weights."""
    other = dt.build(model.spec, seed=0)
    other.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(noise * p.std() * torch.randn_like(p))
    return other.eval()


def counted(vocab: int = V) -> NgramDraft:
    """An n-gram model of what a decoder itself says."""
    text = dt.generate(decoder(), None, PROMPTS, max_new_tokens=60, temperature=1.0, seed=0)
    return NgramDraft(NGram.fit(text.tolist(), 3, "witten-bell", vocab=vocab), tokens=3)


GQA = {"kind": "attention", "heads": 4, "kv_heads": 2, "position": "rope"}
RING = {"kind": "attention", "heads": 4, "mask": {"kind": "window", "size": 5}, "position": "rope"}
MIXERS = {"rope, GQA": GQA, "ring": RING, "recurrence": "gru", "gated linear": "gla"}


@pytest.fixture(scope="module", params=list(MIXERS))
def model(request: pytest.FixtureRequest) -> Any:
    return decoder(MIXERS[request.param])


def drafts_for(model: Any) -> list[Any]:
    return [
        PromptLookup(2, tokens=5),
        counted(),
        DraftModel(near(model), tokens=3),
        DraftModel(decoder("attention", seed=8)),
    ]


@pytest.mark.parametrize("which", range(4), ids=["lookup", "ngram", "near model", "other model"])
def test_greedy_is_plain_greedy(model: Any, which: int) -> None:
    """Token for token and row for row: uneven prompts, rows that end at different steps, a cut at every length."""
    draft = drafts_for(model)[which]
    for new, eos in ((24, (2, 11)), (1, ()), (9, ())):
        options = Sampling(max_new_tokens=new, eos=eos)
        want = sample(model, None, PROMPTS, options, logprobs=True)
        got = sample(model, None, PROMPTS, options, logprobs=True, draft=draft)
        assert got.tokens.tolist() == want.tokens.tolist() and got.lengths.tolist() == want.lengths.tolist()
        torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-4, atol=1e-4)
        assert got.speculation is not None and want.speculation is None
        for row, length in zip(got.speculation, got.lengths.tolist()):
            assert row.tokens == length - 1 and row.accepted <= row.proposed
            assert row.tokens <= row.accepted + row.forwards
    alone = sample(model, None, PROMPTS[2:3], Sampling(max_new_tokens=24), draft=draft)
    both = sample(model, None, PROMPTS, Sampling(max_new_tokens=24), draft=draft)
    assert alone.tokens[0].tolist() == both.tokens[2].tolist()


def test_a_perfect_draft_is_accepted_whole() -> None:
    model = decoder(GQA)
    result = sample(model, None, PROMPTS, Sampling(max_new_tokens=21), draft=DraftModel(model, tokens=4))
    assert result.speculation == (Speculation(proposed=16, accepted=16, forwards=4, tokens=20),) * 4
    assert Speculation.total(result.speculation).tokens_per_forward == 5.0
    drawn = Sampling(max_new_tokens=21, temperature=1.0, seed=3)
    exact = sample(model.double(), None, PROMPTS[:1], drawn, draft=DraftModel(model, tokens=4))
    assert exact.speculation is not None and exact.speculation[0].acceptance == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7, "min_new_tokens": 12, "eos": (2, 5)},
        {"no_repeat_ngram": 2, "suppress": (4, 9)},
        {"temperature": 1.3, "seed": 7},
        {
            "temperature": 0.8,
            "top_k": 6,
            "top_p": 0.9,
            "min_p": 0.02,
            "seed": 1,
            "repetition_penalty": 1.2,
            "eos": (3,),
        },
    ],
)
@pytest.mark.parametrize("which", [0, 1], ids=["lookup", "ngram"])
def test_a_draft_that_is_certain_leaves_every_text_as_it_is(options: dict[str, Any], which: int) -> None:
    """Penalties, bars and cuts see the drafts before them; drawn with the same numbers, the very same text."""
    model = decoder(GQA)
    sampling = Sampling(max_new_tokens=20, **options)
    want = sample(model, None, PROMPTS, sampling)
    got = sample(model, None, PROMPTS, sampling, draft=drafts_for(model)[which])
    assert got.tokens.tolist() == want.tokens.tolist()


def test_a_seed_means_the_same_in_any_batch() -> None:
    model = decoder(GQA)
    draft = DraftModel(near(model), tokens=3)
    for new in (20, 7):
        options = Sampling(max_new_tokens=new, temperature=1.0, top_p=0.95, seed=5)
        together = sample(model, None, PROMPTS, options, draft=draft).tokens.tolist()
        for prompt, row in zip(PROMPTS, together):
            assert sample(model, None, [prompt], options, draft=draft).tokens.tolist() == [row]


def tables(seed: int, order: int = 3, vocab: int = 4) -> dict[tuple[int, ...], Tensor]:
    """Distributions (V,) fp64 after every prefix of up to `order` tokens, some with zeros, as cuts leave them."""
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for n in range(order + 1):
        for prefix in itertools.product(range(vocab), repeat=n):
            p = torch.rand(vocab, dtype=torch.float64, generator=rng) ** 3
            p[int(torch.randint(vocab, (), generator=rng))] *= n % 2
            found[prefix] = p / p.sum()
    return found


@pytest.mark.parametrize("drafted", [1, 2, 3])
def test_the_distribution_is_the_target_s_by_enumeration(drafted: int) -> None:
    """Every outcome of drafting, keeping and drawing, weighted by its chance, round after round, in fp64."""
    length, vocab = 3, 4
    target, draft = tables(1), tables(2)

    def texts(prefix: tuple[int, ...]) -> dict[tuple[int, ...], float]:
        """Chances of all texts of `length` that go on from `prefix`."""
        if len(prefix) >= length:
            return {prefix[:length]: 1.0}
        found: dict[tuple[int, ...], float] = {}
        for guesses in itertools.product(range(vocab), repeat=min(drafted, length - len(prefix) - 1)):
            chance = 1.0
            for i, x in enumerate(guesses):
                chance *= float(draft[prefix + guesses[:i]][x])
            if not chance:
                continue
            for i, x in enumerate((*guesses, None)):
                here = prefix + guesses[:i]
                p = target[here]
                q = torch.zeros(vocab, dtype=torch.float64) if x is None else draft[here]
                keep = 0.0 if x is None else float(acceptance(p[x], q[x]))
                for y, r in enumerate(residual(p, q).tolist()):
                    if chance * (1 - keep) * r:
                        for text, rest in texts((*here, y)).items():
                            found[text] = found.get(text, 0.0) + chance * (1 - keep) * r * rest
                chance *= keep
        return found

    found = texts(())
    for text in itertools.product(range(vocab), repeat=length):
        want = 1.0
        for i, x in enumerate(text):
            want *= float(target[text[:i]][x])
        assert abs(found.get(text, 0.0) - want) < 1e-12


def test_decisions_follow_the_formula() -> None:
    """`verified`, integrated over its two numbers on a fine grid, keeps and replaces as often as it should."""
    p, q = (torch.tensor([x], dtype=torch.float64) for x in ([0.5, 0.3, 0.2, 0.0], [0.1, 0.6, 0.2, 0.1]))
    n = 400
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    keep, other = (x.flatten() for x in torch.meshgrid(grid, grid, indexing="ij"))
    for x in range(4):
        chosen = verified(p.expand(n * n, 4), q.expand(n * n, 4), torch.full((n * n,), x), keep, other)
        kept = float(acceptance(p[0, x], q[0, x]))
        want = (1 - kept) * residual(p, q)[0]
        want[x] += kept
        share = torch.bincount(chosen, minlength=4) / (n * n)
        torch.testing.assert_close(share.double(), want, rtol=0, atol=2 / n)
    bonus = verified(
        p.expand(n, 4), torch.zeros(n, 4, dtype=torch.float64), torch.zeros(n, dtype=torch.long), grid, grid
    )
    torch.testing.assert_close((torch.bincount(bonus, minlength=4) / n).double(), p[0], rtol=0, atol=2 / n)
    assert residual(p, p).tolist() == p.tolist()


@pytest.mark.parametrize("mixer", [GQA, RING], ids=["truncated", "snapshots"])
def test_drawn_drafts_give_the_model_s_distribution(mixer: Any) -> None:
    """Chi-square over three tokens of 2,000 rows against the model's own chances; fixed seed. The draft is no good."""
    from scipy.stats import chisquare

    model, prompt, rows = decoder(mixer, vocab=5), [1, 4, 2, 2, 0, 3], 2000
    draft = DraftModel(decoder(GQA, seed=9, vocab=5), tokens=2)
    options = Sampling(max_new_tokens=3, temperature=1.2, top_k=4, seed=2)
    result = sample(model, None, [prompt] * rows, options, draft=draft)
    texts = torch.tensor(list(itertools.product(range(5), repeat=3)))
    with torch.no_grad():
        scores = model(torch.cat([torch.tensor([prompt]).expand(125, 6), texts], 1)).logits[:, 5:-1].double() / 1.2
    scores = scores.masked_fill(scores < scores.topk(4).values[..., -1:], float("-inf"))
    want = scores.softmax(-1).gather(-1, texts[..., None]).squeeze(-1).prod(-1)
    seen = torch.bincount(result.tokens @ torch.tensor([25, 5, 1]), minlength=125)
    possible = want > 0
    assert int(seen[possible].sum()) == rows and float(want[possible].min()) * rows >= 5
    assert chisquare(seen[possible].numpy(), (want[possible] * rows).numpy()).pvalue > 0.01
    assert result.speculation is not None
    assert 0.2 < Speculation.total(result.speculation).acceptance < 0.95


def test_look_up_copies_the_latest_of_the_longest() -> None:
    row = [1, 2, 3, 4, 9, 2, 3, 5, 9, 3, 6, 2, 3]
    assert look_up(row, 3, 4) == [5, 9, 3, 6]  # 2 3 stood last before a 5; 3 alone, later, before a 6
    assert look_up(row, 1, 2) == [6, 2]
    assert look_up([4, 7, 8, 7, 8], 2, 5) == [7, 8, 7, 8, 7]  # goes on with what it copied
    assert look_up([1, 2, 3], 3, 4) == look_up([1], 3, 4) == []


def encoder_decoder(**more: Any) -> Any:
    side = {"depth": 1, "blocks": {"mixer": "attention"}}
    looks = {"depth": 1, "blocks": {"mixer": "attention", "cross": {"kind": "attention", "position": "none"}}}
    spec = {"kind": "encoder_decoder", "vocab": V, "dim": 16, "decoder_start": 0, "encoder": side, "decoder": looks}
    model = dt.build(spec | more, seed=2)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() == 2 else 1)
    return model.eval()


@pytest.mark.parametrize("which", ["lookup", "model", "other ids"])
def test_an_encoder_decoder_drafts_its_target(which: str) -> None:
    """Its prompts are copied from only where source and target share their ids."""
    apart = {"decoder_vocab": 7, "decoder_embedding": "token"}
    model = encoder_decoder(**(apart if which == "other ids" else {}))
    draft = DraftModel(near(model), tokens=3) if which == "model" else PromptLookup(tokens=3)
    want = dt.generate(model, None, PROMPTS, max_new_tokens=18, eos=(2,))
    assert dt.generate(model, None, PROMPTS, max_new_tokens=18, eos=(2,), draft=draft).tolist() == want.tolist()


def test_text_stops_where_it_does_without(tokenizer: Any) -> None:
    """Stop strings inside what a round decided, and pieces as they come."""
    model = decoder(GQA, vocab=400)
    prompts = ["the cat the cat", "def main():"]
    whole = dt.generate(model, tokenizer, prompts, max_new_tokens=30)
    stop = whole[0][4:6]
    for options in ({}, {"stop": stop}, {"stop": stop, "temperature": 1.0, "seed": 2}):
        want = dt.generate(model, tokenizer, prompts, max_new_tokens=30, **options)
        assert dt.generate(model, tokenizer, prompts, max_new_tokens=30, draft=PromptLookup(), **options) == want
    assert len(dt.generate(model, tokenizer, prompts, max_new_tokens=30, stop=stop)[0]) <= 4
    pieces = stream(model, tokenizer, prompts[0], max_new_tokens=30, draft=PromptLookup())
    assert "".join(pieces) == whole[0]


def test_what_cannot_be_is_refused_by_name() -> None:
    model = decoder(GQA)
    cases: Sequence[tuple[Any, Any, str]] = [
        (DraftModel(decoder(vocab=14)), {}, f"vocabulary of 14 for a model with one of {V}"),
        (DraftModel(encoder_decoder()), {}, "an encoder-decoder for a model that is a decoder alone"),
        (NgramDraft(NGram.fit([1, 2, 3], 2, vocab=14)), {}, f"over 14 ids for a model with a vocabulary of {V}"),
        (PromptLookup(), {"beams": 2}, "a draft for beams=2"),
    ]
    for draft, options, words in cases:
        with pytest.raises(UserError, match=words):
            dt.generate(model, None, PROMPTS, max_new_tokens=4, draft=draft, **options)
    with pytest.raises(UserError, match="tokens are strings"):
        NgramDraft(NGram.fit(["a", "b"], 2))
    with pytest.raises(UserError, match="tokens=0"):
        PromptLookup(tokens=0)
    dynamic = {"kind": "attention", "position": {"kind": "rope", "scaling": {"kind": "dynamic", "factor": 2.0}}}
    with pytest.raises(UserError, match="rope_scaling 'dynamic' decodes approximately"):
        SpeculativeDecoding(decoder(dynamic, context=8), PROMPTS, Sampling(), PromptLookup())
    with pytest.raises(UserError, match="leaves no token to choose after 5"):
        dt.generate(decoder(GQA, vocab=8), None, [[1, 2, 3]], max_new_tokens=6, no_repeat_ngram=1, draft=PromptLookup())
