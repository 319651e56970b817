"""From the encoder's last states to the decoder's first: sequence-to-sequence as it began (Sutskever et al. 2014)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dovetail.errors import BuildError, RunError
from dovetail.parts.recurrent.rnn import RecurrentModule
from dovetail.parts.state import LayerState


class Flowing:
    """A recurrence's state outside of decoding: where one forward starts and where it ended, gradients and all.

    Start and end are kept apart, so that activation checkpointing can run a block twice. Tensors by name, (B,hidden).
    """

    def __init__(self, start: dict[str, Tensor]):
        self.start = start
        self.end = dict(start)  # where there is nothing to read

    def __getitem__(self, name: str) -> Tensor:
        return self.start[name]

    def update(self, **tensors: Tensor) -> None:
        self.end = tensors


class HandedOver(LayerState):
    """Whether a decoding state holds the encoder's last states yet: without them it would start from zero, unnoticed."""

    done = False

    def check(self) -> None:
        """Raises RunError before the source was read."""
        if not self.done:
            raise RunError(
                "the decoder starts from the encoder's last states, and no source was read",
                remedy="call model.encode(tokens, state=state) first",
            )

    def reorder(self, indices: Tensor) -> None:
        """The states themselves stand in the layers."""

    def truncate(self, length: int) -> None:
        """Nothing here grows."""

    def snapshot(self) -> HandedOver:
        copy = HandedOver()
        copy.done = self.done
        return copy

    def buffers(self) -> list[Tensor]:
        return []


def check_bridge(encoder: Any, decoder: Any, looks_back: bool) -> None:
    """Raises BuildError unless every layer of the encoder can start the decoder's layer of the same number.

    looks_back: whether a cross mixer reads the encoder's output; where none does, what stands after the last
    recurrence of the encoder would have no effect, and is refused too.
    """
    sides = [list(stack.blocks) for stack in (encoder, decoder)]
    if len(sides[0]) != len(sides[1]):
        raise BuildError(
            f"{len(sides[0])} layers to start {len(sides[1])} from, one each",
            where="bridge",
            remedy="give encoder and decoder the same depth",
        )
    for i, pair in enumerate(zip(*sides, strict=True)):
        mixers: list[Any] = [getattr(block, "mixer", None) for block in pair]
        source, target = mixers
        for side, mixer in zip(("encoder", "decoder"), mixers, strict=True):
            if not isinstance(mixer, RecurrentModule):
                raise BuildError(
                    "the bridge hands a recurrence's state over, and this layer is none",
                    where=f"{side}.blocks.{i}.mixer",
                    remedy="use lstm or gru in every layer, or leave bridge out and let a cross mixer look back",
                )
        if source.bidirectional:
            raise BuildError(
                "a bidirectional recurrence ends at both ends of the source, and the decoder's starts at one",
                where=f"encoder.blocks.{i}.mixer",
                remedy="leave bidirectional out, or leave bridge out and let a cross mixer look back",
            )
        if (source.mode, source.hidden_size) != (target.mode, target.hidden_size):
            raise BuildError(
                f"an encoder's {source.mode} of {source.hidden_size} to start a {target.mode} of {target.hidden_size}",
                where=f"decoder.blocks.{i}.mixer",
                remedy="give both sides the same recurrence and width",
            )
    last = sides[0][-1]
    idle = [("encoder.norm", encoder.norm), (f"encoder.blocks.{len(sides[0]) - 1}.feedforward", last.feedforward)]
    idle += [(f"encoder.blocks.{len(sides[0]) - 1}.mixer.out", last.mixer.out)]
    for where, part in idle:
        if part is not None and not looks_back:
            raise BuildError(
                "only the encoder's states reach the decoder, so that what follows its last recurrence has no effect",
                where=where,
                remedy="leave it out (for mixer.out: a hidden width equal to the model's), or give a cross mixer",
            )
