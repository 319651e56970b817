"""T5 and mT5: pre-norm stacks without a bias, one table of distances a stack, scores that are not scaled.

T5 v1.0 has one embedding for all, divides by sqrt(d_model) before the head and uses ReLU; v1.1 and mT5 have a head of
their own and a gated GELU. An encoder alone (T5EncoderModel: the text tower of many image generators) reads as a model
without a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dovetail.models.activations import ACTIVATIONS, activation_name
from dovetail.models.config import ConfigReader
from dovetail.models.encoder import Encoder
from dovetail.models.encoder_decoder import EncoderDecoder
from dovetail.models.family import Family, cannot_say, expect, faithful, family, updated
from dovetail.models.keymap import Concat, Keep, KeyMap, Rename, Rule, shared
from dovetail.parts.activation import GeluTanh
from dovetail.parts.attention.softmax import Attention
from dovetail.parts.block import PreNorm
from dovetail.parts.containers import Stack
from dovetail.parts.embedding import LinearHead
from dovetail.parts.feedforward.glu import Glu
from dovetail.parts.feedforward.mlp import Mlp
from dovetail.parts.init import T5
from dovetail.parts.norm import RmsNorm
from dovetail.parts.position.base import NoPosition
from dovetail.parts.position.relative import T5Buckets
from dovetail.spec import Ref, Spec

_DEFAULTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.1,
    "tie_word_embeddings": True,
}
_FEED_FORWARD = {"t5": "relu", "mt5": "gated-gelu"}
HEAD = "lm_head.weight"


def read(config: ConfigReader) -> EncoderDecoder | Encoder:
    dim, depth = config.int("d_model"), config.int("num_layers")
    common = {
        "vocab": config.int("vocab_size"),
        "dim": dim,
        "context": config.int("n_positions", None),
        "init": T5(factor=config.float("initializer_factor", 1.0)),
    }
    own, scaled = read_head(config)
    layers = config.int("num_decoder_layers", depth)
    if encoder_alone(config):
        return Encoder(**common, **read_stack(config, depth, ""), head=None)
    return EncoderDecoder(
        **common,
        encoder=Stack(**read_stack(config, depth, "encoder.")),
        decoder=Stack(**read_stack(config, layers, "decoder.", cross=True)),
        head=LinearHead() if own else Ref(path="decoder_embedding"),
        logits_scale=dim**-0.5 if scaled else 1.0,
        decoder_start=config.take("decoder_start_token_id", None, int),
    )


def encoder_alone(config: ConfigReader) -> bool:
    """Whether there is no decoder: the stored tensors tell; without them the architecture's name does."""
    if config.shapes:
        return not any(name.startswith("decoder.") for name in config.shapes)
    return str((config.data.get("architectures") or [""])[0]).endswith("EncoderModel")


def read_head(config: ConfigReader) -> tuple[bool, bool]:
    """(whether the head has a matrix of its own, whether it reads scaled hidden states).

    `tie_word_embeddings` says both in the first releases. transformers 5 writes true in any case, keeps the scale in a
    key of its own, and lets the stored tensors tell whether there is a head; mT5 never scales.
    """
    tied = config.bool("tie_word_embeddings", True)
    scaled = kind_of(config.data) == "t5" and config.bool("scale_decoder_outputs", tied)
    stored = HEAD in config.shapes if config.shapes else True
    return stored and not (tied and scaled), scaled


def read_stack(config: ConfigReader, depth: int, path: str, cross: bool = False) -> dict[str, Any]:
    """The fields of a stack that stands at `path`, a decoder's where it has a `cross` mixer."""
    dropout = config.float("dropout_rate", 0.1)
    table = T5Buckets(
        buckets=config.int("relative_attention_num_buckets", 32),
        max_distance=config.int("relative_attention_max_distance", 128),
    )
    attention = Attention(
        heads=config.int("num_heads"), head_dim=config.int("d_kv"), scale=1.0, dropout=dropout, position=NoPosition()
    )
    norm = RmsNorm(eps=config.float("layer_norm_epsilon", 1e-6, least=0.0))
    block = PreNorm(
        mixer=attention.replace(position=table),
        cross=attention if cross else None,
        feedforward=read_feedforward(config, dropout),
        norm=norm,
        dropout=dropout,
    )
    rest = block.replace(mixer=attention.replace(position=Ref(path=f"{path}blocks.0.mixer.position")))
    blocks = (block, *[rest] * (depth - 1))
    return {"depth": depth, "blocks": blocks, "norm": norm, "dropout": dropout, "dropout_last": dropout}


