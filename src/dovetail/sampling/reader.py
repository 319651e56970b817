"""A model that reads rows which go on unevenly, and takes back what they no longer hold: what speculation stands on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import RunError
from dovetail.parts.adaptable import routed
from dovetail.parts.state import State
from dovetail.sampling.decode import begins, prefilled

Rows = Sequence[Sequence[int]]
BACKLOG = 8  # tokens that a state which cannot forget reads again with the next ones, before it reads them for good


class Reader:
    """A model over its state. Rows are given whole, and only what the state does not hold yet is read.

    A state that can be truncated forgets what a row no longer holds, each row its own. One that cannot (a recurrence,
    a window's ring) goes back to a snapshot of what was settled, and reads what came after it again, together with what
    is new: no forward more, but a longer one. first (B,V): the scores after the prompts. forwards: after those.
    new: tokens that there will be at most behind a prompt. Raises as `prefilled`.
    """

    def __init__(self, model: Any, prompts: Rows, new: int):
        self.model = model
        self.forward = model.decode if hasattr(model, "encode") else model
        self.state, self.first = prefilled(model, prompts, new)
        self.read = [list(row) for row in begins(model, prompts)]  # the decoder's side, as the state holds it
        self.forgets = _forgets(self.state, max(map(len, self.read)))
        self.saved: tuple[State, list[list[int]]] | None = None
        self.forwards = 0

    def __call__(self, rows: Rows, settled: Sequence[int], wanted: Sequence[int]) -> Tensor:
        """Scores (sum of wanted, V) float: of what follows each of the last `wanted` tokens of every row.

        rows: the decoder's side of each, from its begin. settled: how many of its tokens will stay. wanted: 0 for a row
        that waits, of which nothing is read.
        """
        active = [r for r, n in enumerate(wanted) if n]
        holds = [len(row) for row in self.read]
        for r in active:
            holds[r] = min(_agreement(self.read[r], rows[r]), len(rows[r]) - wanted[r])
        if any(held < len(row) for held, row in zip(holds, self.read, strict=True)):
            self._back(holds)
        if not self.forgets:
            self._save(rows, settled, active)
        return self._on(rows, active, wanted)

    def _on(self, rows: Rows, active: Sequence[int], wanted: Sequence[int]) -> Tensor:
        """Reads what the state lacks of the active rows, padded on the left where they differ."""
        new: list[Sequence[int]] = [[] for _ in rows]
        for r in active:
            new[r] = rows[r][len(self.read[r]) :]
            self.read[r] = list(rows[r])
        width = max(map(len, new))
        device = self.first.device
        tokens = torch.tensor([[0] * (width - len(part)) + list(part) for part in new], device=device)
        lengths = torch.tensor([len(part) for part in new])
        real = torch.arange(width) >= width - lengths[:, None]
        mask = None if bool(real.all()) else real.to(device)
        self.forwards += 1
        h = self.forward(tokens, attention_mask=mask, state=self.state, logits=False).last_hidden_state
        if routed(self.model):  # by whole rows, on the head too
            most = max(wanted)
            scores = self.model.head(h[:, width - most :])
            return torch.cat([scores[r, most - n :] for r, n in enumerate(wanted) if n]).float()
        return self.model.head(torch.cat([h[r, width - n :] for r, n in enumerate(wanted) if n])).float()

    def _back(self, holds: Sequence[int]) -> None:
        """Forgets all but the first `holds` tokens of each row."""
        if not self.forgets:
            assert self.saved is not None, "what is not settled is read behind a snapshot only"
            self.state, self.read = self.saved
            self.saved = None
            return
        even = len(set(holds)) == 1
        self.state.truncate(holds[0] if even else torch.tensor(holds, device=self.first.device))
        self.read = [row[:held] for row, held in zip(self.read, holds, strict=True)]

    def _save(self, rows: Rows, settled: Sequence[int], active: Sequence[int]) -> None:
        """A snapshot before the first token that may not stay; none is kept of what has become settled."""
        if all(len(self.read[r]) <= settled[r] for r in active):
            self.saved = None
        if self.saved is not None or all(len(rows[r]) <= settled[r] for r in active):
            return
        if any(settled[r] - 1 - len(self.read[r]) > BACKLOG for r in active):
            late = [r for r in active if settled[r] - 1 > len(self.read[r])]
            self._on(
                [row[: n - 1] for row, n in zip(rows, settled, strict=True)],
                late,
                [int(r in late) for r in range(len(rows))],
            )
        self.saved = self.state.snapshot(), [list(row) for row in self.read]


def _forgets(state: State, length: int) -> bool:
    """Whether tokens can be taken back at any time; length: of the longest row, so that trying it changes nothing."""
    if any(timeline.kept is not None for timeline in state.room.timelines.values()):
        return False  # a ring refuses once it has wrapped
    try:
        state.truncate(length)
    except RunError:
        return False
    return True


def _agreement(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens are the same."""
    n = min(len(one), len(other))
    if one[:n] == other[:n]:
        return n
    return next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)
