"""P-tuning: the virtual tokens of prompt tuning, made by a small network while they are trained."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from dovetail.adapters.base import AdapterSpec, PeftConfig, rng
from dovetail.adapters.prefix import drawn
from dovetail.adapters.prompt import Vectors, VectorSpec
from dovetail.adapters.virtual import VirtualSpec, front_of
from dovetail.errors import UserError
from dovetail.parts.virtual import Virtual
from dovetail.parts.weights import Rng
from dovetail.spec import register
from dovetail.spec.ranges import Chance, Count


@register("adapter", "p_tuning", oracle="peft PromptEncoderConfig", source="Liu et al. 2021 (P-tuning), eq. 5")
class PTuning(VectorSpec):
    """[net(e); embed(tokens)], e (length, dim) learned from N(0, 1): virtual tokens that depend on each other.

    encoder: "lstm" is W₂ relu(W₁ [h→; h←]), h the states of a two-way LSTM of `layers` layers (2 unless given) with
    `dropout` between them (the paper); "mlp" is three maps with relu between (PEFT's default), each virtual token by
    itself. hidden: their width, the model's unless given. None: the virtual tokens themselves, which is what `flatten`
    leaves and all that PEFT saves.
    Parameters at `front.adapters.NAME`: `embedding` (length + spare, dim), `lstm`, `maps`; or `weight`.
    """

    encoder: Literal["lstm", "mlp"] | None = "lstm"
    hidden: Count | None = None
    layers: Count | None = None
    dropout: Chance = 0.0
    identity: ClassVar[bool] = False
    peft_type: ClassVar[str | None] = "P_TUNING"
    tuned: ClassVar[float] = 1e-3

    @model_validator(mode="after")
    def _used(self) -> PTuning:
        if self.tokens is not None:
            raise ValueError("virtual tokens made by a network cannot start as a text; use kind 'prompt'")
        if self.encoder != "lstm" and (self.layers is not None or self.dropout):
            raise ValueError(f"layers and dropout are the LSTM's, and encoder is {self.encoder!r}")
        if self.encoder is None and self.hidden is not None:
            raise ValueError("hidden is the width of an encoder, and there is none")
        if self.dropout and (self.layers or 2) == 1:
            raise ValueError("dropout stands between the layers of the LSTM, and there is one")
        return self

    def attach(self, model: Any, name: str, seed: int) -> None:
        front, draw, dim = front_of(model), rng(seed, "front", name), model.spec.dim
        start = torch.empty(self.rows, dim).normal_(generator=draw("embedding"))
        hidden = self.hidden or dim
        module: Virtual
        if self.encoder is None:
            module = Vectors(start, self.count)
        elif self.encoder == "mlp":
            module = Network(start, self.count, None, (dim, hidden, hidden, dim), draw)
        else:
            more: dict[str, Any] = {"batch_first": True, "dropout": self.dropout, "bidirectional": True}
            lstm = nn.RNNBase("LSTM", dim, hidden, self.layers or 2, **more)  # compilers refuse the class nn.LSTM
            module = Network(start, self.count, drawn(lstm, "lstm", draw), (2 * hidden, 2 * hidden, dim), draw)
        front.attach(name, module.to(next(model.parameters()).device))

    def flattened(self, model: Any, name: str) -> VirtualSpec:
        if self.encoder is None:
            raise UserError("this adapter has no reparametrisation to take away")
        front = front_of(model)
        network: Any = front.attached()[name]
        held: Any = front._modules["adapters"]
        held[name] = Vectors(network.rows(training=False), self.count)
        return self.replace(encoder=None, hidden=None, layers=None, dropout=0.0, length=self.count)

    @classmethod
    def from_peft(cls, config: PeftConfig) -> AdapterSpec:
        for key in ("reparameterization_type", "hidden_size", "num_layers", "dropout"):
            config.take(f"encoder_{key}")  # the tensor is what the encoder gave
        return cls(**cls.peft_length(config), encoder=None)

    def to_peft(self, model: Any, name: str) -> dict[str, Any]:
        return self.peft_length_of(model) | {
            "encoder_reparameterization_type": "LSTM" if self.encoder == "lstm" else "MLP",
            "encoder_hidden_size": self.hidden or model.spec.dim,
            "encoder_num_layers": (self.layers or 2) if self.encoder == "lstm" else 2,
            "encoder_dropout": self.dropout,
        }

    def peft_tensors(self, model: Any, name: str) -> dict[str, Tensor]:
        module: Any = front_of(model).attached()[name]
        return {"prompt_embeddings": module.weight if self.encoder is None else module.rows(training=False)}


class Network(Virtual):
    """Virtual tokens from `embedding` (rows, dim) through an LSTM, if there is one, and maps with relu between."""

    undecayed: ClassVar[frozenset[str]] = frozenset({"embedding"})

    def __init__(self, start: Tensor, length: int, lstm: nn.RNNBase | None, widths: tuple[int, ...], draw: Rng):
        super().__init__()
        self.length, self.lstm = length, lstm
        self.embedding = nn.Parameter(start)
        pairs = itertools.pairwise(widths)
        self.maps = nn.ModuleList(drawn(nn.Linear(a, b), f"maps.{i}", draw) for i, (a, b) in enumerate(pairs))

    def rows(self, training: bool) -> Tensor:
        """All of them, (rows, dim). training: with the LSTM's dropout."""
        x = self.embedding
        if self.lstm is not None:
            net = self.lstm
            weights: Any = [getattr(net, name) for names in net._all_weights for name in names]
            zero = x.new_zeros(2 * net.num_layers, 1, net.hidden_size)
            x = torch.lstm(x[None], (zero, zero), weights, True, net.num_layers, net.dropout, training, True, True)[0][
                0
            ]
        for i, linear in enumerate(self.maps):
            x = linear(x.relu() if i else x)
        return x

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.rows(self.training)[: self.length],)
