"""Text (or ids) from a model: the public face of decoding."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from operator import index
from typing import Any, overload

import torch
from torch import Tensor

from dovetail.errors import UserError
from dovetail.parts.adaptable import routed
from dovetail.sampling.beam import Hypothesis, beam_search
from dovetail.sampling.captured import compiled
from dovetail.sampling.config import Sampling
from dovetail.sampling.decode import Decoding, ModelSteps, begins, check_options
from dovetail.sampling.drafts import Draft
from dovetail.sampling.layout import vector_layout
from dovetail.sampling.speculative import Speculation, SpeculativeDecoding
from dovetail.sampling.text import TextRow, Tokenizer

Prompts = Sequence[Sequence[int]]
LOOK = 8  # tokens between two looks at whether all rows have ended, where looking makes the host wait for a GPU


@dataclass(frozen=True)
class Generation:
    """tokens (B,n): the new ids, `pad` after a row's end. lengths (B,): how many are real, eos included.

    logprobs (B,n) fp32: the model's own log-probability of each, 0 where padded, or None. texts: when there
    is a tokenizer, each row's new text, without eos and cut before a stop string. speculation: where there was a draft,
    what it was good for in each row.
    """

    tokens: Tensor
    lengths: Tensor
    logprobs: Tensor | None = None
    texts: tuple[str, ...] | None = None
    speculation: tuple[Speculation, ...] | None = None


@overload
def generate(model: Any, tokenizer: Tokenizer, prompts: str, **sampling: Any) -> str: ...
@overload
def generate(model: Any, tokenizer: Tokenizer, prompts: list[str] | tuple[str, ...], **sampling: Any) -> list[str]: ...
@overload
def generate(model: Any, tokenizer: None, prompts: Tensor | Prompts, **sampling: Any) -> Tensor: ...
def generate(
    model: Any,
    tokenizer: Tokenizer | None,
    prompts: Any,
    *,
    draft: Draft | None = None,
    compile: bool = False,
    **sampling: Any,
) -> Any:
    """What comes after the prompts: the new text of each, or the new ids (B,n) without a tokenizer.

    An encoder-decoder reads the prompts as sources, and what comes is the target without its start id.

    prompts: a string or several; without a tokenizer ids (B,T), or lists of ids of uneven length.
    draft: what proposes tokens that the model then verifies several at a time (`PromptLookup`, `NgramDraft`,
    `DraftModel`); the text has the same distribution, and greedily, or with a draft that is not drawn, is the same.
    compile: single steps are compiled, and on CUDA replayed as one graph. The first call takes long; the model keeps what
    was made for further ones of as many rows (see `Captured`).
    sampling: the fields of `Sampling` (max_new_tokens, temperature, top_p, beams, stop, seed ...).
    On a CPU, one or two rows, but a single compiled one, read fp32 weights by columns, which stay for further calls as
    long as the model lives: as many bytes again, for models of a gibibyte at most.
    Raises SpecError for options that do not exist or contradict, UserError for a prompt beyond the context.
    """
    result = sample(model, tokenizer, prompts, Sampling.of(**sampling), draft=draft, compile=compile)
    if tokenizer is None:
        return result.tokens
    assert result.texts is not None
    return result.texts[0] if isinstance(prompts, str) else list(result.texts)


def sample(
    model: Any,
    tokenizer: Tokenizer | None,
    prompts: Any,
    sampling: Sampling,
    *,
    logprobs: bool = False,
    draft: Draft | None = None,
    compile: bool = False,
) -> Generation:
    """`generate` with all that is known of the result: ids, lengths, log-probabilities, texts, what a draft did."""
    rows = _ids(tokenizer, prompts)
    eos, pad = _ends(model, tokenizer, sampling)
    with _layout(model, len(rows), sampling, compile):
        if sampling.beams > 1 and draft is None:
            if logprobs:
                raise UserError("log-probabilities of single tokens with beams > 1", remedy="use beams=1")
            best = [found[0].ids for found in _search(model, rows, sampling, eos)]
            return _packed(
                best, None, pad, begins(model, rows), tokenizer, sampling, eos, next(model.parameters()).device
            )
        run = _begun(model, rows, sampling, draft, compile, eos, pad, logprobs)
        watch = (
            [TextRow(tokenizer, row, sampling.stop, eos) for row in begins(model, rows)]
            if tokenizer and sampling.stop
            else []
        )
        made: list[Tensor] = []
        chances: list[Tensor] = []
        lengths = torch.zeros(len(rows), dtype=torch.long, device=run.finished.device)
        early = bool(eos or watch)  # whether rows may end early
        every = LOOK if lengths.is_cuda and not watch else 1
        while not (len(made) >= sampling.max_new_tokens if len(made) % every else run.done):
            if early:
                lengths += ~run.finished
            made.append(run.step())
            if run.logprob is not None:
                chances.append(run.logprob)
            _watch(run, watch, made[-1])
    counts = lengths.tolist() if early else [len(made)] * len(rows)
    ids = [tuple(row[:n]) for row, n in zip(torch.stack(made, 1).tolist(), counts)]
    kept = torch.stack(chances, 1)[:, : max(counts)] if chances else None
    result = _packed(ids, kept, pad, begins(model, rows), tokenizer, sampling, eos, lengths.device)
    return replace(result, speculation=run.speculation) if isinstance(run, SpeculativeDecoding) else result


def search(model: Any, tokenizer: Tokenizer | None, prompts: Any, sampling: Sampling) -> list[list[Hypothesis]]:
    """Beam search's `beams` best for every prompt, best first, with their scores."""
    rows = _ids(tokenizer, prompts)
    with vector_layout(model, len(rows) * sampling.beams, sampling.max_new_tokens):
        return _search(model, rows, sampling, _ends(model, tokenizer, sampling)[0])


