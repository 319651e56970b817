"""Beam search over a step function: decoder-only models and encoder-decoders alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dovetail.errors import UserError
from dovetail.sampling import logits
from dovetail.sampling.config import Sampling
from dovetail.sampling.decode import Steps, left_padded

NEVER = -1e9  # score of a beam that must not be chosen, as peers have it


@dataclass(frozen=True)
class Hypothesis:
    """A finished beam. ids: its new tokens, the eos among them. score: log-probability / length**length_penalty."""

    ids: tuple[int, ...]
    score: float


@dataclass
class _Row:
    """One prompt's search: running beams with their scores, and the best finished ones."""

    beams: int
    running: list[tuple[int, ...]]
    scores: list[float]
    finished: list[Hypothesis] = field(default_factory=list)
    open: bool = True  # whether a finished beam can still enter

    def full(self) -> bool:
        return len(self.finished) == self.beams

    def finish(self, ids: tuple[int, ...], score: float) -> None:
        self.finished = sorted([*self.finished, Hypothesis(ids, score)], key=lambda h: -h.score)[: self.beams]

    def close(self, sampling: Sampling, made: int) -> None:
        """Closes the row once its best running beam cannot, by the rule of early_stopping, beat a finished one."""
        if not self.full():
            return
        longest = sampling.early_stopping == "never" and sampling.length_penalty > 0
        length = sampling.max_new_tokens if longest else made
        hope = self.scores[0] / length**sampling.length_penalty
        self.open = self.open and sampling.early_stopping is not True and hope > self.finished[-1].score


@torch.inference_mode()
def beam_search(
    steps: Steps,
    first: Tensor,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos: tuple[int, ...] = (),
) -> list[list[Hypothesis]]:
    """For each prompt its `beams` best continuations, best first.

    steps: holds B rows that have read their prompts; its rows become B·beams. first (B,V): the scores after
    the prompts. prompts: what penalties look back on (the decoder's side). Every step keeps the best
    (1 + len(eos))·beams candidates, so that enough go on when all that can end do. Ends at eos or max_new_tokens.
    Source: Graves 2012; length penalty after Wu et al. 2016 in the form length**penalty.
    Raises UserError where constraints leave no continuation.
    """
    B, V = first.shape
    K, device = sampling.beams, first.device
    spread = torch.arange(B, device=device).repeat_interleave(K)
    steps.reorder(spread)
    rows = [_Row(K, [()] * K, [0.0] + [NEVER] * (K - 1)) for _ in range(B)]
    history = left_padded(prompts, device, fill=-1)[0][spread] if logits.reads_history(sampling) else None
    scores = first[spread]
    for made in range(sampling.max_new_tokens):
        own = logits.constrain(scores.float().log_softmax(-1), history, sampling, made, eos)
        total = own.view(B, K, V) + torch.tensor([row.scores for row in rows], device=device)[..., None]
        best = total.flatten(1).topk(min(max(2, 1 + len(eos)) * K, K * V))
        last = made + 1 == sampling.max_new_tokens
        origin: list[int] = []
        for b, (row, values, places) in enumerate(zip(rows, best.values.tolist(), best.indices.tolist())):
            origin += [b * K + k for k in _advance(row, values, places, V, eos, sampling, made + 1, last)]
        if last or not any(row.open for row in rows):
            break
        index = torch.tensor(origin, device=device)
        tokens = torch.tensor([ids[-1] for row in rows for ids in row.running], device=device)
        if history is not None:
            history = torch.cat([history[index], tokens[:, None]], 1)
        steps.reorder(index)
        scores = steps(tokens)
    if any(not row.finished for row in rows):
        raise UserError(
            f"nothing is left to choose for a beam before {sampling.max_new_tokens} new tokens are made",
            remedy="suppress fewer tokens, give a larger no_repeat_ngram, or fewer max_new_tokens",
        )
    return [row.finished for row in rows]


def _advance(
    row: _Row,
    values: list[float],
    places: list[int],
    vocab: int,
    eos: tuple[int, ...],
    sampling: Sampling,
    made: int,
    last: bool,
) -> list[int]:
    """Moves one row on by a token; returns which beam each new running beam came from."""
    running: list[tuple[int, ...]] = []
    scores: list[float] = []
    origin: list[int] = []
    enter = row.open
    for rank, (value, place) in enumerate(zip(values, places)):
        k, token = divmod(place, vocab)
        ids = (*row.running[k], token)
        if token in eos or last:
            # Only the best K may end; what ends further down was there to leave enough that go on.
            if rank < row.beams and enter and value > NEVER / 2:
                row.finish(ids, value / made**sampling.length_penalty)
        elif len(running) < row.beams:
            running.append(ids)
            scores.append(value)
            origin.append(k)
    if not last:
        if len(running) < row.beams:
            raise UserError(
                f"only {len(running)} of {row.beams} beams can go on",
                remedy="use fewer beams than tokens to choose from",
            )
        row.running, row.scores = running, scores
        row.close(sampling, made)
    return origin