def read_feedforward(config: ConfigReader, dropout: float) -> Glu | Mlp:
    """feed_forward_proj says gate and activation; `is_gated_act` and `dense_act_fn` say them again, or instead."""
    said = config.take("feed_forward_proj", _FEED_FORWARD[kind_of(config.data)], str)
    gate, _, name = said.rpartition("-")
    activation = activation_of(said)
    if activation is None:
        raise config.contradiction(
            f"feed_forward_proj {said!r} is neither an activation nor gated-ACTIVATION",
            remedy=f"known activations: {', '.join(ACTIVATIONS)}",
        )
    if "dense_act_fn" in config:
        again = config.choose("dense_act_fn", ACTIVATIONS, name)
        if "feed_forward_proj" in config and again != activation:
            raise config.contradiction(
                f"dense_act_fn {config.data['dense_act_fn']!r} beside feed_forward_proj {said!r}"
            )
        activation = again
    gated = config.bool("is_gated_act", bool(gate))
    if "feed_forward_proj" in config and gated != bool(gate):
        raise config.contradiction(f"is_gated_act {gated} beside feed_forward_proj {said!r}")
    hidden = config.int("d_ff")
    if gated:
        return Glu(hidden=hidden, activation=activation, dropout=dropout)
    return Mlp(hidden=hidden, activation=activation, bias=False, dropout=dropout)


def activation_of(said: str) -> Spec | None:
    """What a feed_forward_proj means, whether gated or not; None where it means nothing."""
    gate, _, name = said.rpartition("-")
    if gate not in ("", "gated"):
        return None
    return GeluTanh() if said == "gated-gelu" else ACTIVATIONS.get(name)


def write(spec: Spec, config: dict[str, Any]) -> dict[str, Any]:
    model: Any = spec if isinstance(spec, Encoder) else expect(spec, EncoderDecoder, "t5", "the root")
    semantic = {"vocab_size": model.vocab, "d_model": model.dim}
    if isinstance(spec, Encoder):
        semantic |= write_stack(spec, spec, "the root", config)
        architecture = "T5EncoderModel"
    else:
        semantic |= write_stack(model.encoder, model, "encoder", config) | write_decoder(model, config)
        architecture = "T5ForConditionalGeneration"
    if model.context is not None:
        semantic["n_positions"] = model.context
    if not config:
        semantic |= {
            "architectures": [architecture],
            "model_type": "t5",
            "is_encoder_decoder": True,
            "torch_dtype": "float32",
            "initializer_factor": getattr(model.init, "factor", 1.0),
        }
    defaults = _DEFAULTS | {"feed_forward_proj": _FEED_FORWARD[kind_of(config)]}
    return faithful("t5", read, updated(config, semantic, defaults), model, shapes(model))


def write_decoder(model: EncoderDecoder, config: dict[str, Any]) -> dict[str, Any]:
    """The keys of the decoder and the head. Those that say what they are stay as they are, where they still do."""
    own, scaled = isinstance(model.head, LinearHead), model.logits_scale != 1.0
    semantic: dict[str, Any] = {}
    depth = getattr(model.decoder, "depth", None)
    if config.get("num_decoder_layers") is not None or depth != getattr(model.encoder, "depth", None):
        semantic["num_decoder_layers"] = depth
    if not config or read_head(ConfigReader(config, shapes=shapes(model))) != (own, scaled):
        semantic["tie_word_embeddings"] = not own
        if kind_of(config) == "t5" and ("scale_decoder_outputs" in config or scaled == own):
            semantic["scale_decoder_outputs"] = scaled
    if model.decoder_start is not None:
        semantic["decoder_start_token_id"] = model.decoder_start
    return semantic


def write_stack(stack: Any, model: Any, side: str, config: dict[str, Any]) -> dict[str, Any]:
    """The keys that both stacks share, as this one says them."""
    stack = expect(stack, Stack, "t5", side)
    block = expect(stack.blocks[0], PreNorm, "t5", f"{side}.blocks.0")
    mixer = expect(block.mixer, Attention, "t5", f"{side}.blocks.0.mixer")
    table = expect(mixer.position, T5Buckets, "t5", f"{side}.blocks.0.mixer.position")
    norm = expect(block.norm, RmsNorm, "t5", f"{side}.blocks.0.norm")
    ff: Any = block.feedforward
    if not isinstance(ff, Glu | Mlp):
        raise cannot_say("t5", f"feedforward {getattr(ff, 'kind', None)!r}", f"{side}.blocks.0.feedforward")
    heads, _, width, _ = mixer.sizes(model.dim)
    gate = "gated-" if isinstance(ff, Glu) else ""
    name = "gelu" if gate and ff.activation == GeluTanh() else activation_name(ff.activation, "t5")
    said = config.get("feed_forward_proj") or ""
    if said.startswith("gated-") != bool(gate) or activation_of(said) != ff.activation:
        said = gate + name
    semantic = {
        "d_kv": width,
        "d_ff": ff.width(model.dim),
        "num_layers": stack.depth,
        "num_heads": heads,
        "relative_attention_num_buckets": table.buckets,
        "relative_attention_max_distance": table.max_distance,
        "layer_norm_epsilon": norm.eps,
        "dropout_rate": block.dropout,
        "feed_forward_proj": said,
    }
    if "dense_act_fn" in config:
        semantic["dense_act_fn"] = activation_name(ff.activation, "t5", config["dense_act_fn"])
        if "feed_forward_proj" not in config and semantic["dense_act_fn"] == config["dense_act_fn"]:
            del semantic["feed_forward_proj"]
    if "is_gated_act" in config:
        semantic["is_gated_act"] = bool(gate)
    return semantic


