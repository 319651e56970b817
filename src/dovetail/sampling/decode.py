"""Rows of tokens that grow together: prompts of uneven length in, one token a row and step out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dovetail.errors import RunError, UserError
from dovetail.parts.state import State
from dovetail.sampling import limits, logits
from dovetail.sampling.config import Sampling


class Steps(Protocol):
    """What a strategy needs of a model: scores of what comes next, and rows that can change places."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """The newest tokens (R,) -> float scores of their successors (R,V)."""
        ...

    def reorder(self, rows: Tensor) -> None:
        """Row r becomes what rows[r] was, (R',) int64."""
        ...


class Begun(Protocol):
    """Steps of prompts that were read: what `Decoding` needs. first (B,V): the scores after them. best (B,): the
    likeliest token by the newest scores, where that is known already."""

    first: Tensor
    best: Tensor | None

    def __call__(self, tokens: Tensor) -> Tensor: ...


class ModelSteps:
    """A model over its state. `first` (B,V) are the scores after the prompts.

    For a decoder-only model they begin its rows; an encoder-decoder reads them as sources, and its rows begin
    with its start id. new: tokens that will be made. Raises UserError for prompts that the model cannot take.
    """

    best: Tensor | None = None  # (R,) the likeliest token by the newest scores, where that is known already

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], new: int):
        self.forward = model.decode if hasattr(model, "encode") else model
        self.state, self.first = prefilled(model, prompts, new)

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.forward(tokens[:, None], state=self.state).logits[:, -1].float()

    def reorder(self, rows: Tensor) -> None:
        self.state.reorder(rows)


def prefilled(
    model: Any, prompts: Sequence[Sequence[int]], new: int, capacity: int | None = None
) -> tuple[State, Tensor]:
    """The state (room for `new` tokens more, or for `capacity` in all) and scores (B,V) after the prompts.

    Raises UserError for prompts that the model cannot take, RunError for scores that are NaN.
    """
    device = next(model.parameters()).device
    tokens, real = left_padded(prompts, device)
    rows, width = tokens.shape
    limits.check_ids(tokens, model.spec.vocab)
    if hasattr(model, "encode"):
        limits.check_lengths(model.spec, width, 0)
        limits.check_lengths(model.spec, 1, new)
        state = model.new_state(rows, capacity or 1 + new)
        model.encode(tokens, real, state=state)
        starts = torch.tensor(begins(model, prompts), device=device)
        out = model.decode(starts, state=state, logits=False)
    else:
        limits.check_lengths(model.spec, width, new)
        state = model.new_state(rows, capacity or width + new)
        out = model(tokens, attention_mask=real, state=state, logits=False)
    first: Tensor = model.head(out.last_hidden_state[:, -1]).float()
    if bool(first.isnan().any()):
        raise RunError("the model's logits are NaN", remedy="check the weights, or load them in a wider dtype")
    return state, first


