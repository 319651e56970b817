"""Lengths: what models, and training-free variants of them, make of texts longer than they were trained at.

Loss and token accuracy beside usefulness: a method that merely forgets what is far keeps its loss, and fails to find it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dovetail.errors import BuildError, DataError, SpecError
from dovetail.report.measure import TOKENS, by_position, check_rows, device_of, evaluating, token_scores
from dovetail.report.text import encoded, recut, rows_within
from dovetail.spec import override
from dovetail.spec.categories import CorpusPart
from dovetail.surgery import transplant
from dovetail.training.recipe import Section

SYMBOLS = 5  # of a passkey
CUE, ANSWER = 16, 16  # tokens of a copied passage that are said again, and that are asked
_TELL, _REMEMBER = "\nThe pass key is", ". Remember it.\n"


class Variant(Section):
    """A trained model changed without training. swap: overrides of its spec by path, in turn. truncate: it is shown
    windows of the trained length, which step by half of it, instead of whole rows: the trivial rival of all others."""

    name: str
    swap: dict[str, Any] = {}
    truncate: bool = False

    @model_validator(mode="after")
    def _changes(self) -> Variant:
        if not (self.swap or self.truncate):
            raise ValueError(f"variant {self.name!r} changes nothing; give swap, or truncate: true")
        return self


class Lengths(Section):
    """What every arm and each of its variants is asked, in rows of each length.

    text: real, with documents longer than the longest row. at: lengths in tokens, rising; the first is the trained one.
    tokens: about so many of the text are scored at every length, and as many repeated. questions: passkeys, and as many
    passages to copy, at every length. symbols: what passkeys are made of, each one token behind a space; a model can
    only say again what it has met in training, and novels have few digits. buckets: parts of the longest row whose
    losses are drawn. What is drawn of the text, and every question, depends on the seed and the text alone.
    """

    text: CorpusPart
    at: tuple[int, ...] = (512, 4096)
    tokens: int = Field(default=131_072, ge=64)
    questions: int = Field(default=64, ge=1)
    symbols: tuple[str, ...] = tuple("0123456789")
    buckets: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _rising(self) -> Lengths:
        if len(self.at) < 2 or self.at[0] < 2 or any(a >= b for a, b in pairwise(self.at)):
            raise ValueError(f"at is {list(self.at)}; give two or more lengths, the trained one first, rising")
        if len(self.symbols) < 2 or len(set(self.symbols)) < len(self.symbols):
            raise ValueError(f"symbols are {list(self.symbols)}; give two or more, all different")
        return self

    @property
    def titles(self) -> dict[str, str]:
        """Metric -> how it is called in tables."""
        out = {}
        for n in self.at:
            for which in ("", *([] if n == self.at[0] else [" repeated"])):
                out[f"accuracy@{n}{which}"] = f"token accuracy at {n}{which}, %"
                out[f"loss@{n}{which}"] = f"nats/token at {n}{which}"
            out[f"passkey@{n}"] = f"passkey symbols at {n}, %"
            out[f"copied@{n}"] = f"copied tokens at {n}, %"
        return out

    @property
    def smaller(self) -> frozenset[str]:
        """Metrics of which less is better."""
        return frozenset(name for name in self.titles if name.startswith("loss@"))

    @property
    def main(self) -> str:
        """The metric on which orders are claimed unless the study says another."""
        return f"accuracy@{self.at[-1]}"

    @property
    def brief(self) -> tuple[str, ...]:
        """Metrics of the table in a terminal."""
        n = self.at[-1]
        return (f"accuracy@{self.at[0]}", f"accuracy@{n} repeated", f"accuracy@{n}", f"passkey@{n}", f"copied@{n}")

    @property
    def note(self) -> str:
        """What the metrics mean, for the page."""
        return (
            f"Repeated: {self.at[0]} tokens of the text over and over. Passkey: {SYMBOLS} of {', '.join(self.symbols)}, said "
            "once anywhere in the text and asked at its end; share of them that are the likeliest of these, given those "
            f"before, so that chance is {100 / len(self.symbols):.0f}%. Copied: {CUE} tokens from the first {self.at[0] // 4} of the text are said again at its end; "
            f"share of the {ANSWER} tokens that followed them which greedy decoding would write, given those before. "
            "Variants are applied as they stand at every length, the trained one too."
        )


@dataclass(frozen=True)
class Exam:
    """Rows of one length n, (R, n + 1) each. repeated: None at the trained length."""

    text: Tensor
    repeated: Tensor | None
    passkeys: Tensor
    copied: Tensor


@dataclass(frozen=True)
class Wording:
    """A passkey's sentences as ids. tell: before the symbols, which `remember` follows; asked by `tell` again.
    symbols: (N,), the token of each."""

    tell: Tensor
    remember: Tensor
    symbols: Tensor

    @staticmethod
    def of(tokenizer: Any, symbols: Sequence[str]) -> Wording:
        """Raises DataError for a tokenizer without a token of its own for every symbol behind a space."""
        tell, remember = (tokenizer.encode(t, special=False) for t in (_TELL, _REMEMBER))
        ids = [tokenizer.encode(f"{_TELL} {symbol}", special=False)[len(tell) :] for symbol in symbols]
        space = tokenizer.encode(f"{_TELL} ", special=False)[len(tell) :]
        # Where a space is a token of its own, as before digits, it belongs to what is told.
        if all(one[: len(space)] == space for one in ids):
            tell, ids = tell + space, [one[len(space) :] for one in ids]
        for symbol, one in zip(symbols, ids, strict=True):
            if len(one) != 1:
                raise DataError(
                    f"the tokenizer has no token of its own for {symbol!r}, and cannot be asked for passkeys of it",
                    where="lengths.symbols",
                    remedy="give symbols that are one token each",
                )
        return Wording(torch.tensor(tell), torch.tensor(remember), torch.tensor(ids)[:, 0])


def exams(tokenizer: Any, asked: Lengths, seed: int) -> dict[int, Exam]:
    """What is asked at every length, always the same for a seed and a text: rows of the longest length from anywhere in
    the text, the same tokens recut for the shorter ones. Raises DataError for texts, or lengths, too short."""
    trained, longest = asked.at[0], asked.at[-1]
    documents = [encoded(tokenizer, text)[0] for text in asked.text.documents()]  # type: ignore[attr-defined]
    every = rows_within(documents, longest, sum(d.shape[0] for d in documents))
    draw = torch.Generator().manual_seed(seed)
    wanted = max(1, asked.tokens // longest)
    rows = every[torch.randperm(every.shape[0], generator=draw)[:wanted].sort().values]
    wording = Wording.of(tokenizer, asked.symbols)
    return {
        n: Exam(
            recut(rows, n),
            None if n == trained else repeated(rows[:, :trained], n),
            passkeys(rows, n, asked.questions, wording, draw),
            copied(rows, n, asked.questions, max(1, trained // 4), draw),
        )
        for n in asked.at
    }


def repeated(rows: Tensor, length: int) -> Tensor:
    """(R,T) over and over, cut to (R, length + 1)."""
    return rows.repeat(1, -(-(length + 1) // rows.shape[1]))[:, : length + 1]


def passkeys(rows: Tensor, length: int, count: int, wording: Wording, draw: torch.Generator) -> Tensor:
    """(count, length + 1): text into which a key is put anywhere, and which ends by its question and the key.

    rows: texts (R, > length) taken in turn. Raises DataError where the sentences leave no room for text.
    """
    frame = 2 * (wording.tell.shape[0] + SYMBOLS) + wording.remember.shape[0]
    room = length + 1 - frame
    if room < 1:
        raise DataError(f"a passkey takes {frame} tokens, a row has {length + 1}", remedy="give longer lengths")
    out = []
    for i in range(count):
        text = rows[i % rows.shape[0], :room]
        key = wording.symbols[torch.randint(len(wording.symbols), (SYMBOLS,), generator=draw)]
        at = int(torch.randint(room + 1, (), generator=draw))
        out.append(torch.cat([text[:at], wording.tell, key, wording.remember, text[at:], wording.tell, key]))
    return torch.stack(out)


def copied(rows: Tensor, length: int, count: int, within: int, draw: torch.Generator) -> Tensor:
    """(count, length + 1): text that ends by a passage which begins in its first `within` tokens.

    rows: texts (R, > length) taken in turn. Raises DataError where the text would not reach the passage's end.
    """
    size = CUE + ANSWER
    if length + 1 - size < within + size:
        raise DataError(
            f"rows of {length + 1} tokens cannot hold a passage of {size} twice, the first in {within}",
            remedy="give longer lengths",
        )
    out = []
    for i in range(count):
        text = rows[i % rows.shape[0]]
        at = int(torch.randint(within, (), generator=draw))
        out.append(torch.cat([text[: length + 1 - size], text[at : at + size]]))
    return torch.stack(out)


@torch.no_grad()
def endings(model: Any, rows: Tensor, count: int, among: Tensor | None = None, *, see: int | None = None) -> Tensor:
    """Whether each of the last `count` tokens of rows (R,T) is the likeliest, given all before: (R, count), on the CPU.

    All true is what greedy decoding would write. among: ids (K,) between which to choose; all unless given. see: only
    so many tokens before each row's last are shown.
    """
    check_rows(model, rows)
    rows = rows if see is None else rows[:, -(see + 1) :]
    out = []
    with evaluating(model):
        for some in rows.split(max(1, TOKENS // rows.shape[1])):
            here = some.to(device_of(model))
            hidden = model(here[:, :-1], logits=False).last_hidden_state
            out.append(likeliest(model.head(hidden[:, -count:]), here[:, -count:], among).cpu())
    return torch.cat(out)


def likeliest(logits: Tensor, labels: Tensor, among: Tensor | None = None) -> Tensor:
    """Whether labels (...) have the largest of logits (...,V), or the largest `among` ids (K,), which hold them."""
    if among is None:
        return logits.argmax(-1) == labels
    ids = among.to(logits.device)
    return ids[logits[..., ids].argmax(-1)] == labels


def measured(
    model: Any, asked: Mapping[int, Exam], symbols: Tensor, buckets: int, see: int | None = None
) -> dict[str, Any]:
    """metrics: name -> value (accuracies in %, losses in nats/token); curve: (from, to, nats/token) along the longest
    rows of text. see: tokens that are shown at a time, instead of whole rows."""
    metrics: dict[str, float] = {}
    nats = torch.empty(0)  # in the end those of the longest rows of text
    for n, exam in asked.items():
        for name, rows in ((f"{n} repeated", exam.repeated), (f"{n}", exam.text)):
            if rows is None:
                continue
            nats, right = token_scores(model, rows, see=see)
            metrics |= {f"accuracy@{name}": _percent(right), f"loss@{name}": float(nats.double().mean())}
        metrics[f"passkey@{n}"] = _percent(endings(model, exam.passkeys, SYMBOLS, symbols, see=see))
        metrics[f"copied@{n}"] = _percent(endings(model, exam.copied, ANSWER, see=see))
    return {"metrics": metrics, "curve": [(b.start, b.stop, b.nats) for b in by_position(nats, buckets)]}


def examine(
    model: Any, tokenizer: Any, asked: Lengths, variants: Sequence[Variant], seed: int
) -> dict[str, dict[str, Any]]:
    """What the model is worth as it is (""), and each of its variants: by name, as `measured` gives it.

    Raises SpecError for a model that was trained at another length, and a variant that would start weights anew.
    """
    papers, symbols = _papers(model, tokenizer, asked, seed), Wording.of(tokenizer, asked.symbols).symbols
    found = {"": measured(model, papers, symbols, asked.buckets)}
    for variant in variants:
        see = asked.at[0] if variant.truncate else None
        found[variant.name] = measured(_changed(model, variant, seed), papers, symbols, asked.buckets, see)
    return found


def check(model: Any, tokenizer: Any, asked: Lengths, variants: Sequence[Variant], seed: int) -> None:
    """Raises what `examine` would once `model` is trained: before the training, which costs more."""
    _papers(model, tokenizer, asked, seed)
    for variant in variants:
        _changed(model, variant, seed)


def _papers(model: Any, tokenizer: Any, asked: Lengths, seed: int) -> dict[int, Exam]:
    context = getattr(model.spec, "context", None)
    if context not in (None, asked.at[0]):
        raise SpecError(
            f"the lengths begin with {asked.at[0]}, and the model was trained at {context}",
            where="lengths.at",
            remedy=f"begin with {context}",
        )
    return exams(tokenizer, asked, seed)


def _changed(model: Any, variant: Variant, seed: int) -> Any:
    """What is asked in the variant's place: the model itself where it is only truncated."""
    if not variant.swap:
        return model
    where = f"variant {variant.name!r}"
    try:
        done = transplant(model, override(model.spec, variant.swap), seed=seed)
    except (SpecError, BuildError) as error:
        raise type(error)(error.what, where=f"{where}: {error.where}", remedy=error.remedy) from None
    if done.reinitialised:
        raise SpecError(
            f"a variant needs no training, and this one starts {done.reinitialised[0]} anew",
            where=where,
            remedy="make it an arm, and train it",
        )
    return done.model


def _percent(right: Tensor) -> float:
    return 100 * float(right.double().mean())