def stream(
    model: Any,
    tokenizer: Tokenizer | None,
    prompt: Any,
    *,
    draft: Draft | None = None,
    compile: bool = False,
    **sampling: Any,
) -> Generator[Any, None, Speculation | None]:
    """The pieces of one prompt's new text as they come, or its new ids (ints) without a tokenizer.

    Pieces hold whole characters and never the beginning of a stop string; together they are `generate`'s text. What the
    generator returns at its end is what a draft was good for, None without one.
    """
    options = Sampling.of(**sampling)
    rows = _ids(tokenizer, prompt if tokenizer is not None or isinstance(prompt, Tensor) else [prompt])
    if len(rows) != 1:
        raise UserError(f"{len(rows)} prompts to stream", remedy="stream one, or use generate for several")
    eos, pad = _ends(model, tokenizer, options)
    text = None if tokenizer is None else TextRow(tokenizer, begins(model, rows)[0], options.stop, eos)
    with _layout(model, 1, options, compile):
        run = _begun(model, rows, options, draft, compile, eos, pad)
        while not run.done:
            token = int(run.step()[0])
            if text is None:
                yield token
                continue
            piece = text.add(token)
            if text.stopped:
                run.finish(0)
            if piece:
                yield piece
    rest = "" if text is None else text.flush()
    if rest:
        yield rest
    return run.speculation[0] if isinstance(run, SpeculativeDecoding) else None


def _layout(model: Any, rows: int, sampling: Sampling, compile: bool) -> AbstractContextManager[None]:
    """How the weights lie meanwhile. Raises UserError for what cannot be compiled."""
    if compile and sampling.beams > 1:
        raise UserError("compiled steps with beams, which change rows", remedy="leave compile out, or set beams=1")
    if compile and rows == 1:
        return nullcontext()  # compiled products with one vector read rows
    return vector_layout(model, rows * sampling.beams, sampling.max_new_tokens)


def _begun(
    model: Any,
    rows: Prompts,
    sampling: Sampling,
    draft: Draft | None,
    compile: bool,
    eos: tuple[int, ...],
    pad: int,
    logprobs: bool = False,
) -> Decoding | SpeculativeDecoding:
    """Token by token, with a draft where there is one."""
    if draft is None:
        steps = compiled if compile else ModelSteps
        return Decoding(model, rows, sampling, eos=eos, pad=pad, logprobs=logprobs, steps=steps)
    if compile:
        raise UserError(
            "compiled steps beside a draft, whose tokens are verified several at a time", remedy="choose one"
        )
    return SpeculativeDecoding(model, rows, sampling, draft, eos=eos, pad=pad, logprobs=logprobs)