def shapes(model: Encoder | EncoderDecoder) -> dict[str, tuple[int, ...]]:
    """The shapes from which `read` tells whether there are a decoder and a head."""
    found: dict[str, tuple[int, ...]] = {"shared.weight": (model.vocab, model.dim)}
    if isinstance(model, EncoderDecoder):
        found["decoder.final_layer_norm.weight"] = (model.dim,)
        if isinstance(model.head, LinearHead):
            found[HEAD] = found["shared.weight"]
    return found


def kind_of(config: dict[str, Any]) -> str:
    return config.get("model_type") or "t5"


def keymap(spec: Spec, stored: Iterable[str], config: dict[str, Any]) -> KeyMap:
    model: Any = spec
    names, rules = ["shared.weight", "encoder.embed_tokens.weight"], stack_rules(model, "encoder")
    if isinstance(spec, EncoderDecoder):
        names.append("decoder.embed_tokens.weight")
        rules += stack_rules(model, "decoder")
        # The first releases gave the cross-attention a table that nothing reads.
        rules.append(Keep("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"))
        if isinstance(spec.head, LinearHead):
            rules.append(Rename(HEAD, "head_part.linear.weight"))
        else:
            names.append(HEAD)
    return KeyMap(shared(names, "embedding.table.weight", stored) + rules)


def stack_rules(model: Any, side: str) -> list[Rule]:
    stack: Any = model if isinstance(model, Encoder) else getattr(model, side)
    path = "" if stack is model else f"{side}."
    table = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rules: list[Rule] = [
        Rename(table, f"{path}blocks.0.mixer.position.table.weight"),
        Rename(f"{side}.final_layer_norm.weight", f"{path}norm.weight"),
    ]
    for i, block in enumerate(stack.blocks):
        theirs, ours = f"{side}.block.{i}.layer", f"{path}blocks.{i}"
        heads, _, width, _ = block.mixer.sizes(model.dim)
        own, branches = f"{theirs}.0.SelfAttention", ["mixer", "feedforward"]
        rules.append(
            Concat(tuple(f"{own}.{n}.weight" for n in "qkv"), f"{ours}.mixer.qkv.weight", (heads * width,) * 3)
        )
        rules.append(Rename(f"{own}.o.weight", f"{ours}.mixer.out.weight"))
        if side == "decoder":
            branches.insert(1, "cross")
            other = f"{theirs}.1.EncDecAttention"
            kv = (f"{other}.k.weight", f"{other}.v.weight")
            rules.append(Rename(f"{other}.q.weight", f"{ours}.cross.q.weight"))
            rules.append(Concat(kv, f"{ours}.cross.kv.weight", (heads * width,) * 2))
            rules.append(Rename(f"{other}.o.weight", f"{ours}.cross.out.weight"))
        for number, branch in enumerate(branches):
            rules.append(Rename(f"{theirs}.{number}.layer_norm.weight", f"{ours}.norm_{branch}.weight"))
        dense, hidden = f"{theirs}.{len(branches) - 1}.DenseReluDense", block.feedforward.width(model.dim)
        if isinstance(block.feedforward, Glu):
            gate_up = (f"{dense}.wi_0.weight", f"{dense}.wi_1.weight")
            rules.append(Concat(gate_up, f"{ours}.feedforward.gate_up.weight", (hidden,) * 2))
        else:
            rules.append(Rename(f"{dense}.wi.weight", f"{ours}.feedforward.up.weight"))
        rules.append(Rename(f"{dense}.wo.weight", f"{ours}.feedforward.down.weight"))
    return rules


FAMILY = family(Family(name="t5", model_types=("t5", "mt5"), read=read, write=write, keymap=keymap))
