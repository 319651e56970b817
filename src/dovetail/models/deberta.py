"""DeBERTa-v2 and v3: post-norm encoders whose scores know content and distance apart, by one table for all layers.

Which heads there are is told by the stored tensors, by `architectures` where there are none. v3's own checkpoints carry
the masked-language-model head of its paper (lm_predictions) and the discriminator that it was trained with
(mask_predictions), which is kept and not used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dovetail.errors import ConfigError
from dovetail.models.activations import ACTIVATIONS, activation_name
from dovetail.models.bert import both, labels, lacks, layer_rules, write_labels
from dovetail.models.config import ConfigReader
from dovetail.models.encoder import Encoder
from dovetail.models.family import Family, expect, faithful, family, updated
from dovetail.models.keymap import Keep, KeyMap, Rename, Rule, shared
from dovetail.parts.attention.softmax import Attention
from dovetail.parts.block import PostNorm
from dovetail.parts.convolved import PostConvolved
from dovetail.parts.embedding import LinearHead
from dovetail.parts.feedforward.mlp import Mlp
from dovetail.parts.init import Normal
from dovetail.parts.mlm_head import MlmHead
from dovetail.parts.norm import LayerNorm
from dovetail.parts.pooling import DensePooling, First
from dovetail.parts.position.absolute import Learned
from dovetail.parts.position.base import NoPosition
from dovetail.parts.position.relative import Deberta
from dovetail.spec import Ref, Spec

# What transformers assumes where a config is silent.
DEFAULTS: dict[str, Any] = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
    "relative_attention": False,
    "position_biased_input": True,
    "position_buckets": -1,
    "norm_rel_ebd": "none",
    "legacy": True,
    "conv_act": "tanh",
    "pooler_dropout": 0.0,
    "pooler_hidden_act": "gelu",
    "cls_dropout": None,
}
_TABLE = "blocks.0.mixer.position"
_QUESTION, _CLASSIFIER = "qa_outputs", "classifier"
_HEADS = "Model ForMaskedLM ForSequenceClassification ForTokenClassification ForQuestionAnswering".split()  # noqa: SIM905
# The head for masked tokens by its layer, norm, bias: transformers' first, and the one that v3 was trained with.
_LEGACY = tuple(f"cls.predictions.{name}" for name in ("transform.dense", "transform.LayerNorm", "bias"))
_NEW = tuple(f"lm_predictions.lm_head.{name}" for name in ("dense", "LayerNorm", "bias"))


def read(config: ConfigReader) -> Encoder:
    dim, heads = config.int("hidden_size"), config.int("num_attention_heads")
    if dim % heads:
        raise config.contradiction(f"hidden_size {dim} is not a multiple of num_attention_heads {heads}")
    config.only("embedding_size", [dim], "embeddings narrower than the model are not supported")
    config.only("attention_head_size", [dim // heads], "heads of another width are not supported")
    config.only("tie_word_embeddings", [True], "the head is the embedding's transpose here")
    norm, dropout = (
        LayerNorm(eps=config.float("layer_norm_eps", 1e-7, least=0.0)),
        config.float("hidden_dropout_prob", 0.1),
    )
    activation = config.choose("hidden_act", ACTIVATIONS, "gelu")
    context = config.int("max_position_embeddings", 512)
    position, scale = read_position(config, dim // heads, norm, dropout, context)
    attention = Attention(
        heads=heads,
        bias="all",
        dropout=config.float("attention_probs_dropout_prob", 0.1),
        position=position,
        scale=scale,
    )
    feedforward = Mlp(hidden=config.int("intermediate_size"), activation=activation)
    block = PostNorm(mixer=attention, feedforward=feedforward, norm=norm, dropout=dropout)
    rest = block
    if isinstance(position, Deberta):
        rest = block.replace(mixer=attention.replace(position=Ref(path=_TABLE)))
    block = read_convolution(config, block)
    depth = config.int("num_hidden_layers")
    return Encoder(
        vocab=config.int("vocab_size"),
        dim=dim,
        depth=depth,
        context=context,
        position=Learned() if config.bool("position_biased_input", True) else NoPosition(),
        norm_in=norm,
        blocks=(block, *[rest] * (depth - 1)),
        norm=None,
        dropout=dropout,
        token_types=config.take("type_vocab_size", 0, int),
        init=Normal(std=config.float("initializer_range", 0.02)),
        **read_heads(config, activation, norm, dropout),
    )


def read_convolution(config: ConfigReader, block: PostNorm) -> PostNorm:
    """The first block, with the convolution beside it that the large models of v2 have."""
    kernel = config.take("conv_kernel_size", 0, int)
    activation = config.choose("conv_act", ACTIVATIONS, "tanh")
    config.only("conv_groups", [1], "convolutions in groups are not supported")
    if kernel <= 0:
        return block
    parts = {name: getattr(block, name) for name in type(block).model_fields}
    return PostConvolved(**parts, kernel=kernel, activation=activation)


def read_position(
    config: ConfigReader, width: int, norm: LayerNorm, dropout: float, context: int
) -> tuple[Spec, float | None]:
    """(the position of the attentions, their scale where it is not the position's)."""
    said = config.take("pos_att_type", [], (str, list))
    terms = [term.strip() for term in said.lower().split("|")] if isinstance(said, str) else said
    if not set(terms) <= {"c2p", "p2c"} or len(set(terms)) < len(terms):
        raise ConfigError(
            f"config key 'pos_att_type' is {said!r}", where=config.where, remedy="supported: c2p, p2c, once each"
        )
    relative = config.bool("relative_attention", False)
    buckets, distance = (config.take(key, -1, int) for key in ("position_buckets", "max_relative_positions"))
    norms = [name.strip() for name in config.take("norm_rel_ebd", "none", str).lower().split("|")]
    if not set(norms) <= {"none", "layer_norm"}:
        raise ConfigError(
            f"config key 'norm_rel_ebd' is {norms}", where=config.where, remedy="supported: none, layer_norm"
        )
    own = not config.bool("share_att_key", False)
    if not relative:
        if "layer_norm" in norms:
            raise config.contradiction("norm_rel_ebd without relative_attention, whose table it is of")
        # The scale counts the terms that the config names, even where none is there.
        return NoPosition(), ((1 + len(terms)) * width) ** -0.5 if terms else None
    if not terms:
        raise config.contradiction("relative_attention without pos_att_type, which says what it adds to the scores")
    if own:
        raise ConfigError(
            "config key 'share_att_key' is false: maps for distances of their own are not supported",
            where=config.where,
            remedy="every release of DeBERTa-v2 and v3 shares them",
        )
    return Deberta(
        buckets=max(buckets, 0),
        max_distance=distance if distance > 0 else context,
        terms=tuple(terms),  # type: ignore[arg-type]  # validated above
        norm=norm if "layer_norm" in norms else None,
        dropout=dropout,
    ), None


def read_heads(config: ConfigReader, activation: Spec, norm: LayerNorm, dropout: float) -> dict[str, Any]:
    stored, arch = config.shapes, architecture(config)
    config.bool("legacy", True)
    pooler_dropout = config.float("pooler_dropout", 0.0)
    pooler_activation = config.choose("pooler_hidden_act", ACTIVATIONS, "gelu")
    config.only("pooler_hidden_size", [config.int("hidden_size")], "a pooler of another width is not supported")
    classifier_dropout = config.float("cls_dropout", dropout)
    if stored:
        mlm = any(f"{names[0]}.weight" in stored for names in (_LEGACY, _NEW))
        pooled = "pooler.dense.weight" in stored
        top = next((stored[f"{n}.weight"][0] for n in (_CLASSIFIER, _QUESTION) if f"{n}.weight" in stored), None)
        asks = f"{_QUESTION}.weight" in stored
    else:
        mlm, pooled, asks = (arch == f"For{n}" for n in ("MaskedLM", "SequenceClassification", "QuestionAnswering"))
        top = labels(config.data) if pooled or asks or arch == "ForTokenClassification" else None
    said: dict[str, Any] = {"head": MlmHead(activation=activation, norm=norm) if mlm else None}
    if pooled:
        said["pooling"] = DensePooling(of=First(), activation=pooler_activation, dropout=pooler_dropout)
    if top is not None:
        said |= {"classifier": LinearHead(bias=True), "classes": top}
        said["classifier_dropout"] = classifier_dropout if pooled else 0.0 if asks else dropout
    return said


def architecture(config: ConfigReader) -> str | None:
    """The class that `architectures` names, without its prefix. Raises ConfigError for one with another head."""
    for said in config.data.get("architectures") or ():
        short = str(said).removeprefix("DebertaV2")
        if short in _HEADS:
            return short
        raise ConfigError(
            f"architecture {said!r} has a head that is not supported",
            where=f"{config.where}: architectures",
            remedy=f"supported: {', '.join(f'DebertaV2{head}' for head in _HEADS)}",
        )
    return None


def write(spec: Spec, config: dict[str, Any]) -> dict[str, Any]:
    model = expect(spec, Encoder, "deberta-v2", "the root")
    block = expect(model.blocks[0], PostNorm, "deberta-v2", "blocks.0")
    mixer = expect(block.mixer, Attention, "deberta-v2", "blocks.0.mixer")
    ff = expect(block.feedforward, Mlp, "deberta-v2", "blocks.0.feedforward")
    norm = expect(block.norm, LayerNorm, "deberta-v2", "blocks.0.norm")
    semantic: dict[str, Any] = {
        "vocab_size": model.vocab,
        "hidden_size": model.dim,
        "num_hidden_layers": model.depth,
        "num_attention_heads": mixer.sizes(model.dim)[0],
        "intermediate_size": ff.width(model.dim),
        "hidden_act": activation_name(ff.activation, "deberta-v2", config.get("hidden_act")),
        "hidden_dropout_prob": block.dropout,
        "attention_probs_dropout_prob": mixer.dropout,
        "type_vocab_size": model.token_types,
        "layer_norm_eps": norm.eps,
        "position_biased_input": not isinstance(model.position, NoPosition),
    }
    if model.context is not None:
        semantic["max_position_embeddings"] = model.context
    if config.get("pooler_hidden_size") is not None:
        semantic["pooler_hidden_size"] = model.dim
    if isinstance(block, PostConvolved):
        semantic["conv_kernel_size"] = block.kernel
        semantic["conv_act"] = activation_name(block.activation, "deberta-v2", config.get("conv_act"))
    elif config.get("conv_kernel_size"):
        semantic["conv_kernel_size"] = 0
    semantic |= write_position(model, mixer, config) | write_heads(model, config)
    if not config:
        semantic |= {"model_type": "deberta-v2", "torch_dtype": "float32"}
        semantic["initializer_range"] = getattr(model.init, "std", 0.02)
    return faithful("deberta-v2", read, updated(config, semantic, DEFAULTS), model, shapes(model, config))


def write_position(model: Encoder, mixer: Attention, config: dict[str, Any]) -> dict[str, Any]:
    """The keys that `read_position` reads, where they say something else."""
    position = mixer.position
    if not isinstance(position, Deberta):
        return {"relative_attention": False, "norm_rel_ebd": "none"}
    semantic: dict[str, Any] = {"relative_attention": True, "share_att_key": True}
    said = config.get("pos_att_type")
    terms = [term.strip() for term in said.lower().split("|")] if isinstance(said, str) else said
    if terms != list(position.terms):
        semantic["pos_att_type"] = list(position.terms)
    if max(config.get("position_buckets") or -1, 0) != position.buckets:
        semantic["position_buckets"] = position.buckets or -1
    stated = config.get("max_relative_positions") or -1
    if (stated if stated > 0 else model.context) != position.max_distance:
        semantic["max_relative_positions"] = position.max_distance
    if ("layer_norm" in (config.get("norm_rel_ebd") or "none").lower()) != (position.norm is not None):
        semantic["norm_rel_ebd"] = "layer_norm" if position.norm is not None else "none"
    return semantic


def write_heads(model: Encoder, config: dict[str, Any]) -> dict[str, Any]:
    """The keys that `read_heads` reads."""
    semantic: dict[str, Any] = {}
    pooling = model.pooling
    if pooling is not None:
        pooling = expect(pooling, DensePooling, "deberta-v2", "pooling")
        given = config.get("pooler_hidden_act")
        semantic["pooler_hidden_act"] = activation_name(pooling.activation, "deberta-v2", given)
        semantic["pooler_dropout"] = pooling.dropout
    semantic |= write_labels(model.classes, config) if model.classes else {}
    said = config.get("cls_dropout")
    if pooling is not None and model.classes and model.classifier_dropout != (model.dropout if said is None else said):
        semantic["cls_dropout"] = model.classifier_dropout
    if not config or lacks(model, False, architecture(ConfigReader(config))):
        kind = "ForMaskedLM" if model.head else "Model"
        if model.classes:
            kind = "ForSequenceClassification" if pooling else "ForTokenClassification"
        semantic |= {"architectures": [f"DebertaV2{kind}"]}
    return semantic


def shapes(model: Encoder, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes from which `read` tells which heads there are."""
    found: dict[str, tuple[int, ...]] = {"embeddings.word_embeddings.weight": (model.vocab, model.dim)}
    if model.head is not None:
        found[f"{_LEGACY[0]}.weight"] = (model.dim, model.dim)
    if model.pooling is not None:
        found["pooler.dense.weight"] = (model.dim, model.dim)
    if model.classes:
        found[f"{top_of(model, set(), config)}.weight"] = (model.classes, model.dim)
    return found


def top_of(model: Encoder, stored: set[str], config: dict[str, Any]) -> str:
    """What the classifier is called: that of spans of an answer has a name of its own."""
    if stored:
        return _QUESTION if f"{_QUESTION}.weight" in stored else _CLASSIFIER
    asks = any(str(name).endswith("ForQuestionAnswering") for name in config.get("architectures") or ())
    return _QUESTION if asks and model.pooling is None else _CLASSIFIER


def keymap(spec: Spec, stored: Iterable[str], config: dict[str, Any]) -> KeyMap:
    model: Any = spec
    names = set(stored)
    headed = model.head is not None or model.classifier is not None
    p = "deberta." if (any(n.startswith("deberta.") for n in names) if names else headed) else ""
    rules: list[Rule] = [Keep(f"{p}embeddings.position_ids"), Keep("mask_predictions.*")]
    if isinstance(model.position, Learned):
        rules.append(Rename(f"{p}embeddings.position_embeddings.weight", "position.table.weight"))
    else:
        rules.append(Keep(f"{p}embeddings.position_embeddings.weight"))
    if model.token_types:
        rules.append(Rename(f"{p}embeddings.token_type_embeddings.weight", "types.weight"))
    rules += both(f"{p}embeddings.LayerNorm", "norm_in")
    table = model.blocks[0].mixer.position
    if isinstance(table, Deberta):
        rules.append(Rename(f"{p}encoder.rel_embeddings.weight", f"{_TABLE}.table.weight"))
        rules += both(f"{p}encoder.LayerNorm", f"{_TABLE}.norm") if table.norm is not None else []
    if isinstance(model.blocks[0], PostConvolved):
        rules += both(f"{p}encoder.conv.conv", "blocks.0.beside") + both(
            f"{p}encoder.conv.LayerNorm", "blocks.0.norm_beside"
        )
    rules += layer_rules(model, f"{p}encoder.layer", ("query_proj", "key_proj", "value_proj"), names)
    return KeyMap(rules + head_rules(model, p, names, config))


def head_rules(model: Any, p: str, stored: set[str], config: dict[str, Any]) -> list[Rule]:
    tables, rules = [f"{p}embeddings.word_embeddings.weight"], []
    if model.head is not None:
        new = f"{_NEW[0]}.weight" in stored if stored else config.get("legacy") is False
        layer, norm, bias = _NEW if new else _LEGACY
        rules += both(layer, "head_part.linear") + both(norm, "head_part.norm")
        if new:
            rules.append(Rename(bias, "head_part.bias"))
        else:
            tables.append("cls.predictions.decoder.weight")
            rules += shared([bias, "cls.predictions.decoder.bias"], "head_part.bias", stored)
    if model.pooling is not None:
        rules += both("pooler.dense", "pooling.linear")
    if model.classes:
        rules += both(top_of(model, stored, config), "classifier.linear")
    return shared(tables, "embedding.table.weight", stored) + rules


FAMILY = family(Family(name="deberta-v2", model_types=("deberta-v2",), read=read, write=write, keymap=keymap))
