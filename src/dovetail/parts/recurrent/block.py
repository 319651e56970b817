"""The block of stacked recurrences: layers on top of each other, with no residual around the recurrence."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dovetail.parts.block import Block, BlockModule
from dovetail.parts.norm import NoNorm
from dovetail.parts.recurrent.rnn import Lstm
from dovetail.spec import Slot, register
from dovetail.spec.categories import FeedForwardPart, MixerPart, NormPart


@register(
    "block", "recurrent", oracle="torch.nn.LSTM of several layers", source="Zaremba et al. 2014, eq. 4 and figure 2"
)
class RecurrentBlock(Block):
    """mixer(norm(x)) takes the stream's place; cross and feedforward are added to it: x + f(norm(x))."""

    mixer: MixerPart = Lstm()
    feedforward: FeedForwardPart | None = None
    norm: NormPart = NoNorm()

    def build(self, slot: Slot) -> nn.Module:
        return RecurrentBlockModule(self, slot)


class RecurrentBlockModule(BlockModule):
    def join(self, x: Tensor, branch: str, run: Any) -> Tensor:
        out = self.dropout(run(getattr(self, f"norm_{branch}")(x)))
        return out if branch == "mixer" else x + out
