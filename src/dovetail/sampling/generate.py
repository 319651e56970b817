"""Text (or ids) from a model: the public face of decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from dovetail.errors import UserError
from dovetail.sampling.beam import Hypothesis, beam_search
from dovetail.sampling.config import Sampling
from dovetail.sampling.decode import Decoding, ModelSteps, begins, check_options
from dovetail.sampling.layout import vector_layout
from dovetail.sampling.text import TextRow, Tokenizer

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Generation:
    """tokens (B,n): the new ids, `pad` after a row's end. lengths (B,): how many are real, eos included.

    logprobs (B,n) fp32: the model's own log-probability of each, 0 where padded, or None. texts: when there
    is a tokenizer, each row's new text, without eos and cut before a stop string.
    """

    tokens: Tensor
    lengths: Tensor
    logprobs: Tensor | None = None
    texts: tuple[str, ...] | None = None


@overload
def generate(model: Any, tokenizer: Tokenizer, prompts: str, **sampling: Any) -> str: ...
@overload
def generate(model: Any, tokenizer: Tokenizer, prompts: list[str] | tuple[str, ...], **sampling: Any) -> list[str]: ...
@overload
def generate(model: Any, tokenizer: None, prompts: Tensor | Prompts, **sampling: Any) -> Tensor: ...
def generate(model: Any, tokenizer: Tokenizer | None, prompts: Any, **sampling: Any) -> Any:
    """What comes after the prompts: the new text of each, or the new ids (B,n) without a tokenizer.

    An encoder-decoder reads the prompts as sources, and what comes is the target without its start id.

    prompts: a string or several; without a tokenizer ids (B,T), or lists of ids of uneven length.
    sampling: the fields of `Sampling` (max_new_tokens, temperature, top_p, beams, stop, seed ...).
    Raises SpecError for options that do not exist or contradict, UserError for a prompt beyond the context.
    """
    result = sample(model, tokenizer, prompts, Sampling.of(**sampling))
    if tokenizer is None:
        return result.tokens
    assert result.texts is not None
    return result.texts[0] if isinstance(prompts, str) else list(result.texts)


def sample(
    model: Any, tokenizer: Tokenizer | None, prompts: Any, sampling: Sampling, *, logprobs: bool = False
) -> Generation:
    """`generate` with all that is known of the result: ids, lengths, log-probabilities, texts."""
    rows = _ids(tokenizer, prompts)
    eos, pad = _ends(tokenizer, sampling)
    with vector_layout(model, len(rows) * sampling.beams, sampling.max_new_tokens):
        if sampling.beams > 1:
            if logprobs:
                raise UserError("log-probabilities of single tokens with beams > 1", remedy="use beams=1")
            best = [found[0].ids for found in _search(model, rows, sampling, eos)]
            return _packed(
                best, None, pad, begins(model, rows), tokenizer, sampling, eos, next(model.parameters()).device
            )
        run = Decoding(model, rows, sampling, eos=eos, pad=pad, logprobs=logprobs)
        watch = (
            [TextRow(tokenizer, row, sampling.stop, eos) for row in begins(model, rows)]
            if tokenizer and sampling.stop
            else []
        )
        made: list[Tensor] = []
        chances: list[Tensor] = []
        lengths = torch.zeros(len(rows), dtype=torch.long, device=run.finished.device)
        while not run.done:
            lengths += ~run.finished
            made.append(run.step())
            if run.logprob is not None:
                chances.append(run.logprob)
            _watch(run, watch, made[-1])
    ids = [tuple(row[:n]) for row, n in zip(torch.stack(made, 1).tolist(), lengths.tolist())]
    kept = torch.stack(chances, 1) if chances else None
    return _packed(ids, kept, pad, begins(model, rows), tokenizer, sampling, eos, lengths.device)


def search(model: Any, tokenizer: Tokenizer | None, prompts: Any, sampling: Sampling) -> list[list[Hypothesis]]:
    """Beam search's `beams` best for every prompt, best first, with their scores."""
    rows = _ids(tokenizer, prompts)
    with vector_layout(model, len(rows) * sampling.beams, sampling.max_new_tokens):
        return _search(model, rows, sampling, _ends(tokenizer, sampling)[0])


def stream(model: Any, tokenizer: Tokenizer | None, prompt: Any, **sampling: Any) -> Iterator[Any]:
    """The pieces of one prompt's new text as they come, or its new ids (ints) without a tokenizer.

    Pieces hold whole characters and never the beginning of a stop string; together they are `generate`'s text.
    """
    options = Sampling.of(**sampling)
    rows = _ids(tokenizer, prompt if tokenizer is not None or isinstance(prompt, Tensor) else [prompt])
    if len(rows) != 1:
        raise UserError(f"{len(rows)} prompts to stream", remedy="stream one, or use generate for several")
    eos, pad = _ends(tokenizer, options)
    text = None if tokenizer is None else TextRow(tokenizer, begins(model, rows)[0], options.stop, eos)
    with vector_layout(model, 1, options.max_new_tokens):
        run = Decoding(model, rows, options, eos=eos, pad=pad)
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


def _search(model: Any, rows: Prompts, sampling: Sampling, eos: tuple[int, ...]) -> list[list[Hypothesis]]:
    with torch.inference_mode():
        steps = ModelSteps(model, rows, sampling.max_new_tokens)
        check_options(sampling, eos, steps.first.shape[-1])
        return beam_search(steps, steps.first, begins(model, rows), sampling, eos=eos)


def _watch(run: Decoding, rows: list[TextRow], tokens: Tensor) -> None:
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
        if isinstance(prompts, str) or any(isinstance(row, str) for row in prompts):
            raise UserError("a text without a tokenizer", remedy="pass the tokenizer, or ids")
        return [list(row) for row in prompts]
    texts = [prompts] if isinstance(prompts, str) else prompts
    if isinstance(texts, Tensor) or not all(isinstance(text, str) for text in texts):
        raise UserError("ids beside a tokenizer", remedy="pass texts, or tokenizer=None for ids")
    rows = [tokenizer.encode(text) for text in texts]
    return [row or ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) for row in rows]


def _ends(tokenizer: Tokenizer | None, sampling: Sampling) -> tuple[tuple[int, ...], int]:
    """The ids that end a row, and the one that pads."""
    if tokenizer is None:
        if sampling.stop:
            raise UserError("stop strings without a tokenizer", remedy="pass the tokenizer, or end rows by eos ids")
        eos = sampling.eos or ()
        return eos, eos[0] if eos else 0
    eos = tokenizer.eos_ids if sampling.eos is None else sampling.eos
    pad = tokenizer.pad_id
    return eos, pad if pad is not None else eos[0] if eos else 0
