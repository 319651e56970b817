"""The original Transformer: a post-norm encoder-decoder with sinusoidal positions (Vaswani et al. 2017).

Its published checkpoints are the Marian translation models, whose layout is read and written here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from dovetail.models import bart
from dovetail.models.config import ConfigReader
from dovetail.models.encoder_decoder import EncoderDecoder
from dovetail.models.family import Family, faithful, family, updated
from dovetail.models.keymap import Keep, KeyMap, Rename, Rule, shared
from dovetail.parts.activation import Relu
from dovetail.parts.attention.softmax import Attention
from dovetail.parts.block import PostNorm
from dovetail.parts.containers import Stack
from dovetail.parts.embedding import TokenEmbedding
from dovetail.parts.feedforward.mlp import Mlp
from dovetail.parts.init import Normal, Xavier
from dovetail.parts.norm import LayerNorm
from dovetail.parts.position.absolute import Sinusoidal
from dovetail.parts.position.base import NoPosition
from dovetail.spec import Ref, Spec


def transformer(
    vocab: int,
    dim: int = 512,
    depth: int = 6,
    heads: int = 8,
    hidden: int = 2048,
    dropout: float = 0.1,
    context: int | None = None,
) -> EncoderDecoder:
    """The arrangement of Vaswani et al. 2017, section 3; the defaults are the base model of table 3."""
    attention = Attention(heads=heads, bias="none", position=NoPosition())
    feedforward = Mlp(hidden=hidden, activation=Relu())
    block = PostNorm(mixer=attention, feedforward=feedforward, norm=LayerNorm(), dropout=dropout)
    stack = Stack(depth=depth, blocks=(block,), position=Sinusoidal(), norm=None, dropout=dropout)
    return EncoderDecoder(
        vocab=vocab,
        dim=dim,
        context=context,
        embedding=TokenEmbedding(scale=math.sqrt(dim)),
        encoder=stack,
        decoder=stack.replace(blocks=(block.replace(cross=attention),) * depth),
        init=Xavier(),
    )


def read(config: ConfigReader) -> EncoderDecoder:
    config.only("normalize_before", [False], "pre-norm blocks are not Marian's")
    config.only("normalize_embedding", [False], "Marian's embeddings are not normalised")
    config.only("add_final_layer_norm", [False], "a final norm is not Marian's")
    config.only("static_position_embeddings", [True], "Marian's positions are sinusoidal")
    config.inert("add_bias_logits", "classif_dropout", "extra_pos_embeddings", "force_bos_token_to_be_generated")
    vocab, dim = config.int("vocab_size"), config.int("d_model")
    target = config.int("decoder_vocab_size", vocab)
    one = config.bool("share_encoder_decoder_embeddings", True)
    if one and target != vocab:
        raise config.contradiction(f"one embedding for vocab_size {vocab} and decoder_vocab_size {target}")
    embedding, encoder, decoder = bart.read_sides(config, dim)
    position = Sinusoidal(layout="half")
    return EncoderDecoder(
        vocab=vocab,
        dim=dim,
        context=config.int("max_position_embeddings", 1024),
        decoder_vocab=None if target == vocab else target,
        embedding=embedding,
        decoder_embedding=Ref(path="embedding") if one else embedding,
        encoder=encoder.replace(position=position),
        decoder=decoder.replace(position=position),
        logits_bias=bart.has_bias(config),
        decoder_start=config.take("decoder_start_token_id", None, int),
        init=Normal(std=config.float("init_std", 0.02)),
    )


def write(spec: Spec, config: dict[str, Any]) -> dict[str, Any]:
    model, semantic = bart.write_sides(spec, config, "marian")
    semantic["share_encoder_decoder_embeddings"] = model.decoder_embedding.kind == "ref"
    semantic["decoder_vocab_size"] = model.decoder_vocab or model.vocab
    if not config:
        semantic |= {"architectures": ["MarianMTModel"], "model_type": "marian"}
        semantic["pad_token_id"] = model.decoder_start  # Marian's targets begin with padding
    defaults = bart.DEFAULTS | {"share_encoder_decoder_embeddings": True, "decoder_vocab_size": model.vocab}
    return faithful("marian", read, updated(config, semantic, defaults), model, bart.bias_shapes(model))


def keymap(spec: Spec, stored: Iterable[str], config: dict[str, Any]) -> KeyMap:
    model: Any = spec
    stored = set(stored)
    prefix = bart.prefix_of(stored)
    source, target = f"{prefix}encoder.embed_tokens.weight", f"{prefix}decoder.embed_tokens.weight"
    sines = (config.get("max_position_embeddings") or 1024, model.dim)
    rules: list[Rule] = [Keep(f"{prefix}{side}.embed_positions.weight", sines) for side in ("encoder", "decoder")]
    if model.decoder_embedding.kind == "ref":
        names = [f"{prefix}shared.weight", source, target, "lm_head.weight"]
        rules += shared(names, "embedding.table.weight", stored)
    else:
        rules.append(Rename(source, "embedding.table.weight"))
        rules += shared([target, "lm_head.weight"], "decoder_embedding.table.weight", stored)
    return KeyMap(rules + bart.layers(model, prefix))


MARIAN = family(Family(name="marian", model_types=("marian",), read=read, write=write, keymap=keymap))