def begins(model: Any, prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """What each row of the decoder begins with: the prompt, or an encoder-decoder's start id. Raises UserError."""
    if not hasattr(model, "encode"):
        return prompts
    if model.spec.decoder_start is None:
        raise UserError(
            "this encoder-decoder does not say what its targets begin with", remedy="set decoder_start in its spec"
        )
    return [[model.spec.decoder_start]] * len(prompts)


def check_options(sampling: Sampling, eos: tuple[int, ...], vocab: int) -> None:
    """Raises UserError for ids that the model does not have, or where none is left to choose."""
    limits.check_ids(torch.tensor([*sampling.suppress, *eos]), vocab)
    barred = {*sampling.suppress, *(eos if sampling.min_new_tokens else ())}
    if len(barred) >= vocab:
        raise UserError("every token is suppressed", remedy="leave at least one out of suppress")


class Decoding:
    """Greedy or drawn tokens, one `step` at a time; each row stops by itself and then only pads.

    prompts: B sequences of ids, none empty. eos: ids that end a row. pad: what a finished row is given.
    logprobs: keep, in `logprob` (B,), the model's own log-probability (fp32, before temperature and cuts) of
    each token chosen: what training computes for it. finished (B,) bool. steps: what reads the prompts and then
    gives scores, of (model, prompts, new). Raises UserError, RunError.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        eos: tuple[int, ...] = (),
        pad: int = 0,
        logprobs: bool = False,
        steps: Callable[[Any, Sequence[Sequence[int]], int], Begun] = ModelSteps,
    ):
        if sampling.beams > 1:
            raise UserError("beam search does not go token by token", remedy="use beam_search, or set beams=1")
        self.steps = steps(model, prompts, sampling.max_new_tokens)
        check_options(sampling, eos, self.steps.first.shape[-1])
        self.sampling, self.eos, self.pad, self.keep = sampling, eos, pad, logprobs
        self.ends_early = bool(eos)  # otherwise no row does, and nobody need look
        self.made = 0
        self.next: Tensor | None = None
        self.logprob: Tensor | None = None
        device = self.steps.first.device
        self.finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        self.ends = torch.tensor(eos, dtype=torch.long, device=device)
        self.history: Tensor | None = None
        if logits.reads_history(sampling):
            self.history = left_padded(begins(model, prompts), device, fill=-1)[0]
        self.uniform = None
        if sampling.temperature > 0:
            self.uniform = torch.from_numpy(uniforms(prompts, sampling.seed, sampling.max_new_tokens)).to(device)

    @property
    def done(self) -> bool:
        """Nothing more will come. Where rows can end early the host waits for the device to answer."""
        most = self.sampling.max_new_tokens
        return self.made >= most or (self.ends_early and self.made > 0 and bool(self.finished.all()))

    @torch.inference_mode()
    def step(self) -> Tensor:
        """The next token of every row, (B,) int64; `pad` for rows that had finished."""
        own = self.steps.first if self.next is None else self.steps(self.next)
        scores = logits.constrain(own, self.history, self.sampling, self.made, self.eos)
        if self.sampling.no_repeat_ngram is not None and bool((scores.isneginf().all(-1) & ~self.finished).any()):
            raise UserError(
                f"no_repeat_ngram={self.sampling.no_repeat_ngram} leaves no token to choose after {self.made} new ones",
                remedy="give a larger no_repeat_ngram, or fewer max_new_tokens",
            )
        if self.uniform is None:
            known = self.steps.best if scores is own else None
            token = scores.argmax(-1) if known is None else known
        else:
            token = logits.draw(logits.warp(scores, self.sampling), self.uniform[:, self.made])
        if self.keep:
            self.logprob = own.log_softmax(-1).gather(-1, token[:, None]).squeeze(-1).masked_fill(self.finished, 0.0)
        if self.made and self.ends_early:
            token = token.masked_fill(self.finished, self.pad)
        if self.eos:
            self.finished = self.finished | (token[:, None] == self.ends).any(-1)
        if self.history is not None:
            self.history = torch.cat([self.history, token[:, None]], 1)
        self.made += 1
        self.next = token
        return token

    def finish(self, row: int) -> None:
        """Ends a row from outside: a stop string was found."""
        self.finished, self.ends_early = self.finished.clone(), True
        self.finished[row] = True


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device, fill: int = 0) -> tuple[Tensor, Tensor | None]:
    """(B, longest) int64 with `fill` on the left, and the mask of real tokens, None where all are.

    Raises UserError for no prompts or an empty one.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise UserError(
            "an empty prompt: there is nothing to go on from" if lengths else "no prompts",
            remedy="give at least one token, a BOS for instance",
        )
    width = max(lengths)
    rows = torch.tensor([[fill] * (width - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    if min(lengths) == width:
        return rows, None
    return rows, torch.arange(width, device=device) >= width - torch.tensor(lengths, device=device)[:, None]


def uniforms(prompts: Sequence[Sequence[int]], seed: int | None, count: int) -> np.ndarray:
    """(B, count) fp64 in [0,1): a row's numbers depend on the seed, its prompt, and how many equal ones came before.

    So a row is drawn alike alone or in any batch, and copies of a prompt are drawn differently.
    """
    if seed is None:
        seed = int(np.random.SeedSequence().entropy)  # type: ignore[arg-type]
    seen: dict[tuple[int, ...], int] = {}
    rows = []
    for prompt in prompts:
        key = tuple(prompt)
        copy = seen[key] = seen.get(key, -1) + 1
        digest = hashlib.blake2b(f"{seed}:{copy}:{key}".encode(), digest_size=16).digest()
        rows.append(np.random.default_rng(int.from_bytes(digest, "little")).random(count))
    return np.stack(rows)
