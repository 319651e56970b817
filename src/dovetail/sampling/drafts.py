"""Drafts: cheap guesses at the next tokens, which speculative decoding has the model verify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from dovetail.errors import UserError
from dovetail.sampling import logits
from dovetail.sampling.config import Sampling
from dovetail.sampling.decode import begins, left_padded
from dovetail.sampling.reader import Reader
from dovetail.stats import NGram

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Task:
    """What is to be continued. model: the target, which decides. eos: ids that end a row. uniform (B, max_new_tokens):
    the numbers in [0,1) that the draft of each new token is drawn by, or None where nothing is drawn."""

    model: Any
    prompts: Rows
    sampling: Sampling
    eos: tuple[int, ...]
    uniform: Tensor | None = None

    @property
    def vocab(self) -> int:
        """Ids that the target makes."""
        return _vocab(self.model)

    @property
    def contexts(self) -> Rows:
        """What new tokens may repeat: the prompts; nothing where an encoder reads ids of another vocabulary."""
        return self.prompts if self.model.spec.vocab == self.vocab else [()] * len(self.prompts)


@dataclass(frozen=True)
class Proposal:
    """tokens: a list for each row, empty where there is no guess. chances: where they were drawn, a tensor (d,V) fp64 for
    each row, the distribution of each of its d tokens; None where they follow from the row alone."""

    tokens: list[list[int]]
    chances: list[Tensor] | None = None


class Drafting(Protocol):
    """A draft at work on a task."""

    def propose(self, outputs: Rows, limits: Sequence[int]) -> Proposal:
        """outputs: the new tokens of each row so far. limits: how many may be proposed for it, 0 for none."""
        ...


class Draft(Protocol):
    """tokens: at most so many are proposed at a time. drawn: whether a draft for sampled text is itself sampled."""

    drawn: ClassVar[bool]

    @property
    def tokens(self) -> int: ...

    def begin(self, task: Task) -> Drafting:
        """Raises UserError for a target that the draft does not fit."""
        ...


@dataclass(frozen=True)
class PromptLookup:
    """Where the row's last n tokens stood before, in the prompt or the new text, what followed them there follows again.

    ngram: n to begin with; where there is no such place, n - 1, and so on. The latest place is taken. It costs next to
    nothing, and helps where text repeats itself: summaries, edits, code. Source: Saxena 2023, "Prompt lookup decoding".
    """

    ngram: int = 3
    tokens: int = 8
    drawn: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_count("ngram", self.ngram)
        _check_count("tokens", self.tokens)

    def begin(self, task: Task) -> Drafting:
        return _Looking(self, task)


class _Looking:
    def __init__(self, draft: PromptLookup, task: Task):
        self.draft, self.contexts = draft, task.contexts

    def propose(self, outputs: Rows, limits: Sequence[int]) -> Proposal:
        rows = zip(self.contexts, outputs, limits, strict=True)
        return Proposal([look_up([*given, *new], self.draft.ngram, n) if n else [] for given, new, n in rows])


def look_up(row: Sequence[int], ngram: int, count: int) -> list[int]:
    """`count` tokens that follow where the last n <= ngram of `row` stood before, n as large as there is such a place.

    A copy that reaches the row's end goes on with what it has copied itself. Empty where the last token is new.
    """
    ids = np.asarray(row)
    places = np.flatnonzero(ids[:-1] == ids[-1])  # of the last token of each n-gram that fits
    for n in range(2, ngram + 1):
        longer = places[places >= n - 1]
        longer = longer[ids[longer - n + 1] == ids[len(ids) - n]]
        if not len(longer):
            break
        places = longer
    if not len(places):
        return []
    back = len(row) - 1 - int(places[-1])
    grown = list(row)
    for _ in range(count):
        grown.append(grown[-back])
    return grown[len(row) :]


@dataclass(frozen=True)
class NgramDraft:
    """The likeliest continuation by an n-gram model over the target's token ids (`stats.NGram.draft`).

    model: fitted on ids, `NGram.fit(ids, order, vocab=target.spec.vocab)`, or read by `NGram.load_arpa(integers=True)`.
    """

    model: NGram
    tokens: int = 4
    drawn: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_count("tokens", self.tokens)
        if not self.model.vocabulary.integers:
            raise UserError(
                "an n-gram draft whose tokens are strings", remedy="fit it on the ids that the model's tokenizer gives"
            )

    def begin(self, task: Task) -> Drafting:
        size, vocab = self.model.vocabulary.size, task.vocab
        if size > vocab:
            raise UserError(
                f"an n-gram draft over {size} ids for a model with a vocabulary of {vocab}",
                remedy="fit it on the ids that this model's tokenizer gives",
            )
        return _Counting(self, task)


class _Counting:
    def __init__(self, draft: NgramDraft, task: Task):
        self.model, self.contexts = draft.model, task.contexts
        self.known: dict[tuple[int, ...], int] = {}  # context -> the likeliest next token

    def propose(self, outputs: Rows, limits: Sequence[int]) -> Proposal:
        made = []
        seen = self.model.order - 1
        for given, new, count in zip(self.contexts, outputs, limits, strict=True):
            row = [*given[-seen:], *new][-seen:] if seen else []
            begin = len(row)
            for _ in range(count):
                context = tuple(row[len(row) - min(seen, len(row)) :])
                if context not in self.known:
                    self.known[context] = self.model.draft(list(context), 1)[0]
                row.append(self.known[context])
            made.append(row[begin:])
        return Proposal(made)


@dataclass(frozen=True)
class DraftModel:
    """A smaller model with the target's vocabulary. It is sampled as the target is, and greedy where that is.

    Source: Leviathan et al. 2023; Chen et al. 2023.
    """

    model: Any
    tokens: int = 4
    drawn: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_count("tokens", self.tokens)

    def begin(self, task: Task) -> Drafting:
        mine, theirs = _vocab(self.model), task.vocab
        if mine != theirs:
            raise UserError(
                f"a draft model with a vocabulary of {mine} for a model with one of {theirs}",
                remedy="take a draft with the same tokenizer, or --draft lookup, which needs none",
            )
        kinds = ["an encoder-decoder" if hasattr(m, "encode") else "a decoder alone" for m in (self.model, task.model)]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"a draft that is {kinds[0]} for a model that is {kinds[1]}", remedy="take a draft of the model's kind"
            )
        return _Reading(self.model, task)


class _Reading:
    def __init__(self, model: Any, task: Task):
        self.task = task
        self.reader = Reader(model, task.prompts, task.sampling.max_new_tokens)
        self.begins = begins(model, task.prompts)

    def propose(self, outputs: Rows, limits: Sequence[int]) -> Proposal:
        sampling, uniform = self.task.sampling, self.task.uniform
        rows = [[*begin, *new] for begin, new in zip(self.begins, outputs, strict=True)]
        settled = [len(row) for row in rows]
        made = [len(new) for new in outputs]
        chances: list[list[Tensor]] = [[] for _ in rows]
        for i in range(max(limits)):
            active = [r for r, n in enumerate(limits) if n > i]
            own = self.reader(rows, settled, [int(n > i) for n in limits])
            scores = constrained(own, [rows[r] for r in active], [made[r] + i for r in active], sampling, self.task.eos)
            if uniform is None:
                tokens = scores.argmax(-1)
            else:
                scores = logits.warp(scores, sampling)
                numbers = torch.stack([uniform[r, made[r] + i] for r in active]).to(scores.device)
                tokens = logits.draw(scores, numbers)
                for r, p in zip(active, scores.softmax(-1, dtype=torch.float64), strict=True):
                    chances[r].append(p)
            for r, token in zip(active, tokens.tolist(), strict=True):
                rows[r].append(token)
        tokens = [row[n:] for row, n in zip(rows, settled, strict=True)]
        if uniform is None:
            return Proposal(tokens)
        none = self.reader.first.new_zeros(0, self.reader.first.shape[-1], dtype=torch.float64)
        return Proposal(tokens, [torch.stack(p) if p else none for p in chances])


def constrained(scores: Tensor, rows: Rows, made: Sequence[int], sampling: Sampling, eos: tuple[int, ...]) -> Tensor:
    """`logits.constrain` of scores (R,V) whose rows (the decoder's side of each, and how many of it are new) differ."""
    history = left_padded(rows, scores.device, fill=-1)[0] if logits.reads_history(sampling) else None
    scores = logits.constrain(scores, history, sampling, sampling.min_new_tokens, eos)
    if not eos or min(made) >= sampling.min_new_tokens:
        return scores
    early = torch.tensor([n < sampling.min_new_tokens for n in made], device=scores.device)
    return torch.where(early[:, None], logits.suppress(scores, eos), scores)


def _vocab(model: Any) -> int:
    return getattr(model.spec, "decoder_vocab", None) or model.spec.vocab


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"a draft with {name}={value}", remedy="give 1 or more")
