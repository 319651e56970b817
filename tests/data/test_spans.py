"""Span corruption: the paper's example, the released lengths, masks by count and chance, rows that resume exactly."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

import dovetail as dt
from dovetail.data import Batches, Sampler, TokenSet
from dovetail.data.spans import Noise, SpanRows, sentinels
from dovetail.errors import DataError, SpecError
from dovetail.hub import Tokenizer
from dovetail.objectives.next_token import NextToken
from dovetail.objectives.span_corruption import SpanCorruption
from dovetail.training import fit, loop, preflight
from dovetail.training.recipe import Recipe
from dovetail.training.setup import load_tokenizer
from oracles import oracle_for
from training.small import recipe

RECIPE = Path(__file__).parents[2] / "recipes/span_corruption.yaml"
MARKS = tuple(range(999, 899, -1))
T5 = Noise(0.15, 3.0, MARKS, end=1)
MODEL: dict[str, Any] = {
    "kind": "encoder_decoder", "dim": 16,
    "encoder": {"depth": 1, "blocks": {"mixer": {"kind": "attention", "position": "t5_buckets"}, "dropout": 0.1}},
    "decoder": {"depth": 1, "blocks": {"mixer": {"kind": "attention", "position": "t5_buckets"},
                                       "cross": {"kind": "attention", "position": "none"}}},
}  # fmt: skip


def token_set(lengths: list[int]) -> TokenSet:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenSet(np.arange(10, offsets[-1] + 10, dtype=np.uint16), offsets, {})


@pytest.mark.parametrize("closing", ["sentinel", "end"])
def test_the_example_of_the_paper(closing: Any) -> None:
    """Figure 2: "Thank you for inviting me to your party last week", with "for inviting" and "last" left out."""
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]
    ids = np.arange(10, 10 + len(words))
    mask = np.array([word in ("for", "inviting", "last") for word in words])
    x, y, z = MARKS[:3]
    source, target = Noise(0.15, 3.0, MARKS, 1, closing).corrupt(ids, mask)
    assert source.tolist() == [10, 11, x, 14, 15, 16, 17, y, 19, 1]
    assert target.tolist() == [x, 12, 13, y, 18, z if closing == "sentinel" else 1]
    first = np.array([True] + [False] * 9)  # a stretch at either end has its sentinel too
    assert [a.tolist()[:2] for a in T5.corrupt(ids, first)] == [[x, 11], [x, 10]]
    assert T5.corrupt(ids, first[::-1])[0].tolist()[-2:] == [x, 1]


@oracle_for("objective", "span_corruption")
@pytest.mark.parametrize(
    ("inputs", "density", "span", "tokens", "targets"),
    [
        (512, 0.15, 3.0, 568, 114),  # T5's own, as published with random_spans_helper
        (1024, 0.15, 3.0, 1137, 229),
        (256, 0.15, 3.0, 284, 58),
        (512, 0.15, 10.0, 591, 99),
    ],
)
def test_lengths_are_those_of_random_spans_helper(
    inputs: int, density: float, span: float, tokens: int, targets: int
) -> None:
    noise = Noise(density, span, MARKS, end=1)
    assert noise.tokens(inputs) == tokens and noise.lengths(tokens) == (inputs, targets)
    # The published arithmetic, written out: one sentinel a stretch on either side, and one end.
    out = round(tokens * density)
    stretches = round(out / span)
    assert noise.lengths(tokens) == (tokens - out + stretches + 1, out + stretches + 1)


@given(
    st.integers(2, 200), st.sampled_from([0.1, 0.15, 0.5, 0.9]), st.sampled_from([1.0, 3.0, 10.0]), st.integers(0, 99)
)
@settings(max_examples=200, deadline=None)
def test_nothing_is_lost(length: int, density: float, span: float, seed: int) -> None:
    """Masks have the numbers they should, and source and target together are the text."""
    for closing, end in itertools.product(("end", "sentinel"), (1, None)):
        noise = Noise(density, span, tuple(range(999, 799, -1)), end, closing)  # type: ignore[arg-type]
        mask = noise.mask(length, np.random.default_rng(seed))
        out, spans, marks = noise.sizes(length)
        assert mask.shape == (length,) and mask.sum() == out and not mask[0] and mask[-1]
        assert (np.diff(mask.astype(int), prepend=0) == 1).sum() == spans
        text = np.arange(1, 1 + length) + 1
        source, target = noise.corrupt(text, mask)
        assert (len(source), len(target)) == noise.lengths(length)
        pieces: dict[int, list[int]] = {}
        for token in target.tolist():
            if token >= 800:
                pieces[token] = []
            elif token != 1:
                pieces[next(reversed(pieces))].append(token)
        assert len(pieces) == marks and list(pieces) == sorted(pieces, reverse=True)
        again = [t for token in source.tolist() if token != 1 for t in pieces.get(token, [token])]
        assert again == text.tolist()


def test_every_mask_is_equally_likely() -> None:
    """10 tokens, 4 left out in 2 stretches: (C(5,1) ways to keep 6 in two) x (C(3,1) to leave 4 out) = 15 masks."""
    noise, rng = Noise(0.4, 2.0, MARKS, 1), np.random.default_rng(0)
    drawn = 6000
    seen = Counter(noise.mask(10, rng).tobytes() for _ in range(drawn))
    assert len(seen) == 15
    spread = (drawn / 15 * (1 - 1 / 15)) ** 0.5
    assert all(abs(count - drawn / 15) < 4.5 * spread for count in seen.values())


def test_rows() -> None:
    tokens = token_set([30, 2, 41])
    packed, apart = (SpanRows(tokens, 20, 0, T5, seed=3, packed=p) for p in (True, False))
    size = T5.tokens(20)
    assert len(packed) == -(-73 // size) and packed.longest() == 0
    for rows in (packed, apart):
        for i in range(len(rows)):
            row = rows[i]
            assert len(row.source) <= 20 and row.source[-1] == row.labels[-1] == 1
            assert row.decoder.tolist() == [0, *row.labels[:-1].tolist()]
            assert all(np.array_equal(a, b) for a, b in zip(row, rows.drawn(i, 0), strict=True))
    kept = [{int(t) for t in (*apart[i].source, *apart[i].labels) if 10 <= t < 900} for i in range(len(apart))]
    edges = [30, 32]  # a row holds tokens of one document; that of two tokens gives none
    assert all(len({sum(t - 10 >= e for e in edges) for t in row}) == 1 for row in kept)
    assert set.union(*kept) == set(range(10, 83)) - {40, 41}
    with pytest.raises(DataError, match="pairs"):
        SpanRows(TokenSet(tokens.tokens, tokens.offsets, {}, np.zeros(3, np.uint32)), 20, 0, T5)
    with pytest.raises(DataError, match="sentinels"):
        SpanRows(tokens, 40, 0, Noise(0.15, 3.0, MARKS[:1], 1))
    with pytest.raises(DataError, match="rows of 2 tokens"):
        SpanRows(tokens, 2, 0, T5)


def test_an_end_token_of_the_text_is_not_written_twice() -> None:
    tokens = TokenSet(np.asarray([5, 6, 7, 8, 9, 1], np.uint16), np.asarray([0, 6]), {})
    row = SpanRows(tokens, 20, 0, T5, packed=False)[0]
    assert [row.source.tolist().count(1), row.labels.tolist().count(1)] == [1, 1]


def test_a_new_mask_every_epoch_and_the_same_after_resuming() -> None:
    rows = SpanRows(token_set([180]), 40, 0, T5)  # of two stretches or more: one alone is always the end
    batches = Batches(rows, Sampler(len(rows), 0), 3)
    seen = []
    for step in range(8):
        if step == 5:
            saved = batches.sampler.state()
        seen.append(batches.next())
    later = Batches(rows, Sampler(len(rows), 0), 3)
    later.sampler.load(saved)
    for batch in seen[5:]:
        again = later.next()
        assert batch.keys() == again.keys() and all(torch.equal(batch[k], again[k]) for k in batch)
    first = {tuple(row.tolist()) for b in seen for row in b["tokens"] if 10 in row}  # the row that begins the text
    assert len(first) > 1


def test_sentinels_of_a_tokenizer_and_without() -> None:
    words = {f"w{i}": i for i in range(6)}
    plain = Tokenizer(FastTokenizer(models.WordLevel(words, unk_token="w0")))
    assert sentinels(plain, 10, 3) == (9, 8, 7) and sentinels(plain, 8, 5) == (7, 6) and sentinels(plain, 6, 5) == ()
    extra = {"<extra_id_1>": 6, "<extra_id_0>": 7}
    named = Tokenizer(FastTokenizer(models.WordLevel(words | extra, unk_token="w0")))
    assert sentinels(named, 20, 5) == (7, 6) and sentinels(named, 20, 1) == (7,)


def small(folder: Path, **train: Any) -> dict[str, Any]:
    objective = {"kind": "span_corruption", "sentinels": 30}
    return recipe(folder, **train) | {"model": MODEL, "objective": objective}


def test_training_resumes_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several epochs of new masks at once, or stopped after an error and resumed: the same weights."""
    data = small(tmp_path, steps=8, batch=100, save_every=3)
    whole = fit(data | {"out": str(tmp_path / "whole")}, progress=False)
    assert whole.held_out is not None and np.isfinite(whole.held_out["nats"])
    one_step, cut = loop.Run.one_step, data | {"out": str(tmp_path / "cut")}

    def stops(run: Any) -> Any:
        if run.step == 4:
            raise KeyboardInterrupt
        return one_step(run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Run, "one_step", stops)
        fit(cut, progress=False)
    fit(cut, progress=False, resume=True)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert dt.load(tmp_path / "whole").spec.vocab == dt.load_tokenizer(tmp_path / "whole").vocab_size + 30


