"""Prompt tuning: learned vectors before those of the tokens."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dovetail.adapters.base import AdapterSpec, PeftConfig, rng
from dovetail.adapters.virtual import VirtualSpec, as_it_is, front_of, peft_sizes
from dovetail.parts.virtual import Virtual
from dovetail.spec import register
from dovetail.spec.ranges import Natural


class VectorSpec(VirtualSpec):
    """Base of adapters whose virtual tokens are vectors (length, dim), read by the first layer like any token's.

    They stand before each row, before each document of packed rows, and before the source of an encoder-decoder; hidden
    states and logits are those of the given tokens alone, so that no label ever stands beside a virtual one. Positions
    count them. While decoding they enter the state once, with the first tokens, and `new_state` makes room for them.
    spare: rows after those that are kept and never read (PEFT's half for the decoder of an encoder-decoder).
    """

    spare: Natural = 0

    @property
    def rows(self) -> int:
        return self.count + self.spare

    @classmethod
    def peft_length(cls, config: PeftConfig) -> dict[str, Any]:
        """Fields from PEFT's sizes."""
        length = peft_sizes(config)
        return {"length": length, "spare": length if config.take("num_transformer_submodules", 1) == 2 else 0}

    def peft_length_of(self, model: Any) -> dict[str, Any]:
        """PEFT's sizes."""
        return {
            "num_virtual_tokens": self.count,
            "num_transformer_submodules": 2 if self.spare else 1,
            "token_dim": model.spec.dim,
        }


@register(
    "adapter", "prompt", oracle="peft PromptTuningConfig", source="Lester et al. 2021, section 2; section 2.1 (starts)"
)
class Prompt(VectorSpec):
    """[P; embed(tokens)], P (length, dim) learned.

    start: "vocabulary" copies the vectors of ids drawn at random, "normal" draws from N(0, 1) as PEFT's "RANDOM" does;
    tokens: the vectors of a text instead, with which the start equals having read it. Parameters: `weight` (length +
    spare, dim) at `front.adapters.NAME` (`encoder_front` of an encoder-decoder).
    """

    start: Literal["vocabulary", "normal"] = "vocabulary"
    identity: ClassVar[bool] = False
    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    tuned: ClassVar[float] = 1e-1

    def attach(self, model: Any, name: str, seed: int) -> None:
        front, draw = front_of(model), rng(seed, "front", name)
        device = next(model.parameters()).device
        if self.start == "normal" and self.tokens is None:
            weight = torch.empty(self.rows, model.spec.dim).normal_(generator=draw("weight"))
        else:
            ids = torch.randint(model.spec.vocab, (1, self.count), generator=draw("ids"))
            ids = ids if self.tokens is None else self.text(model.spec.vocab)
            with as_it_is(model):
                vectors = model.embedding(ids.to(device))[0].float()
            weight = torch.cat([vectors, vectors.new_zeros(self.spare, model.spec.dim)])
        front.attach(name, Vectors(weight.to(device), self.count))

    @classmethod
    def from_peft(cls, config: PeftConfig) -> AdapterSpec:
        start = config.take("prompt_tuning_init", "RANDOM")  # the tensor says what it has become
        for key in ("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"):
            config.take(key)
        return cls(**cls.peft_length(config), start="normal" if start == "RANDOM" else "vocabulary")

    def to_peft(self, model: Any, name: str) -> dict[str, Any]:
        known = "SAMPLE_VOCAB" if self.start == "vocabulary" else "RANDOM"
        return self.peft_length_of(model) | {"prompt_tuning_init": known}

    def peft_tensors(self, model: Any, name: str) -> dict[str, Tensor]:
        module: Any = front_of(model).attached()[name]
        return {"prompt_embeddings": module.weight}


class Vectors(Virtual):
    """weight (rows, dim), the first `length` of which are the virtual tokens."""

    undecayed: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __init__(self, weight: Tensor, length: int):
        super().__init__()
        self.length = length
        self.weight = nn.Parameter(weight.detach().clone())

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight[: self.length],)
