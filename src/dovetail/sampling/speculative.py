"""Speculative decoding: a draft proposes several tokens, one forward of the model verifies them all.

The text is the model's own: what is accepted, and what is drawn where a proposal is refused, have together exactly the
distribution that the model (with temperature, cuts and penalties) has without a draft. Source: Leviathan et al. 2023,
algorithm 1; Chen et al. 2023, algorithm 2.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import UserError
from dovetail.sampling import logits
from dovetail.sampling.config import Sampling
from dovetail.sampling.decode import begins, check_options, uniforms
from dovetail.sampling.drafts import Draft, Proposal, Task, constrained
from dovetail.sampling.reader import Reader
from dovetail.spec import entry_of
from dovetail.spec.paths import walk


@dataclass(frozen=True)
class Speculation:
    """What a draft was good for, in one row or several. proposed, accepted: its tokens. forwards: of the model after the
    prompt, counted in each row that took part. tokens: that these forwards decided, so that without a draft it is one a
    forward; the row's first token, which the prompt's own forward gives, is not among them."""

    proposed: int = 0
    accepted: int = 0
    forwards: int = 0
    tokens: int = 0

    @property
    def acceptance(self) -> float:
        """Accepted share of what was proposed; 0 where nothing was."""
        return self.accepted / max(self.proposed, 1)

    @property
    def tokens_per_forward(self) -> float:
        """0 where there was no forward after the prompt."""
        return self.tokens / max(self.forwards, 1)

    @staticmethod
    def total(rows: Iterable[Speculation]) -> Speculation:
        """Of several rows together."""
        found = [(row.proposed, row.accepted, row.forwards, row.tokens) for row in rows]
        return Speculation(*map(sum, zip(*found, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "proposed": self.proposed, "accepted": self.accepted, "forwards": self.forwards,
            "tokens_per_forward": round(self.tokens_per_forward, 3),
        }  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.accepted} of {self.proposed} drafted tokens accepted, "
            f"{self.tokens_per_forward:.2f} tokens a forward"
        )


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """min(1, p/q) of probabilities of the same shape, q above 0: with which chance a token drawn from q is kept."""
    return (p / q).clamp_max(1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(0, p - q) normalised, (...,V): what is drawn from where a token from q was refused. p where q is 0."""
    left = (p - q).clamp_min(0)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / total, p)  # where p is q nothing is refused


def verified(p: Tensor, q: Tensor, drafts: Tensor, keep: Tensor, other: Tensor) -> Tensor:
    """The tokens (R,) that replace `drafts` (R,), or are them, when those were drawn from q (R,V) and p (R,V) is wanted.

    keep, other (R,): uniform numbers in [0,1), for the two decisions. A row of zeros in q stands for no draft.
    """
    mine, theirs = (x.gather(-1, drafts[:, None]).squeeze(-1) for x in (p, q))
    kept = (theirs > 0) & (keep < acceptance(mine, theirs))
    return torch.where(kept, drafts, logits.draw(residual(p, q).log(), other))