def _search(model: Any, rows: Prompts, sampling: Sampling, eos: tuple[int, ...]) -> list[list[Hypothesis]]:
    if routed(model):
        raise UserError(
            "beams, which change rows, while rows are routed to adapters",
            remedy="set beams=1, or choose the adapters of all rows (adapters.use) and search once for each choice",
        )
    with torch.inference_mode():
        steps = ModelSteps(model, rows, sampling.max_new_tokens)
        check_options(sampling, eos, steps.first.shape[-1])
        return beam_search(steps, steps.first, begins(model, rows), sampling, eos=eos)


def _watch(run: Decoding | SpeculativeDecoding, rows: list[TextRow], tokens: Tensor) -> None:
    """Ends the rows whose text now holds a stop string."""
    if not rows:
        return
    for i, (row, token) in enumerate(zip(rows, tokens.tolist())):
        if not row.stopped:
            row.add(token)
            if row.stopped:
                run.finish(i)


def _packed(
    ids: Sequence[tuple[int, ...]],
    logprobs: Tensor | None,
    pad: int,
    rows: Prompts,
    tokenizer: Tokenizer | None,
    sampling: Sampling,
    eos: tuple[int, ...],
    device: torch.device,
) -> Generation:
    width = max(len(row) for row in ids)
    tokens = torch.tensor([[*row, *[pad] * (width - len(row))] for row in ids], dtype=torch.long, device=device)
    texts = None
    if tokenizer is not None:
        texts = tuple(_text(tokenizer, prompt, row, sampling, eos) for prompt, row in zip(rows, ids))
    return Generation(tokens, torch.tensor([len(row) for row in ids], device=device), logprobs, texts)


def _text(
    tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], sampling: Sampling, eos: tuple[int, ...]
) -> str:
    row = TextRow(tokenizer, prompt, sampling.stop, eos)
    return "".join([*map(row.add, ids), row.flush()])


def _ids(tokenizer: Tokenizer | None, prompts: Any) -> list[list[int]]:
    """Rows of ids from what was given. Raises UserError."""
    if tokenizer is None:
        if isinstance(prompts, Tensor):
            if prompts.dim() != 2 or prompts.is_floating_point():
                raise UserError(
                    f"prompts have shape {tuple(prompts.shape)} and dtype {prompts.dtype}",
                    remedy="give integer ids of shape (batch, length)",
                )
            return prompts.tolist()
        try:
            if isinstance(prompts, str) or any(isinstance(row, str) for row in prompts):
                raise UserError("a text without a tokenizer", remedy="pass the tokenizer, or ids")
            # Plain ints, which are equal and hash alike wherever they came from: draws depend on them.
            rows = [row.tolist() if hasattr(row, "tolist") else row for row in prompts]
            return [[int(index(token)) for token in row] for row in rows]
        except TypeError:
            raise UserError(
                "prompts that are no rows of ids",
                remedy="give integer ids of shape (batch, length), or a list of ids for each prompt",
            ) from None
    texts = [prompts] if isinstance(prompts, str) else prompts
    if isinstance(texts, Tensor) or not all(isinstance(text, str) for text in texts):
        raise UserError("ids beside a tokenizer", remedy="pass texts, or tokenizer=None for ids")
    rows = [tokenizer.encode(text) for text in texts]
    return [row or ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) for row in rows]


def _ends(model: Any, tokenizer: Tokenizer | None, sampling: Sampling) -> tuple[tuple[int, ...], int]:
    """The ids that end a row, and the one that pads."""
    if tokenizer is None:
        if sampling.stop:
            raise UserError("stop strings without a tokenizer", remedy="pass the tokenizer, or end rows by eos ids")
        eos = sampling.eos or ()
        return eos, eos[0] if eos else 0
    eos = sampling.eos
    if eos is None:  # published defaults name ids that a smaller vocabulary lacks, which then end nothing
        vocab = getattr(model.spec, "decoder_vocab", None) or getattr(model.spec, "vocab", math.inf)
        eos = tuple(token for token in tokenizer.eos_ids if token < vocab)
    pad = tokenizer.pad_id
    return eos, pad if pad is not None else eos[0] if eos else 0
