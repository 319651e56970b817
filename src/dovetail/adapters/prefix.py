"""Prefix tuning: learned keys and values that every query of every layer sees before those of the tokens."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.adapters.base import AdapterSpec, PeftConfig, rng
from dovetail.adapters.virtual import VirtualSpec, as_it_is, front_of, peft_sizes
from dovetail.errors import BuildError, ConfigError, SpecError, UserError
from dovetail.parts.attention.softmax import AttentionModule
from dovetail.parts.position.base import refuse_prefix
from dovetail.parts.state import KVState
from dovetail.parts.virtual import Held, Virtual
from dovetail.parts.weights import Rng
from dovetail.spec import register
from dovetail.spec.ranges import Count

Where = Literal["decoder", "encoder", "cross"]
_BEFORE: dict[str, tuple[str, str, str]] = {  # stack and branch of an encoder-decoder, and the front of its tokens
    "encoder": ("encoder", "mixer", "encoder_front"),
    "cross": ("decoder", "cross", "decoder_front"),
    "decoder": ("decoder", "mixer", "decoder_front"),
}


@register(
    "adapter",
    "prefix",
    oracle="peft PrefixTuningConfig",
    source="Li and Liang 2021, eq. 3 and section 4.3; without hidden: Liu et al. 2022 (P-tuning v2)",
)
class Prefix(VirtualSpec):
    """softmax(q [K_P; K]ᵀ) [V_P; V]: K_P and V_P (length, kv_heads·head_dim) of every layer are learned.

    They stand before the keys like cached tokens at positions 0..length-1 (a region of their own where the position
    splits the keys): not rotated again, seen by every document of packed rows and beyond windows; the tokens' own
    positions begin at `length`.
    hidden: width of the reparametrisation, [K_P; V_P of every layer] = W₂ tanh(W₁ e + b₁) + b₂ with e (length,
    kv_heads·head_dim), W₁ (hidden, ·) (the paper: 512 for table-to-text, 800 for summarisation); `flatten` takes it
    away. None: the keys and values themselves are learned. tokens: they start as the keys and values that the model
    has for this text, and the start equals having read it (language models alone).
    at: which attentions of an encoder-decoder; all three unless given, as in the paper (PEFT: "decoder").
    order: "peft_seq2seq" gives layer i of a decoder the columns of layer 2i mod layers, as PEFT 0.21 does with
    encoder-decoders (those of half of the layers are then idle if their number is even).
    Parameters stand at the front of the stack, `front.adapters.NAME.sources.decoder` (`encoder_front`,
    `decoder_front`), once for all its layers: `weight` (length, layers·2·kv_heads·head_dim), keys and values of the
    first layer, of the second, ...; or `embedding`, `down`, `up`.
    """

    hidden: Count | None = None
    at: tuple[Where, ...] | None = None
    order: Literal["layers", "peft_seq2seq"] = "layers"
    identity: ClassVar[bool] = False
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    tuned: ClassVar[float] = 3e-1  # a thirtieth of it behind a network

    @model_validator(mode="after")
    def _one_start(self) -> Prefix:
        if self.tokens is not None and self.hidden is not None:
            raise ValueError("keys and values from a text (tokens) cannot be undone into a reparametrisation (hidden)")
        if self.order == "peft_seq2seq" and self.at != ("decoder",):
            raise ValueError("order='peft_seq2seq' is of the decoder of an encoder-decoder; give at=('decoder',)")
        return self

    def rate(self, width: int) -> float:
        return super().rate(width) / (1 if self.hidden is None else 30)

    def attach(self, model: Any, name: str, seed: int) -> None:
        found = {where: self._layers(model, where) for where in self._places(model)}
        started = self._read(model) if self.tokens is not None else None
        for where, layers in found.items():
            spans = _spans([layer for _, layer in layers])
            draw = rng(seed, where, name)
            width = sum(spans[0])
            device = next(model.parameters()).device  # a layer whose maps are in codes may have none
            source: Any = self._source(sum(map(sum, spans)), width // 2, draw)
            if started is not None:
                source.weight.data.copy_(started)
            source.to(device)
            front = getattr(model, _BEFORE[where][2], None) or model.front
            if name not in front.attached():
                front.attach(name, Home(self.count if where != "cross" else 0))
            home: Any = front.attached()[name]
            home.length = max(home.length, self.count if where != "cross" else 0)
            home.sources[where] = source
            if self.order != "layers" and len(set(spans)) > 1:
                raise BuildError(
                    "layers of different widths cannot change prefixes", where="order", remedy="leave it out"
                )
            begins = [sum(map(sum, spans[:i])) for i in range(len(spans))]
            for i, (_, layer) in enumerate(layers):
                j = i if self.order == "layers" else 2 * i % len(layers)
                layer.attach(name, LayerPrefix(source, self.count, begins[j], *spans[j], layer.kv_heads))

    def _source(self, width: int, embedding: int, draw: Rng) -> PrefixTable | PrefixNet:
        if self.hidden is None:
            return PrefixTable(self.count, width, draw)
        return PrefixNet(self.count, embedding, self.hidden, width, draw)

    def _places(self, model: Any) -> tuple[Where, ...]:
        front_of(model)
        if hasattr(model, "encode"):
            return self.at or ("encoder", "cross", "decoder")
        if self.at not in (None, ("decoder",)):
            raise SpecError(f"a language model has no {', '.join(self.at or ())}", where="at", remedy="leave `at` out")
        if self.order != "layers":
            raise SpecError(
                f"order={self.order!r} is of the decoder of an encoder-decoder, and this is none",
                where="order",
                remedy="leave order out; a PEFT file that says so was trained on an encoder-decoder",
            )
        return ("decoder",)

    def _layers(self, model: Any, where: Where) -> list[tuple[str, AttentionModule]]:
        """(path, attention) of every layer. Raises BuildError for a mixer that is not attention by keys of its own."""
        side, branch, _ = _BEFORE[where]
        stack = getattr(model, side) if hasattr(model, "encode") else model
        if getattr(stack, "streams", 1) != 1:
            raise BuildError(
                "a prefix in reversible layers, whose backward follows the parameters of each layer alone",
                remedy="use prompt tuning: {kind: prompt}",
            )
        found = []
        for i, block in enumerate(stack.blocks):
            layer = getattr(block, branch, None)
            path = f"{side}.blocks.{i}.{branch}" if hasattr(model, "encode") else f"blocks.{i}.{branch}"
            if layer is None and branch == "cross":
                continue
            if not isinstance(layer, AttentionModule):
                raise BuildError(
                    f"a prefix is keys and values before those of an attention, and {type(layer).__name__} has none",
                    where=path,
                    remedy="use prompt tuning, which works before any mixer: {kind: prompt}",
                )
            refuse_prefix(layer.position, path)
            found.append((path, layer))
        if not found:
            raise SpecError(f"no layer has attention here: {where}", where="at")
        return found

    def _read(self, model: Any) -> Tensor:
        """What the model's layers keep of the text, (length, width). Raises BuildError where that is not its cache."""
        if hasattr(model, "encode"):
            raise BuildError(
                "a prefix from a text on an encoder-decoder, whose layers read a source beside it",
                where="tokens",
                remedy="leave tokens out, or use {kind: prompt} with tokens",
            )
        for path, layer in self._layers(model, "decoder"):
            if layer.position.caches == "raw":
                raise BuildError(
                    "keys that are rotated anew at every step cannot be taken over as a prefix",
                    where=f"{path}.position",
                    remedy="leave tokens out",
                )
        with as_it_is(model):
            ids = self.text(model.spec.vocab).to(next(model.parameters()).device)
            state = model.new_state(1, self.count)
            model(ids, state=state, logits=False)
        found = []
        for layer in state.layers:
            cache: KVState = layer["mixer"]
            if cache.timeline.slots < self.count:
                raise BuildError(
                    f"a text of {self.count} tokens for a window of {cache.timeline.slots}, which does not keep them",
                    where="tokens",
                    remedy="give a shorter text",
                )
            found += [t[0, : self.count].flatten(1).float() for t in (cache.k, cache.v)]
        return torch.cat(found, -1)

    def flattened(self, model: Any, name: str) -> VirtualSpec:
        if self.hidden is None:
            raise UserError("this prefix has no reparametrisation to take away")
        for where in self._places(model):
            layers = self._layers(model, where)
            home: Any = layers and (getattr(model, _BEFORE[where][2], None) or model.front).attached()[name]
            net = home.sources[where]
            table = PrefixTable.of(net.columns(0, net.width))
            home.sources[where] = table
            for _, layer in layers:
                own: Any = layer.attached()[name]
                own.take(table)
        return self.replace(hidden=None, length=self.count)

    @classmethod
    def from_peft(cls, config: PeftConfig) -> AdapterSpec:
        config.take("encoder_hidden_size")  # the tensor is what the reparametrisation gave
        config.take("prefix_projection")
        config.take("init_weights")
        seq2seq = config.take("num_transformer_submodules", 1) == 2
        which: Any = {"at": ("decoder",), "order": "peft_seq2seq"} if seq2seq else {}
        return cls(length=peft_sizes(config), **which)

    def _check_peft(self, model: Any) -> None:
        """Raises ConfigError for prefixes elsewhere than before the decoder's self-attention."""
        if self._places(model) != ("decoder",):
            raise ConfigError(
                "PEFT's layout says prefixes of the decoder's self-attention alone",
                where="at",
                remedy='save it with format="dovetail", or train with at=("decoder",), order="peft_seq2seq"; '
                "on an encoder-decoder PEFT's config says num_transformer_submodules=2",
            )

    def to_peft(self, model: Any, name: str) -> dict[str, Any]:
        self._check_peft(model)
        if hasattr(model, "encode") and self.order != "peft_seq2seq":
            raise ConfigError(
                "PEFT gives layer i of an encoder-decoder the prefix of layer 2i mod layers, and this one gives it its own",
                where="order",
                remedy='save it with format="dovetail", or train with order="peft_seq2seq"',
            )
        layers = [layer for _, layer in self._layers(model, "decoder")]
        sizes = {(layer.kv_heads, layer.head_dim, layer.value_dim) for layer in layers}
        heads, width, value = next(iter(sizes))
        if len(sizes) > 1 or width != value:
            raise ConfigError("PEFT's layout says layers of one size", remedy='save it with format="dovetail"')
        return {
            "num_virtual_tokens": self.count,
            "num_layers": len(layers),
            "num_attention_heads": heads,
            "token_dim": heads * width,
            "num_transformer_submodules": 2 if hasattr(model, "encode") else 1,
            "prefix_projection": False,
            "encoder_hidden_size": self.hidden or heads * width,
        }

    def peft_tensors(self, model: Any, name: str) -> dict[str, Tensor]:
        self._check_peft(model)  # what the layout cannot say would stay as it was drawn
        home: Any = (getattr(model, "decoder_front", None) or model.front).attached()[name]
        source = home.sources["decoder"]
        return {"prompt_embeddings": source.weight if self.hidden is None else source.columns(0, source.width)}


