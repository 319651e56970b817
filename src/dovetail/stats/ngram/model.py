"""N-gram language models: fit, query in batches, measure, suggest, generate, draft."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dovetail.errors import DataError, UserError
from dovetail.stats.ngram.counts import Counts, count, count_file
from dovetail.stats.ngram.sentences import marked, marks_inside, sentences_of, stream_of, vocabulary_of
from dovetail.stats.ngram.smoothing import Smoothing, StupidBackoff, estimate, smoothing_of
from dovetail.stats.ngram.trie import Ints, Trie
from dovetail.stats.ngram.vocabulary import BOS, EOS, SPECIAL, UNK, Unit, Vocabulary

Floats = NDArray[np.float64]
_PIECE = 1 << 17  # ids scored at a time
_LONG = 1 << 14  # characters of a text from which its words are looked up all at once


class SentenceScore(NamedTuple):
    """logprob: nats, of the whole sentence with its </s>. tokens: how many, with </s>. oov: how many are unknown."""

    logprob: float
    tokens: int
    oov: int

    @property
    def perplexity(self) -> float:
        """exp(-logprob / tokens): the lower, the more plausible, whatever the length."""
        return _exp(-self.logprob / self.tokens)


class NGram:
    """A model of p(token | the n - 1 tokens before it), over a vocabulary with <unk> and </s>.

    Make one by `fit`, `fit_file` or `load_arpa`. Tokens are strings, or the integers of a tokenizer. A text (str)
    stands for its sentences where the model has a `unit`. Probabilities are float64, logarithms natural.
    notes: what was done where a formula of the smoothing has no value.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        trie: Trie,
        logp: Sequence[Floats],
        back: Sequence[Floats],
        *,
        smoothing: Smoothing | None = None,
        unit: Unit | None = None,
        notes: Sequence[str] = (),
    ):
        """logp, back: for each order natural logarithms (M,), of each n-gram and of its weight as a context."""
        self.vocabulary, self.trie, self.notes = vocabulary, trie, tuple(notes)
        self.unit: Unit | None = unit
        self.logp, self.back, self.smoothing = list(logp), list(back), smoothing
        self.form = smoothing.form if smoothing else "back-off"

    @property
    def order(self) -> int:
        """n of the longest n-grams."""
        return self.trie.order

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many n-grams of each order; <s> is among the unigrams."""
        return tuple(self.trie.size(n) for n in range(1, self.order + 1))

    # Making one

    @staticmethod
    def fit(
        tokens: Any,
        order: int = 3,
        smoothing: str | Smoothing = "modified-kneser-ney",
        *,
        unit: Unit | None = None,
        vocab: int | Sequence[str] | None = None,
        memory: int = 2**30,
    ) -> NGram:
        """From a sentence (a sequence of tokens), several (a sequence of those), or a text (str) with its `unit`.

        tokens: strings, or integers from 0 on: lists, a tensor or array (T,) or (sentences, T), or a memory-mapped
        file of ids (T,), which is read piece by piece. vocab: how many integers there are (the largest plus 1 unless
        given), or the strings to know; other tokens count as <unk>. smoothing: a name of `NAMES` or an object.
        memory: bytes that counting may use before it goes to disk. Raises UserError for options that do not fit,
        DataError for what holds no tokens.
        """
        chosen = smoothing_of(smoothing)
        sentences = sentences_of(tokens, unit)
        vocabulary = vocabulary_of(sentences, vocab)
        with count(stream_of(sentences, vocabulary), order, len(vocabulary), memory=memory) as counts:
            return NGram.of_counts(counts, vocabulary, chosen, unit)

    @staticmethod
    def fit_file(
        path: str | Path,
        order: int = 3,
        smoothing: str | Smoothing = "modified-kneser-ney",
        *,
        unit: Unit = "word",
        memory: int = 2**30,
        folder: str | Path | None = None,
    ) -> NGram:
        """From a UTF-8 text file that need not fit into memory; the n-grams have to. As `fit` and `count_file`."""
        chosen = smoothing_of(smoothing)
        vocabulary, counts = count_file(path, order, unit, memory=memory, folder=folder)
        with counts:
            return NGram.of_counts(counts, vocabulary, chosen, unit)

    @staticmethod
    def of_counts(
        counts: Counts, vocabulary: Vocabulary, smoothing: str | Smoothing, unit: Unit | None = None
    ) -> NGram:
        """From what `count` found: several smoothings need count only once."""
        chosen = smoothing_of(smoothing)
        found = estimate(counts, chosen)
        with np.errstate(divide="ignore"):
            logp, back = [np.log(p) for p in found.p], [np.log(b) for b in found.back]
        return NGram(vocabulary, found.trie, logp, back, smoothing=chosen, unit=unit, notes=found.notes)

    def save_arpa(self, path: str | Path) -> None:
        """Writes an ARPA file. Raises UserError for a smoothing that has no such form."""
        from dovetail.stats.ngram.arpa import save

        save(self, Path(path))

    @staticmethod
    def load_arpa(path: str | Path, *, unit: Unit | None = None, integers: bool = False) -> NGram:
        """Reads an ARPA file. integers: its words are the ids of a tokenizer. Raises DataError for a broken one."""
        from dovetail.stats.ngram.arpa import load

        return load(Path(path), unit, integers)

    # Asking it

    def encode(self, tokens: Any) -> Ints:
        """The model's own ids of tokens, for `score`: strings (T,) or an array of integers of any shape."""
        return self.vocabulary.encode(tokens)

    def score(self, ids: Any, begins: NDArray[np.bool_] | None = None) -> Any:
        """log p of every id given those before it in its row, in nats: ids (T,) or (B, T) of `encode` -> float64.

        The first of a row has no context; id 1 (<s>) begins a sentence and scores -inf or what a file says. begins: in
        the shape of ids, where nothing before is context either. Takes an array or a tensor and gives the same. Raises
        DataError for ids outside the vocabulary.
        """
        if isinstance(ids, torch.Tensor):
            return torch.from_numpy(self.score(ids.detach().cpu().numpy(), begins)).to(ids.device)
        given = np.asarray(ids, dtype=np.int64)
        if given.ndim not in (1, 2):
            raise DataError(f"ids of shape {given.shape}", remedy="give (tokens,) or (rows, tokens)")
        if given.size == 0:
            return np.zeros(given.shape)
        if int(given.min()) < 0 or int(given.max()) >= len(self.vocabulary):
            raise DataError(
                f"ids from {given.min()} to {given.max()}",
                remedy=f"give ids of encode, 0 to {len(self.vocabulary) - 1}",
            )
        first = np.zeros(given.size, dtype=bool) if begins is None else np.array(begins, dtype=bool).reshape(given.size)
        first[:: given.shape[-1]] = True
        return self._stream(np.ascontiguousarray(given).ravel(), first).reshape(given.shape)

    def _stream(self, ids: Ints, first: NDArray[np.bool_]) -> Floats:
        """log p of each id (T,) of a stream; first: where a row begins."""
        parts = []
        for start in range(0, len(ids), _PIECE):
            begin = max(0, start - self.order + 1)  # what the first of this piece see of the last one
            piece = slice(begin, start + _PIECE)
            head = first[piece].copy()
            head[0] = True
            parts.append(self._score(ids[piece], head)[start - begin :])
        return np.concatenate(parts)

    def _score(self, ids: Ints, first: NDArray[np.bool_]) -> Floats:
        out = self.logp[0][ids]
        if self.form == "add-k":
            return self._score_longest(ids, first)
        if isinstance(self.smoothing, StupidBackoff):
            deep, alpha = _depth(ids, first), math.log(self.smoothing.alpha)
            for n, (at, _, hit, rows) in enumerate(self.trie.ends(ids, first), 2):
                out[deep >= n - 1] += alpha
                out[at.take(hit)] = self.logp[n - 1].take(rows)
            return out
        for n, (at, context, hit, rows) in enumerate(self.trie.ends(ids, first), 2):
            out[at] += self.back[n - 2].take(context)
            out[at.take(hit)] = self.logp[n - 1].take(rows)
        return out

    def _score_longest(self, ids: Ints, first: NDArray[np.bool_]) -> Floats:
        """Add-k: from the longest context alone."""
        uniform = -math.log(len(self.vocabulary) - 1)
        deep = np.minimum(_depth(ids, first), self.order - 1)
        out = np.where(deep == 0, self.logp[0][ids], uniform)
        for n, (at, context, hit, rows) in enumerate(self.trie.ends(ids, first), 2):
            values = self.back[n - 2][context] + uniform
            values[hit] = self.logp[n - 1][rows]
            this = deep[at] == n - 1
            out[at[this]] = values[this]
        return out

    def logprob(self, context: Any, token: Any) -> Any:
        """log p(token | context), in nats: one (float), or a batch.

        context: a sequence of tokens, of which the last n - 1 count; "<s>" is the begin of a sentence. A batch, of
        integer tokens: (B, C) and (B,), arrays or tensors -> (B,) of the same sort. For batches of strings, `encode`
        them and use `score`.
        """
        if isinstance(context, (np.ndarray, torch.Tensor)) and context.ndim == 2:
            rows = np.concatenate(
                [self.encode(context)[:, -(self.order - 1) or context.shape[1] :], self.encode(token)[:, None]], 1
            )
            values = self.score(rows)[:, -1]
            return torch.from_numpy(values).to(context.device) if isinstance(context, torch.Tensor) else values
        ids = np.concatenate([self.encode(list(context))[-(self.order - 1) or len(context) :], self.encode([token])])
        return float(self.score(ids)[-1])

    def logprobs(self, tokens: Any, *, bos: bool = True, eos: bool = True) -> Floats:
        """log p of every token of the sentences, one after another, in nats.

        tokens: as in `fit`. bos: a sentence's first token is asked after <s>, else after nothing. eos: </s> is asked.
        """
        return self._scored(tokens, bos, eos)[1]

    def perplexity(self, tokens: Any, *, oov: bool = True, bos: bool = True, eos: bool = True) -> float:
        """exp of the mean of -log p over the tokens of one or several sentences; inf where one has probability 0.

        oov: whether unknown tokens count (each still stands as <unk> in the context of others). Otherwise as
        `logprobs`. Raises UserError for stupid back-off, whose scores are no probabilities, DataError where no token
        is left.
        """
        if self.form == "stupid":
            raise UserError("stupid back-off gives scores, not probabilities", remedy="fit another smoothing")
        ids, values = self._scored(tokens, bos, eos)
        if not oov:
            values = values[ids != UNK]
        if len(values) == 0:
            raise DataError("there are no tokens to score")
        return _exp(-float(values.mean()))

    def sentence_logprobs(self, tokens: Any) -> Floats:
        """log p of each sentence (S,) with its </s>, in nats; tokens: as in `fit`. Raises DataError for none."""
        ids, begins = self._flat(tokens)
        values = self._stream(ids, np.arange(len(ids)) == 0)
        values[begins] = 0  # <s> is not asked
        return np.add.reduceat(values, begins)

    def sentences(self, tokens: Any) -> list[SentenceScore]:
        """How plausible each sentence is; tokens: as in `fit`. Raises DataError where there is none."""
        ids, begins = self._flat(tokens)
        lengths = np.diff(begins, append=len(ids)) - 1
        unknown = np.add.reduceat(ids == UNK, begins, dtype=np.int64)
        return [*map(SentenceScore, self.sentence_logprobs(tokens).tolist(), lengths.tolist(), unknown.tolist())]

    def _scored(self, tokens: Any, bos: bool, eos: bool) -> tuple[Ints, Floats]:
        """(ids (T,) that were asked, their log p (T,))."""
        ids, _ = self._flat(tokens)
        keep = ids != BOS
        if not eos:
            keep &= ids != EOS
        if bos:
            return ids[keep], self._stream(ids, np.arange(len(ids)) == 0)[keep]
        first = np.concatenate([[False], ids[:-1] == BOS])[keep]
        return ids[keep], self._stream(ids[keep], first)

    def _flat(self, tokens: Any) -> tuple[Ints, Ints]:
        """Ids of all sentences one after another, each from its <s> to its </s>; and where the <s> are."""
        begin, end = SPECIAL[BOS], SPECIAL[EOS]
        if isinstance(tokens, str) and self.unit == "word":  # the same as below at once, or in one split
            found = self.vocabulary.lines(tokens) if len(tokens) >= _LONG else None
            if found is not None:
                return marked(*found)
            sentences = [line for line in tokens.split("\n") if line and not line.isspace()]
            flat = self.encode(f"{begin} {f' {end} {begin} '.join(sentences)} {end}".split())
        elif self.vocabulary.integers:
            sentences = sentences_of(tokens, self.unit)
            flat = np.concatenate([x for s in sentences for x in ([BOS], self.encode(s), [EOS])])
        else:
            sentences = sentences_of(tokens, self.unit)
            for sentence in sentences:
                self.encode(sentence[:1])  # refuses what is no string
            flat = self.encode([*itertools.chain.from_iterable(x for s in sentences for x in ((begin,), s, (end,)))])
        if not sentences:
            raise DataError("there are no tokens")
        begins = np.flatnonzero(flat == BOS)
        if len(begins) != len(sentences) or np.count_nonzero(flat == EOS) != len(sentences):
            raise marks_inside()
        return flat, begins

    # What comes next

    def distribution(self, context: Any) -> Floats:
        """p of every id (V,) after a context (a sequence of tokens; "<s>" begins a sentence); 0 for <s>.

        Scores of stupid back-off are divided by their sum.
        """
        return self._distribution(self.encode(list(context)))

    def _distribution(self, ids: Ints) -> Floats:
        ids = ids[-(self.order - 1) :] if self.order > 1 else ids[:0]
        if len(begins := np.flatnonzero(ids == BOS)):
            ids = ids[begins[-1] :]
        with np.errstate(under="ignore"):
            p = np.exp(self.logp[0])
            p[BOS] = 0
            for n in range(1, len(ids) + 1):
                row = int(self.trie.locate(ids[-n:, None])[0])
                if self.form == "add-k":
                    if n < len(ids):
                        continue
                    known = math.exp(self.back[n - 1][row]) if row >= 0 else 1.0
                    p = np.full(len(p), known / (len(p) - 1))
                    p[BOS] = 0
                elif isinstance(self.smoothing, StupidBackoff):
                    p *= self.smoothing.alpha
                elif row >= 0:
                    p *= math.exp(self.back[n - 1][row])
                if row >= 0 and (below := self.trie.children(n, row)).stop > below.start:
                    p[self.trie.keys[n - 1][below] % self.trie.vocab] = np.exp(self.logp[n][below])
        if not p.sum() > 0:
            raise DataError("nothing has a probability after this context", remedy="fit another smoothing")
        return p / p.sum() if self.form == "stupid" else p

    def suggest(self, context: Any, k: int = 5) -> list[tuple[Any, float]]:
        """The k likeliest next tokens (never <unk>) and their probabilities, likeliest first."""
        p = self.distribution(context)
        p[UNK] = 0
        best = np.argsort(-p, kind="stable")[:k]
        return list(zip(self.vocabulary.decode(best), p[best].tolist(), strict=True))

    def generate(
        self, context: Any = (), max_new_tokens: int = 64, *, bos: bool = True, temperature: float = 1.0,
        top_k: int | None = None, seed: int = 0,
    ) -> list[Any]:  # fmt: skip
        """New tokens after a context, drawn one by one until </s> (left out) or `max_new_tokens`; never <unk>.

        bos: the context begins a sentence. temperature: p ** (1 / temperature); 0 takes the likeliest.
        """
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise UserError(f"temperature {temperature}, top_k {top_k}", remedy="give 0 or more, and 1 or more")
        rng = np.random.default_rng(seed)
        ids = np.concatenate([np.array([BOS] if bos else [], np.int64), self.encode(list(context))])
        begin = len(ids)
        while len(ids) - begin < max_new_tokens:
            p = self._distribution(ids)
            p[UNK] = 0
            if top_k is not None and top_k < len(p):
                p[np.argpartition(-p, top_k)[top_k:]] = 0
            if temperature == 0:
                new = int(p.argmax())
            else:
                with np.errstate(divide="ignore"):
                    p = np.exp((np.log(p) - math.log(p.max())) / temperature)
                new = int(rng.choice(len(p), p=p / p.sum()))
            if new == EOS:
                break
            ids = np.append(ids, new)
        return self.vocabulary.decode(ids[begin:])

    def draft(self, tokens: Any, n: int) -> Any:
        """The n tokens that most likely follow, each the likeliest after the one before: drafts to be verified.

        tokens: a sequence -> a list of n; integer tokens (B, T), an array or tensor -> (B, n) of the same sort. Never
        <unk> or </s>. Raises UserError for n below 1.
        """
        if n < 1:
            raise UserError(f"a draft of {n} tokens", remedy="ask for 1 or more")
        if isinstance(tokens, (np.ndarray, torch.Tensor)) and tokens.ndim == 2:
            rows = np.stack([self._draft(row, n) for row in self.encode(tokens)]) - 3
            return torch.from_numpy(rows).to(tokens.device) if isinstance(tokens, torch.Tensor) else rows
        return self.vocabulary.decode(self._draft(self.encode(tokens), n))

    def _draft(self, ids: Ints, n: int) -> Ints:
        begin = len(ids)
        for _ in range(n):
            ids = np.append(ids, int(self._distribution(ids)[len(SPECIAL) :].argmax()) + len(SPECIAL))
        return ids[begin:]


def _depth(ids: Ints, first: NDArray[np.bool_]) -> Ints:
    """How many ids before each place its context may reach back to: to the row's begin, or to <s>, itself included."""
    at = np.arange(len(ids))
    return at - np.maximum.accumulate(np.where(first | (ids == BOS), at, 0))


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
