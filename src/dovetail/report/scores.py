"""Scores of generated text against references: BLEU by sacrebleu, ROUGE by rouge-score (the `scores` extra)."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dovetail.data.pairs import Pair, encode_prompts
from dovetail.errors import DataError, UserError
from dovetail.report.measure import evaluating
from dovetail.sampling import Sampling, sample

ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Question:
    """A prompt and every completion that is a right answer to it."""

    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """What generated text is worth. bleu: 0 to 100, of the corpus. rouge1, rouge2, rougeL: 0 to 1, F1, the mean over
    questions of the best reference's. signature: sacrebleu's, by which a BLEU can be compared.

    items: questions; references: all of them together. rouge_score: the library's version; words are stemmed.
    """

    bleu: float
    rouge1: float
    rouge2: float
    rougeL: float
    items: int
    references: int
    signature: str
    rouge_score: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def questions(pairs: Iterable[Pair]) -> list[Question]:
    """Pairs grouped by prompt, in the order in which prompts first come; space around references is taken off."""
    grouped: dict[str, list[str]] = {}
    for prompt, completion in pairs:
        grouped.setdefault(prompt, []).append(completion.strip())
    return [Question(prompt, tuple(references)) for prompt, references in grouped.items()]


def nearest(train: Iterable[Pair], prompts: Sequence[str]) -> list[str]:
    """The trivial rival of a model: for each prompt the completion of the training pair whose prompt shares most words
    with it, |a ∩ b| / |a ∪ b|, the first of equals."""
    known = [(frozenset(prompt.split()), completion.strip()) for prompt, completion in train]
    if not known:
        raise DataError("no pair to take a completion from", remedy="give a corpus that holds pairs")

    def closest(prompt: str) -> str:
        words = frozenset(prompt.split())
        return max(known, key=lambda pair: len(words & pair[0]) / max(1, len(words | pair[0])))[1]

    return [closest(prompt) for prompt in prompts]


def score(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Corpus-level scores of `texts` against the references of each: one or more, and as many as there are.

    BLEU (Papineni et al. 2002) by sacrebleu's defaults (Post 2018): tokens as in 13a, with case. ROUGE (Lin 2004) by
    rouge-score with Porter's stemmer. Raises DataError for texts without references, UserError without the libraries.
    """
    sacrebleu, rouge_scorer = _library("sacrebleu"), _library("rouge_score.rouge_scorer")
    if not texts or len(texts) != len(references) or not all(references):
        raise DataError(
            f"{len(texts)} texts and references for {sum(map(bool, references))}",
            remedy="give at least one text, and each at least one reference",
        )
    most = max(map(len, references))
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    bleu = sacrebleu.BLEU()
    total = bleu.corpus_score(list(texts), streams)
    scorer = rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=True)
    found = [scorer.score_multi(list(refs), text) for text, refs in zip(texts, references)]
    rouge = {kind: math.fsum(each[kind].fmeasure for each in found) / len(found) for kind in ROUGE}
    return Scores(
        bleu=total.score,
        **rouge,
        items=len(texts),
        references=sum(map(len, references)),
        signature=str(bleu.get_signature()),
        rouge_score=importlib.metadata.version("rouge-score"),
    )


def kept_of_prompts(model: Any, length: int | None = None, **sampling: Any) -> int | None:
    """How many ids of a prompt `generate_scores` keeps, None for all; raises what it would before it begins."""
    for name in ("sacrebleu", "rouge_score.rouge_scorer"):
        _library(name)
    context, new = getattr(model.spec, "context", None), Sampling.of(**sampling).max_new_tokens
    if length is None and context is not None:
        length = context - new
    if length is not None and length < 1:
        raise UserError(
            f"{new} new tokens leave no room for a prompt in a context of {context}", remedy="lower max_new_tokens"
        )
    return length


def generate_scores(
    model: Any,
    tokenizer: Any,
    pairs: Iterable[Pair],
    *,
    batch: int = 16,
    limit: int = 0,
    length: int | None = None,
    **sampling: Any,
) -> tuple[Scores, list[str]]:
    """What the model says to each different prompt of `pairs`, and its scores against all completions of that prompt.

    Greedy unless `sampling` asks otherwise (the fields of `Sampling`: max_new_tokens, beams, length_penalty ...); texts
    end at eos ids (the tokenizer's unless given), not at stop strings.
    batch: prompts at a time, of similar length. limit: only the first so many prompts (0: all). length: prompts of more
    ids are cut from the left, as in training; the model's context less max_new_tokens unless given (a model without one
    cuts nothing). Returns the scores and one text a prompt, in the order of the prompts, without space around it.
    Raises DataError for pairs that are empty, SpecError for options that do not exist, UserError without the libraries.
    """
    length = kept_of_prompts(model, length, **sampling)  # before the model works for hours
    options = Sampling.of(**{"eos": tuple(tokenizer.eos_ids)} | sampling)
    asked = questions(pairs)[: limit or None]
    rows = encode_prompts(tokenizer, [question.prompt for question in asked])
    rows = [row if length is None else row[-length:] for row in rows]
    texts = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        with evaluating(model):
            made = sample(model, None, [rows[i] for i in some], options)
        for i, ids, size in zip(some, made.tokens.tolist(), made.lengths.tolist(), strict=True):
            ended = size > 0 and ids[size - 1] in (options.eos or ())
            texts[i] = tokenizer.decode(ids[: size - ended]).strip()
    return score(texts, [question.references for question in asked]), texts


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name.partition('.')[0]} cannot be imported: {error}", remedy="pip install 'dovetail[scores]'"
        ) from None