def test_the_loss_is_cross_entropy_of_the_rows() -> None:
    model = dt.build(MODEL | {"vocab": 1000, "decoder_start": 0}).double()
    rows = SpanRows(token_set([60]), 20, 0, T5)
    batch = Batches(rows, Sampler(len(rows), 0), 2).next()
    assert torch.equal(SpanCorruption()(model, batch).total(), NextToken()(model, batch).total())


def test_preflight_and_refusals(tmp_path: Path) -> None:
    found = preflight(small(tmp_path)).to_dict()
    assert found["labels"] > 0
    data = small(tmp_path)
    with pytest.raises(SpecError, match="reads one text"):
        fit(data | {"model": {"kind": "decoder", "dim": 16, "depth": 1}}, progress=False)
    vocab = load_tokenizer(Recipe.parse(data)).vocab_size
    with pytest.raises(SpecError, match="no id is left"):
        fit(data | {"model": MODEL | {"vocab": vocab}}, progress=False)
    for density in (1.5, 1.0):  # of 1, no text would be long enough for a row
        with pytest.raises(SpecError, match="density"):
            Recipe.parse(data | {"objective": {"kind": "span_corruption", "density": density}})


def test_the_shipped_recipe_learns_and_writes_a_t5(tmp_path: Path) -> None:
    """A few steps of recipes/span_corruption.yaml on the standard library; what it leaves transformers reads as T5."""
    from transformers import AutoModelForSeq2SeqLM

    small = [
        "data.train.limit=60000",
        "data.held_out.limit=6000",
        "tokenizer.train=400",
        f"data.cache={tmp_path}/cache",
    ]
    run = ["train.steps=12", "train.length=48", "train.warmup=2", "train.log_every=1", f"out={tmp_path}/out"]
    result = fit(RECIPE, [*small, *run, "train.device=cpu"], progress=False)
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.3
    ours = dt.load(tmp_path / "out")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert type(theirs).__name__ == "T5ForConditionalGeneration" and ours.spec.vocab == 500
    source, target = torch.randint(400, (2, 9)), torch.randint(400, (2, 7))
    with torch.no_grad():
        ref = theirs(input_ids=source, decoder_input_ids=target).logits
        assert (ours(source, target).logits - ref).abs().max() < 1e-4 * ref.abs().max()
    assert result.held_out is not None and result.held_out["nats"] < losses[0]