class SpeculativeDecoding:
    """`Decoding` with a draft: the same steps, a token of every row each, though they are decided several at a time.

    Where the draft follows from the row alone (look-up, n-grams, anything greedy), a token is drawn as without one and
    the round goes on as long as that is what the draft says: algorithm 1 for a q that is certain. So the text for a seed
    is the very text without a draft. A draft that is drawn (a model's, above temperature 0) has the same distribution,
    but another text.

    Rows accept what they accept: those ahead of the others wait in a queue, each row's state forgets its own refused
    tokens, and rows that have ended take no part. Rounding differs from single steps as a prompt read at once does.
    speculation: what the draft was good for, for each row. Parameters, attributes and errors otherwise as `Decoding`.
    Raises UserError for a model that decodes approximately, whose verification would say something else than its steps.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        draft: Draft,
        *,
        eos: tuple[int, ...] = (),
        pad: int = 0,
        logprobs: bool = False,
    ):
        if sampling.beams > 1:
            raise UserError(f"a draft for beams={sampling.beams}", remedy="set beams=1, or leave the draft out")
        _check_exact(model)
        self.drawn = draft.drawn and sampling.temperature > 0
        self.uniform: Tensor | None = None  # (B, max_new_tokens), or (..., 3) where the draft is drawn too
        if sampling.temperature > 0:
            each = 3 if self.drawn else 1
            numbers = torch.from_numpy(uniforms(prompts, sampling.seed, each * sampling.max_new_tokens))
            self.uniform = numbers.unflatten(1, (-1, 3)) if self.drawn else numbers
        numbers = self.uniform[..., 0] if self.drawn and self.uniform is not None else None
        self.drafting = draft.begin(Task(model, prompts, sampling, eos, numbers))
        self.reader = Reader(model, prompts, sampling.max_new_tokens)
        check_options(sampling, eos, self.reader.first.shape[-1])
        self.sampling, self.draft, self.eos, self.pad, self.keep = sampling, draft, frozenset(eos), pad, logprobs
        self.begins = begins(model, prompts)
        self.outputs: list[list[int]] = [[] for _ in prompts]  # all that is decided
        self.ready: list[deque[tuple[int, float] | None]] = [deque() for _ in prompts]  # of it, what no step has given
        self.ended = [False] * len(prompts)  # as the steps have it
        self.counts = [[0, 0, 0, 0] for _ in prompts]
        self.made = 0
        self.logprob: Tensor | None = None

    @property
    def finished(self) -> Tensor:
        """(B,) bool."""
        return torch.tensor(self.ended, device=self.reader.first.device)

    @property
    def done(self) -> bool:
        """Nothing more will come."""
        return self.made >= self.sampling.max_new_tokens or (self.made > 0 and all(self.ended))

    @property
    def speculation(self) -> tuple[Speculation, ...]:
        return tuple(Speculation(*row) for row in self.counts)

    @torch.inference_mode()
    def step(self) -> Tensor:
        """The next token of every row, (B,) int64; `pad` for rows that had finished."""
        if any(not queue and not ended for queue, ended in zip(self.ready, self.ended, strict=True)):
            self._round()
        tokens, chances = [], []
        for r, queue in enumerate(self.ready):
            if self.ended[r]:
                tokens.append(self.pad)
                chances.append(0.0)
                continue
            found = queue.popleft()
            if found is None:
                raise UserError(
                    f"no_repeat_ngram={self.sampling.no_repeat_ngram} leaves no token to choose after {self.made} "
                    "new ones",
                    remedy="give a larger no_repeat_ngram, or fewer max_new_tokens",
                )
            tokens.append(found[0])
            chances.append(found[1])
            self.ended[r] = found[0] in self.eos
        device = self.reader.first.device
        if self.keep:
            self.logprob = torch.tensor(chances, device=device)
        self.made += 1
        return torch.tensor(tokens, device=device)

    def finish(self, row: int) -> None:
        """Ends a row from outside: a stop string was found."""
        self.ended[row] = True

    def _round(self) -> None:
        """Proposes, reads, decides: at least one token of every row that still goes on."""
        most = self.sampling.max_new_tokens
        active = [r for r, new in enumerate(self.outputs) if not self._over(r) and len(new) < most]
        limits = [0] * len(self.outputs)
        if not self.outputs[0]:  # the prompts' own forward has scored the first tokens
            self._decide(self.reader.first, active, Proposal([[] for _ in self.outputs]))
            return
        for r in active:
            limits[r] = min(self.draft.tokens, most - len(self.outputs[r]) - 1)
        proposal = Proposal([[] for _ in self.outputs])
        if any(limits):
            proposal = self.drafting.propose(self.outputs, limits)
        rows = [[*begin, *new] for begin, new in zip(self.begins, self.outputs, strict=True)]
        settled = [len(row) for row in rows]
        for row, drafts in zip(rows, proposal.tokens, strict=True):
            row += drafts
        wanted = [0] * len(rows)
        for r in active:
            wanted[r] = len(proposal.tokens[r]) + 1
        before, taken = [len(new) for new in self.outputs], self.reader.forwards
        own = self.reader(rows, settled, wanted)
        self._decide(own, active, proposal)
        for r in active:
            gained = len(self.outputs[r]) - before[r]
            self.counts[r][0] += len(proposal.tokens[r])
            self.counts[r][1] += sum(a == b for a, b in zip(self.outputs[r][before[r] :], proposal.tokens[r]))
            self.counts[r][2] += self.reader.forwards - taken
            self.counts[r][3] += gained

    def _over(self, r: int) -> bool:
        """Whether nothing more is to be decided for a row, though steps may still give what is."""
        new = self.outputs[r]
        stuck = bool(self.ready[r]) and self.ready[r][-1] is None
        return self.ended[r] or stuck or (bool(new) and new[-1] in self.eos)

    def _decide(self, own: Tensor, active: Sequence[int], proposal: Proposal) -> None:
        """Takes what the scores own (R,V) say: for each active row those after its newest token and after its drafts."""
        drafts = [proposal.tokens[r] for r in active]
        places = [(r, i) for r, tokens in zip(active, drafts, strict=True) for i in range(len(tokens) + 1)]
        made = [len(self.outputs[r]) + i for r, i in places]
        histories = [[*self.begins[r], *self.outputs[r], *proposal.tokens[r][:i]] for r, i in places]
        scores = constrained(own, histories, made, self.sampling, tuple(self.eos))
        tokens = self._chosen(scores, [r for r, _ in places], made, active, proposal)
        chances = [0.0] * len(places)
        if self.keep:
            chances = own.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1).tolist()
        barred = [False] * len(places)
        if self.sampling.no_repeat_ngram is not None:
            barred = scores.isneginf().all(-1).tolist()
        found = zip(tokens.tolist(), chances, barred, strict=True)
        for r, row_drafts in zip(active, drafts, strict=True):
            row = [next(found) for _ in range(len(row_drafts) + 1)]
            self._take(r, row, row_drafts)

    def _chosen(
        self, scores: Tensor, rows: Sequence[int], made: Sequence[int], active: Sequence[int], proposal: Proposal
    ) -> Tensor:
        """A token for each of scores (R,V), which stands if all the drafts of its row before it do."""
        if self.uniform is None:
            return scores.argmax(-1)
        scores = logits.warp(scores, self.sampling)
        numbers = self.uniform[list(rows), list(made)].to(scores.device)
        if not self.drawn:
            return logits.draw(scores, numbers)
        p = scores.softmax(-1, dtype=torch.float64)
        none = p.new_zeros(1, p.shape[-1])
        chances = proposal.chances or [none[:0]] * len(self.outputs)
        q = torch.cat([part.to(p.device) for r in active for part in (chances[r], none)])
        drafts = [token for r in active for token in (*proposal.tokens[r], 0)]
        return verified(p, q, torch.tensor(drafts, device=p.device), numbers[:, 1], numbers[:, 2])

    def _take(self, r: int, found: Sequence[tuple[int, float, bool]], drafts: Sequence[int]) -> None:
        """Row r goes on until its draft is wrong, its end comes, or nothing can be chosen."""
        for i, (token, chance, barred) in enumerate(found):
            if barred:
                if i == 0:
                    self.ready[r].append(None)
                return
            self.outputs[r].append(token)
            self.ready[r].append((token, chance))
            if token in self.eos or (i < len(drafts) and token != drafts[i]):
                return


def _check_exact(model: Any) -> None:
    """Raises UserError for parts whose chunks and steps differ by design."""
    for path, part in walk(model.spec):
        if part.kind == "ref":
            continue
        entry = entry_of(part)
        if entry.decode != "exact":
            raise UserError(
                f"a draft for a model whose {entry.category} {entry.kind!r} decodes approximately "
                f"({entry.decode.removeprefix('approximate: ')}): several tokens read at once would be scored "
                "otherwise than one by one",
                where=path,
                remedy="leave the draft out",
            )
