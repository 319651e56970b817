"""Scores of generated text: the libraries' own numbers, and every reference of a prompt counted once."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from dovetail.data import train_tokenizer
from dovetail.data.pairs import encode_prompts
from dovetail.errors import DataError, SpecError, UserError
from dovetail.models import build
from dovetail.report.scores import Question, generate_scores, questions, score
from dovetail.sampling import Sampling, generate, search
from dovetail.spec import Spec

TEXTS = ["There is a pub named Zizzi near the river.", "The Mill serves cheap food", "nothing of it"]
REFERENCES = [
    ["Zizzi is a pub near the river.", "There is a riverside pub named Zizzi."],
    ["The Mill is a place with cheap food.", "Cheap foods are served at The Mill", "The Mill serves food"],
    ["A coffee shop."],
]
PAIRS = [("ab |||", " first"), ("a longer prompt |||", " second"), ("ab |||", " another"), ("c |||", " third")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> tuple[Any, Any]:
    """A tiny model with random weights, and its tokenizer."""
    texts = [prompt + completion for prompt, completion in PAIRS]
    tokenizer = train_tokenizer(texts, 270, tmp_path_factory.mktemp("tokenizer"))
    spec = {"kind": "decoder", "vocab": 270, "dim": 16, "depth": 2, "context": 40, "blocks": {"dropout": 0.5}}
    init = {"init": {"kind": "normal", "std": 0.5}}
    return build(Spec.parse("model", spec | init), seed=0), tokenizer


def test_scores_equal_the_libraries_own() -> None:
    found = score(TEXTS, REFERENCES)
    padded = [[refs[i] if i < len(refs) else None for refs in REFERENCES] for i in range(3)]
    bleu = BLEU().corpus_score(TEXTS, padded)  # type: ignore[arg-type]
    assert found.bleu == bleu.score and 1 < found.bleu < 99
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for kind in ("rouge1", "rouge2", "rougeL"):  # the best reference of each, alone
        best = [max(scorer.score(ref, text)[kind].fmeasure for ref in refs) for text, refs in zip(TEXTS, REFERENCES)]
        assert getattr(found, kind) == pytest.approx(np.mean(best), rel=1e-12) and 0 < getattr(found, kind) < 1
    assert (found.items, found.references) == (3, 6)
    assert "tok:13a" in found.signature and found.to_dict()["rougeL"] == found.rougeL


def test_a_text_is_compared_with_each_of_its_references() -> None:
    for i, refs in enumerate(REFERENCES):
        for ref in refs:
            perfect = score([ref if j == i else text for j, text in enumerate(TEXTS)], REFERENCES)
            assert perfect.rouge1 > score(TEXTS, REFERENCES).rouge1
    whole = score([refs[-1] for refs in REFERENCES], REFERENCES)
    assert whole.bleu == pytest.approx(100) and whole.rougeL == 1


def test_pairs_are_grouped_by_prompt() -> None:
    assert questions(PAIRS) == [
        Question("ab |||", ("first", "another")),
        Question("a longer prompt |||", ("second",)),
        Question("c |||", ("third",)),
    ]


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_of_the_prompts_alone(made: tuple[Any, Any], beams: int) -> None:
    model, tokenizer = made
    model.train()
    scores, texts = generate_scores(model, tokenizer, PAIRS, batch=2, beams=beams, max_new_tokens=9)
    assert model.training
    model.eval()
    prompts = ["ab |||", "a longer prompt |||", "c |||"]
    assert texts == [generate(model, tokenizer, p, beams=beams, max_new_tokens=9).strip() for p in prompts]
    assert scores == score(texts, [("first", "another"), ("second",), ("third",)])
    few, first = generate_scores(model, tokenizer, iter(PAIRS), limit=1, beams=beams, max_new_tokens=9)
    assert first == texts[:1] and (few.items, few.references) == (1, 2)


def test_texts_end_before_the_end_token(made: tuple[Any, Any]) -> None:
    model, tokenizer = made
    model.eval()
    prompt = encode_prompts(tokenizer, ["ab |||"])
    ids = generate(model, None, prompt, max_new_tokens=9)[0].tolist()
    end = ids[4]  # an ordinary token, taken for the end
    _, (text,) = generate_scores(model, tokenizer, PAIRS[:1], max_new_tokens=9, eos=end)
    assert text == tokenizer.decode(ids[: ids.index(end)]).strip()
    best = search(model, None, prompt, Sampling.of(max_new_tokens=9, beams=2, eos=end))[0][0].ids
    _, (text,) = generate_scores(model, tokenizer, PAIRS[:1], max_new_tokens=9, eos=end, beams=2)
    assert text == tokenizer.decode([i for i in best if i != end]).strip()


def test_long_prompts_are_cut_from_the_left(made: tuple[Any, Any]) -> None:
    model, tokenizer = made
    model.eval()
    long = "x" * 60 + "ab |||"
    _, texts = generate_scores(model, tokenizer, [(long, "a")], max_new_tokens=8)
    (ids,) = encode_prompts(tokenizer, [long])
    assert len(ids) > 40
    expected = generate(model, None, torch.tensor([ids[-32:]]), max_new_tokens=8, eos=tokenizer.eos_ids)[0].tolist()
    assert texts == [tokenizer.decode([i for i in expected if i not in tokenizer.eos_ids]).strip()]
    _, short = generate_scores(model, tokenizer, [(long, "a")], max_new_tokens=8, length=3)
    expected = generate(model, None, torch.tensor([ids[-3:]]), max_new_tokens=8, eos=tokenizer.eos_ids)[0].tolist()
    assert short == [tokenizer.decode([i for i in expected if i not in tokenizer.eos_ids]).strip()]


def test_what_cannot_be_scored_is_refused(made: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = made
    for texts, references in (([], []), (["a"], []), (["a"], [[]]), (["a"], [["b"], ["c"]])):
        with pytest.raises(DataError, match="references"):
            score(texts, references)
    with pytest.raises(DataError, match="references"):
        generate_scores(model, tokenizer, [], max_new_tokens=8)
    with pytest.raises(SpecError, match="beam"):
        generate_scores(model, tokenizer, PAIRS, beem=3)
    with pytest.raises(UserError, match="lower max_new_tokens"):
        generate_scores(model, tokenizer, PAIRS, max_new_tokens=40)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"sacrebleu[\s\S]*dovetail\[scores\]"):
        generate_scores(model, tokenizer, PAIRS)
