"""What is done to the scores before a token is chosen. Pure functions of scores (R,V), -inf where a token is out.

history (R,N) int64 holds each row's tokens so far, prompt included, negative where there is none. The order
of `constrain` and then `warp` is that of transformers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dovetail.sampling.config import Sampling


def repetition_penalty(scores: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Scores of tokens in the row's history divided by `penalty` where positive, multiplied where negative.

    Source: Keskar et al. 2019 (CTRL), section 4.1, in the sign-aware form that is in use.
    """
    penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(_marked(history, scores.shape[-1]), penalised, scores)


def no_repeat_ngram(scores: Tensor, history: Tensor, size: int) -> Tensor:
    """Bars every token that would complete an n-gram that the row holds (Paulus et al. 2017, section 2.5)."""
    if history.shape[1] < size:
        return scores
    windows = history.unfold(1, size, 1)
    last = history[:, history.shape[1] + 1 - size :]
    repeats = (windows[..., :-1] == last[:, None]).all(-1) & (windows >= 0).all(-1)
    return scores.masked_fill(_marked(torch.where(repeats, windows[..., -1], -1), scores.shape[-1]), float("-inf"))


def suppress(scores: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Bars `ids`."""
    return scores.index_fill(-1, _on_device(ids, scores.device), float("-inf"))


def temperature(scores: Tensor, value: float) -> Tensor:
    """scores / value."""
    return scores / value


def top_k(scores: Tensor, k: int) -> Tensor:
    """Keeps the k best, and whatever ties with the last of them."""
    if k >= scores.shape[-1]:
        return scores
    return scores.masked_fill(scores < scores.topk(k).values[..., -1:], float("-inf"))


def top_p(scores: Tensor, p: float) -> Tensor:
    """Keeps the fewest best tokens whose probabilities sum to at least p (Holtzman et al. 2019, section 3.1)."""
    ascending, index = scores.sort(descending=False)
    out = ascending.softmax(-1).cumsum(-1) <= 1 - p
    out[..., -1] = False
    return scores.masked_fill(out.scatter(-1, index, out), float("-inf"))


def min_p(scores: Tensor, p: float) -> Tensor:
    """Bars tokens less than p times as likely as the best one (Nguyen et al. 2024, section 3)."""
    chance = scores.softmax(-1)
    best = chance.amax(-1, keepdim=True)
    return scores.masked_fill((chance < p * best) & (scores < scores.amax(-1, keepdim=True)), float("-inf"))


def constrain(scores: Tensor, history: Tensor | None, sampling: Sampling, made: int, eos: tuple[int, ...]) -> Tensor:
    """What holds for every strategy: penalties and bars. made: tokens chosen so far."""
    if sampling.repetition_penalty != 1.0:
        assert history is not None
        scores = repetition_penalty(scores, history, sampling.repetition_penalty)
    if sampling.no_repeat_ngram is not None:
        assert history is not None
        scores = no_repeat_ngram(scores, history, sampling.no_repeat_ngram)
    if eos and made < sampling.min_new_tokens:
        scores = suppress(scores, eos)
    return suppress(scores, sampling.suppress) if sampling.suppress else scores


def warp(scores: Tensor, sampling: Sampling) -> Tensor:
    """What shapes the distribution that a token is drawn from; temperature above 0."""
    if sampling.temperature != 1.0:
        scores = temperature(scores, sampling.temperature)
    if sampling.top_k is not None:
        scores = top_k(scores, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        scores = top_p(scores, sampling.top_p)
    if sampling.min_p is not None:
        scores = min_p(scores, sampling.min_p)
    return scores


def reads_history(sampling: Sampling) -> bool:
    """Whether `constrain` needs the tokens so far."""
    return sampling.repetition_penalty != 1.0 or sampling.no_repeat_ngram is not None


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """The token (R,) at which each row's cumulative probability passes uniform (R,) in [0,1).

    Inverting one uniform number a row, in fp64, keeps a row's draws apart from the others of its batch.
    """
    passed = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
    at = torch.searchsorted(passed, uniform[:, None] * passed[:, -1:], right=True)
    return at.squeeze(-1).clamp_max(scores.shape[-1] - 1)


@lru_cache(maxsize=64)
def _on_device(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Copied there once: a copy at every step would make the host wait for the device."""
    return torch.tensor(ids, device=device)


def _marked(ids: Tensor, vocab: int) -> Tensor:
    """(R,V) bool: True at each row's ids; negative ids mark nothing."""
    marks = torch.zeros(ids.shape[0], vocab + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter_(1, torch.where(ids < 0, vocab, ids), True)[:, :vocab]
