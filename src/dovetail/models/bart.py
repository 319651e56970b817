"""BART: a post-norm encoder-decoder with learned positions and one embedding for source, target and head.

The config's words for both sides and the weights' names are shared with the original Transformer's layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from dovetail.models.activations import ACTIVATIONS, activation_name
from dovetail.models.config import ConfigReader
from dovetail.models.encoder_decoder import EncoderDecoder
from dovetail.models.family import Family, expect, faithful, family, updated
from dovetail.models.keymap import Concat, Keep, KeyMap, Rename, Rule, shared
from dovetail.parts.attention.softmax import Attention
from dovetail.parts.block import PostNorm
from dovetail.parts.containers import Stack
from dovetail.parts.embedding import TokenEmbedding
from dovetail.parts.feedforward.mlp import Mlp
from dovetail.parts.init import Normal
from dovetail.parts.norm import LayerNorm
from dovetail.parts.position.absolute import Learned
from dovetail.parts.position.base import NoPosition
from dovetail.spec import Spec

# What transformers assumes where a config is silent.
DEFAULTS = {
    "activation_function": "gelu",
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "scale_embedding": False,
    "max_position_embeddings": 1024,
    "init_std": 0.02,
}
POSITIONS = Learned(offset=2)  # two rows that fairseq kept for its padding


def read(config: ConfigReader) -> EncoderDecoder:
    # Keys of the first BART releases that say how it is built; other values would be mBART's.
    config.only("normalize_before", [False], "pre-norm blocks belong to mBART, which is not supported")
    config.only("normalize_embedding", [True], "BART's embeddings are normalised")
    config.only("add_final_layer_norm", [False], "a final norm belongs to mBART, which is not supported")
    config.only("static_position_embeddings", [False], "BART's positions are learned")
    # final_logits_bias is there in any case, and so are two extra rows of positions; the last is for generation.
    config.inert(
        "add_bias_logits", "classif_dropout", "save_step", "extra_pos_embeddings", "force_bos_token_to_be_generated"
    )
    vocab, dim = config.int("vocab_size"), config.int("d_model")
    embedding, encoder, decoder = read_sides(config, dim)
    said = {"position": POSITIONS, "norm_in": LayerNorm()}
    return EncoderDecoder(
        vocab=vocab,
        dim=dim,
        context=config.int("max_position_embeddings", 1024),
        embedding=embedding,
        encoder=encoder.replace(**said),
        decoder=decoder.replace(**said),
        logits_bias=has_bias(config),
        decoder_start=config.take("decoder_start_token_id", None, int),
        init=Normal(std=config.float("init_std", 0.02)),
    )


def read_sides(config: ConfigReader, dim: int) -> tuple[TokenEmbedding, Stack, Stack]:
    """The embedding and the two stacks, without positions, that the keys of BART and Marian describe."""
    config.only("tie_word_embeddings", [True], "the head is the embedding's transpose here")
    activation = config.choose("activation_function", ACTIVATIONS, "gelu")
    inner, outer = config.float("activation_dropout", 0.0), config.float("dropout", 0.1)
    weights = config.float("attention_dropout", 0.0)
    scale = math.sqrt(dim) if config.bool("scale_embedding", False) else 1.0

    def side(name: str) -> Stack:
        config.only(f"{name}_layerdrop", [0.0], "dropping whole layers in training is not supported")
        heads = config.int(f"{name}_attention_heads")
        if dim % heads:
            raise config.contradiction(f"d_model {dim} is not a multiple of {name}_attention_heads {heads}")
        attention = Attention(heads=heads, bias="all", dropout=weights, position=NoPosition())
        block = PostNorm(
            mixer=attention,
            cross=attention if name == "decoder" else None,
            feedforward=Mlp(hidden=config.int(f"{name}_ffn_dim"), activation=activation, dropout=inner),
            norm=LayerNorm(),
            dropout=outer,
        )
        return Stack(depth=config.int(f"{name}_layers"), blocks=(block,), norm=None, dropout=outer)

    encoder, decoder = side("encoder"), side("decoder")
    if config.int("num_hidden_layers", encoder.depth) != encoder.depth:
        raise config.contradiction("num_hidden_layers, which means the encoder's, differs from encoder_layers")
    return TokenEmbedding(scale=scale), encoder, decoder


def has_bias(config: ConfigReader) -> bool:
    """Is final_logits_bias stored? Without weights to look at: yes, as every release does."""
    return not config.shapes or "final_logits_bias" in config.shapes


def write(spec: Spec, config: dict[str, Any]) -> dict[str, Any]:
    model, semantic = write_sides(spec, config, "bart")
    if not config:
        semantic |= {"architectures": ["BartForConditionalGeneration"], "model_type": "bart"}
    return faithful("bart", read, updated(config, semantic, DEFAULTS), model, bias_shapes(model))


def write_sides(spec: Spec, config: dict[str, Any], layout: str) -> tuple[EncoderDecoder, dict[str, Any]]:
    """The keys that `read_sides` reads."""
    model = expect(spec, EncoderDecoder, layout, "the root")
    semantic: dict[str, Any] = {"vocab_size": model.vocab, "d_model": model.dim}
    for name, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        stack = expect(stack, Stack, layout, name)
        block = expect(stack.blocks[0], PostNorm, layout, f"{name}.blocks.0")
        mixer = expect(block.mixer, Attention, layout, f"{name}.blocks.0.mixer")
        ff = expect(block.feedforward, Mlp, layout, f"{name}.blocks.0.feedforward")
        semantic |= {
            f"{name}_layers": stack.depth,
            f"{name}_attention_heads": mixer.sizes(model.dim)[0],
            f"{name}_ffn_dim": ff.width(model.dim),
            "activation_function": activation_name(ff.activation, layout, config.get("activation_function")),
            "activation_dropout": ff.dropout,
            "attention_dropout": mixer.dropout,
            "dropout": block.dropout,
        }
    if "num_hidden_layers" in config:
        semantic["num_hidden_layers"] = semantic["encoder_layers"]
    semantic["scale_embedding"] = getattr(model.embedding, "scale", 1.0) != 1.0
    if model.context is not None:
        semantic["max_position_embeddings"] = model.context
    if model.decoder_start is not None:
        semantic["decoder_start_token_id"] = model.decoder_start
    if not config:
        semantic |= {"is_encoder_decoder": True, "torch_dtype": "float32", "init_std": getattr(model.init, "std", 0.02)}
    return model, semantic


def bias_shapes(model: EncoderDecoder) -> dict[str, tuple[int, ...]]:
    """The shapes from which `read` tells whether a bias is stored."""
    name = "final_logits_bias" if model.logits_bias else "lm_head.weight"
    return {name: (1, model.decoder_vocab or model.vocab)}


def keymap(spec: Spec, stored: Iterable[str], config: dict[str, Any]) -> KeyMap:
    model: Any = spec
    stored = set(stored)
    prefix = prefix_of(stored)
    tables = [f"{prefix}{n}.weight" for n in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")]
    rules = shared([*tables, "lm_head.weight"], "embedding.table.weight", stored)
    for side in ("encoder", "decoder"):
        rules.append(Rename(f"{prefix}{side}.embed_positions.weight", f"{side}.position.table.weight"))
        rules += norm(f"{prefix}{side}.layernorm_embedding", f"{side}.norm_in")
    return KeyMap(rules + layers(model, prefix))


def prefix_of(stored: set[str]) -> str:
    """The first release's bare models leave "model." out."""
    return "" if any(name.startswith("decoder.layers.") for name in stored) else "model."