class Home(Held):
    """At a front: the parameters of a prefix, and the positions that it takes before the tokens."""

    def __init__(self, length: int):
        super().__init__(length)
        self.sources = nn.ModuleDict()


class PrefixTable(nn.Module):
    """Keys and values of all layers, weight (length, width); drawn from N(0, 0.02²)."""

    undecayed: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __init__(self, length: int, width: int, draw: Rng):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(length, width).normal_(0, 0.02, generator=draw("weight")))

    @classmethod
    def of(cls, weight: Tensor) -> PrefixTable:
        """The table that holds `weight`."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.width = weight.shape[1]
        self.weight = nn.Parameter(weight.detach().clone())
        return self

    def columns(self, start: int, stop: int) -> Tensor:
        """(length, stop - start)."""
        return self.weight[:, start:stop]


class PrefixNet(nn.Module):
    """Keys and values of all layers from small vectors: W₂ tanh(W₁ e + b₁) + b₂, e (length, ·) from N(0, 1)."""

    undecayed: ClassVar[frozenset[str]] = frozenset({"embedding"})

    def __init__(self, length: int, embedding: int, hidden: int, width: int, draw: Rng):
        super().__init__()
        self.width = width
        self.embedding = nn.Parameter(torch.empty(length, embedding).normal_(generator=draw("embedding")))
        self.down, self.up = (
            drawn(nn.Linear(embedding, hidden), "down", draw),
            drawn(nn.Linear(hidden, width), "up", draw),
        )

    def columns(self, start: int, stop: int) -> Tensor:
        """(length, stop - start)."""
        return F.linear(torch.tanh(self.down(self.embedding)), self.up.weight[start:stop], self.up.bias[start:stop])


class LayerPrefix(Virtual):
    """One layer's share of a source: columns begin..begin+keys+values. It owns nothing."""

    def __init__(self, source: nn.Module, length: int, begin: int, keys: int, values: int, heads: int):
        super().__init__()
        self.length, self.begin, self.widths, self.heads = length, begin, (keys, values), heads
        self.take(source)

    def take(self, source: nn.Module) -> None:
        """Reads from `source` from now on."""
        vars(self)["source"] = source  # its parameters stand at the front, not here

    def tensors(self) -> tuple[Tensor, ...]:
        """Keys (P,G,D) and values (P,G,Dv)."""
        source: Any = self.__dict__["source"]
        both = source.columns(self.begin, self.begin + sum(self.widths)).split(self.widths, -1)
        return tuple(t.unflatten(-1, (self.heads, -1)) for t in both)


def drawn(linear: Any, name: str, draw: Rng) -> Any:
    """A linear map (or recurrence) started as torch starts it, U(±1/sqrt(in)), in the order of its parameters."""
    bound = getattr(linear, "hidden_size", getattr(linear, "in_features", 1)) ** -0.5
    with torch.no_grad():
        for parameter, tensor in linear.named_parameters():
            tensor.uniform_(-bound, bound, generator=draw(f"{name}.{parameter}"))
    return linear


def _spans(layers: list[AttentionModule]) -> list[tuple[int, int]]:
    """(width of the keys, width of the values) of every layer."""
    return [(layer.kv_heads * layer.head_dim, layer.kv_heads * layer.value_dim) for layer in layers]
