"""What adapters of virtual tokens share: where they stand, text they start from, and reparametrisations taken away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from dovetail.adapters import many
from dovetail.adapters.base import AdapterSpec, PeftConfig
from dovetail.errors import BuildError, DataError, UserError
from dovetail.parts.virtual import Front
from dovetail.spec.ranges import Count

DEFAULT_LENGTH = 20


class VirtualSpec(AdapterSpec):
    """Base of adapters that are virtual tokens before the real ones.

    length: how many; unless given as many as `tokens`, else 20. tokens: ids of a text to start from, repeated or cut
    where a length is given too.
    """

    length: Count | None = None
    tokens: tuple[int, ...] | None = None
    mergeable: ClassVar[bool] = False
    peft_prefix: ClassVar[str] = ""

    @property
    def count(self) -> int:
        """How many virtual tokens."""
        return self.length or (len(self.tokens) if self.tokens else DEFAULT_LENGTH)

    def flattened(self, model: Any, name: str) -> VirtualSpec:
        """What its reparametrisation gives takes its place, exactly; returns the spec of that. See `flatten`."""
        raise UserError(f"a {self.kind} adapter has no reparametrisation to take away")

    def text(self, vocab: int) -> Tensor:
        """The ids to start from, (1,length). Raises DataError for ids that the model does not have."""
        ids = fitted(self.tokens or (), self.count)
        if not ids or min(ids) < 0 or max(ids) >= vocab:
            raise DataError(
                f"a text of ids {ids[:8]} for a vocabulary of {vocab}",
                where="tokens",
                remedy="give at least one id of the model",
            )
        return torch.tensor([ids])


def flatten(model: Any, name: str = "default") -> Any:
    """Takes a trained reparametrisation away and keeps what it gives: same outputs, fewer parameters; in place.

    Raises UserError for an adapter that has none.
    """
    held = many.adapters(model)
    if name not in held or not isinstance(held[name], VirtualSpec):
        raise UserError(f"no adapter {name!r} of virtual tokens on this model", remedy=f"there are: {', '.join(held)}")
    spec: Any = held[name]
    model.adapters_held = {**held, name: spec.flattened(model, name)}
    return model


def fitted(ids: Sequence[int], length: int) -> list[int]:
    """The ids repeated or cut to `length`."""
    return [ids[i % len(ids)] for i in range(length)] if ids else []


def front_of(model: Any) -> Front:
    """Where vectors enter: before the tokens of a language model, or before the source of an encoder-decoder.

    Raises BuildError for models that read no tokens.
    """
    place = getattr(model, "encoder_front", getattr(model, "front", None))
    if place is None:
        raise BuildError(
            f"{type(model).__name__} has no place for virtual tokens",
            remedy="use a decoder or an encoder-decoder, or another adapter: lora, bottleneck, ...",
        )
    return place


@contextmanager
def as_it_is(model: Any) -> Iterator[None]:
    """Inside, the model without adapters and dropout, and no gradients."""
    training = model.training
    try:
        with many.off(model), torch.no_grad():
            yield model.eval()
    finally:
        model.train(training)


def peft_sizes(config: PeftConfig) -> int:
    """num_virtual_tokens; the sizes beside it are the model's own, and show in the tensors' shapes."""
    config.refuse("modules_to_save")
    for key in ("token_dim", "num_attention_heads", "num_layers"):
        config.take(key)
    return int(config.take("num_virtual_tokens", DEFAULT_LENGTH))