def layers(model: Any, prefix: str) -> list[Rule]:
    """The blocks of both stacks, and the bias on the logits."""
    rules: list[Rule] = [Keep(f"{prefix}encoder.version"), Keep(f"{prefix}decoder.version")]
    if model.logits_bias:
        rules.append(Rename("final_logits_bias", "logits_bias.weight"))
    for side in ("encoder", "decoder"):
        for i in range(getattr(model, side).depth):
            theirs, ours = f"{prefix}{side}.layers.{i}", f"{side}.blocks.{i}"
            for kind in ("weight", "bias"):
                own = tuple(f"{theirs}.self_attn.{n}_proj.{kind}" for n in "qkv")
                rules.append(Concat(own, f"{ours}.mixer.qkv.{kind}", (model.dim,) * 3))
                rules.append(Rename(f"{theirs}.self_attn.out_proj.{kind}", f"{ours}.mixer.out.{kind}"))
                if side == "decoder":
                    other = f"{theirs}.encoder_attn"
                    rules.append(Rename(f"{other}.q_proj.{kind}", f"{ours}.cross.q.{kind}"))
                    kv = (f"{other}.k_proj.{kind}", f"{other}.v_proj.{kind}")
                    rules.append(Concat(kv, f"{ours}.cross.kv.{kind}", (model.dim,) * 2))
                    rules.append(Rename(f"{other}.out_proj.{kind}", f"{ours}.cross.out.{kind}"))
                rules.append(Rename(f"{theirs}.fc1.{kind}", f"{ours}.feedforward.up.{kind}"))
                rules.append(Rename(f"{theirs}.fc2.{kind}", f"{ours}.feedforward.down.{kind}"))
            rules += norm(f"{theirs}.self_attn_layer_norm", f"{ours}.norm_mixer")
            rules += norm(f"{theirs}.final_layer_norm", f"{ours}.norm_feedforward")
            if side == "decoder":
                rules += norm(f"{theirs}.encoder_attn_layer_norm", f"{ours}.norm_cross")
    return rules


def norm(theirs: str, ours: str) -> list[Rule]:
    return [Rename(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in ("weight", "bias")]


BART = family(Family(name="bart", model_types=("bart",), read=read, write=write, keymap=keymap))
