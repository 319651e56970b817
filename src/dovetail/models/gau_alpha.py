"""GAU-alpha: an encoder of gated attention units alone, with rotary positions and token types.

The layout is that of JunnYu/GAU-alpha-pytorch, into which the checkpoint of ZhuiyiTechnology/GAU-alpha was converted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dovetail.models.activations import ACTIVATIONS, activation_name
from dovetail.models.config import ConfigReader
from dovetail.models.encoder import Encoder
from dovetail.models.family import Family, expect, faithful, family, updated
from dovetail.models.keymap import KeyMap, Rename, Rule, shared
from dovetail.parts.attention.gau import GatedAttentionUnit
from dovetail.parts.attention.normaliser import Softmax, SoftmaxPlus
from dovetail.parts.block import PostNorm
from dovetail.parts.embedding import LinearHead
from dovetail.parts.init import Normal
from dovetail.parts.norm import RmsNorm
from dovetail.parts.position.rotary import Rope
from dovetail.spec import Ref, Spec

# What GAUAlphaConfig assumes where a config is silent.
_DEFAULTS = {
    "hidden_act": "swish",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "type_vocab_size": 2,
    "attention_key_size": 128,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "use_bias": False,
    "normalization": "softmax_plus",
    "attention_scale": True,
    "tie_word_embeddings": True,
}
_NORMALISERS: dict[str, Spec] = {"softmax_plus": SoftmaxPlus(), "softmax": Softmax()}
_BODY, _HEAD = "gau_alpha.", "cls.predictions.decoder.weight"
_WORDS = "embeddings.word_embeddings.weight"


def read(config: ConfigReader) -> Encoder:
    dim = config.int("hidden_size")
    if config.int("embedding_size", dim) != dim:
        raise config.contradiction("embedding_size differs from hidden_size, and the layout stores no map between them")
    why = "squared_relu divides by the length of each row there, where dovetail's relu2 has one length"
    config.only("normalization", _NORMALISERS, why)
    dropout = config.float("hidden_dropout_prob", 0.1)
    norm = RmsNorm(eps=config.float("layer_norm_eps", 1e-12, least=0.0), affine=False)
    unit = GatedAttentionUnit(
        hidden=config.int("intermediate_size"),
        key_dim=config.int("attention_key_size", 128),
        bias=config.bool("use_bias", False),
        activation=config.choose("hidden_act", ACTIVATIONS, "swish"),
        normaliser=config.choose("normalization", _NORMALISERS, "softmax_plus"),
        scale=None if config.bool("attention_scale", True) else 1.0,
        dropout=config.float("attention_probs_dropout_prob", 0.1),
        position=Rope(layout="interleaved"),
    )
    tied = config.bool("tie_word_embeddings", True)
    return Encoder(
        vocab=config.int("vocab_size"),
        dim=dim,
        depth=config.int("num_hidden_layers"),
        context=config.int("max_position_embeddings", 512),
        token_types=config.int("type_vocab_size", 2),
        norm_in=norm,
        blocks=(PostNorm(mixer=unit, feedforward=None, norm=norm, dropout=dropout),),
        norm=None,
        dropout=dropout,
        head=(Ref(path="embedding") if tied else LinearHead()) if _has_head(config) else None,
        init=Normal(std=config.float("initializer_range", 0.02)),
    )


def _has_head(config: ConfigReader) -> bool:
    """The stored tensors tell: the body of a model with a head has a prefix. Without them the architecture's name does."""
    if config.shapes:
        return any(name.startswith(_BODY) for name in config.shapes)
    return str((config.data.get("architectures") or ["GAUAlphaForMaskedLM"])[0]) != "GAUAlphaModel"


def write(spec: Spec, config: dict[str, Any]) -> dict[str, Any]:
    model = expect(spec, Encoder, "gau_alpha", "the root")
    block = expect(model.blocks[0], PostNorm, "gau_alpha", "blocks.0")
    unit = expect(block.mixer, GatedAttentionUnit, "gau_alpha", "blocks.0.mixer")
    norm = expect(block.norm, RmsNorm, "gau_alpha", "blocks.0.norm")
    semantic = {
        "vocab_size": model.vocab,
        "hidden_size": model.dim,
        "num_hidden_layers": model.depth,
        "intermediate_size": unit.width(model.dim),
        "attention_key_size": unit.key_dim,
        "type_vocab_size": model.token_types,
        "hidden_act": activation_name(unit.activation, "gau_alpha", config.get("hidden_act", "swish")),
        "hidden_dropout_prob": block.dropout,
        "attention_probs_dropout_prob": unit.dropout,
        "layer_norm_eps": norm.eps,
        "use_bias": unit.bias,
        "normalization": unit.normaliser.kind,
        "attention_scale": unit.scale in (None, unit.key_dim**-0.5),
        "tie_word_embeddings": model.head is None or model.head.kind == "ref",
    }
    if "embedding_size" in config:
        semantic["embedding_size"] = model.dim
    if model.context is not None:
        semantic["max_position_embeddings"] = model.context
    if not config:
        name = "GAUAlphaModel" if model.head is None else "GAUAlphaForMaskedLM"
        semantic |= {"architectures": [name], "model_type": "gau_alpha", "torch_dtype": "float32"}
        semantic["initializer_range"] = getattr(model.init, "std", 0.02)
    written = updated(config, semantic, _DEFAULTS)
    shapes = {_WORDS if model.head is None else _BODY + _WORDS: (model.vocab, model.dim)}
    return faithful("gau_alpha", read, written, model, shapes)


def keymap(spec: Spec, stored: Iterable[str], config: dict[str, Any]) -> KeyMap:
    model: Any = spec
    prefix = "" if model.head is None else _BODY
    rules: list[Rule] = [Rename(f"{prefix}embeddings.token_type_embeddings.weight", "types.weight")]
    words = f"{prefix}{_WORDS}"
    if model.head is not None and model.head.kind == "ref":
        rules += shared([words, _HEAD], "embedding.table.weight", stored)
    else:
        rules.append(Rename(words, "embedding.table.weight"))
        if model.head is not None:
            rules.append(Rename(_HEAD, "head_part.linear.weight"))
    names = {"i_dense": "uvz", "o_dense": "out", "q_scaleoffset": "q_affine", "k_scaleoffset": "k_affine"}
    for i, block in enumerate(model.blocks):
        for theirs, ours in names.items():
            for kind in ("weight", "bias") if block.mixer.bias else ("weight",):
                rules.append(
                    Rename(f"{prefix}encoder.layer.{i}.gau.{theirs}.{kind}", f"blocks.{i}.mixer.{ours}.{kind}")
                )
    return KeyMap(rules)


GAU_ALPHA = family(Family(name="gau_alpha", model_types=("gau_alpha",), read=read, write=write, keymap=keymap))
