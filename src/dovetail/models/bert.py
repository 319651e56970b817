"""BERT: a post-norm encoder with learned positions and token types, bare or with the heads that its checkpoints carry.

RoBERTa and RoFormer share its blocks and the form of its heads. Which heads there are is told by the stored tensors
(releases say BertForMaskedLM and carry a pooler and a next-sentence head too), by `architectures` where there are none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dovetail.errors import ConfigError
from dovetail.models.activations import ACTIVATIONS, activation_name
from dovetail.models.config import ConfigReader
from dovetail.models.encoder import Encoder
from dovetail.models.family import Family, cannot_say, expect, faithful, family, updated
from dovetail.models.keymap import Concat, Keep, KeyMap, Rename, Rule, Twin, shared
from dovetail.parts.activation import Gelu, Tanh
from dovetail.parts.attention.softmax import Attention
from dovetail.parts.block import PostNorm
from dovetail.parts.embedding import LinearHead
from dovetail.parts.feedforward.mlp import Mlp
from dovetail.parts.init import Normal
from dovetail.parts.mlm_head import MlmHead
from dovetail.parts.norm import LayerNorm
from dovetail.parts.pooling import DensePooling, First
from dovetail.parts.position.absolute import Learned
from dovetail.parts.position.base import NoPosition
from dovetail.spec import Ref, Spec

# What transformers assumes where a config is silent.
DEFAULTS = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "tie_word_embeddings": True,
    "classifier_dropout": None,
}
_HEADS = ["Model", "ForMaskedLM", "ForPreTraining", "ForNextSentencePrediction"]
_HEADS += ["ForSequenceClassification", "ForTokenClassification"]
_REFUSED = ["ForQuestionAnswering", "ForMultipleChoice", "LMHeadModel", "ForCausalLM"]


@dataclass(frozen=True)
class Layout:
    """How a family's names differ. cls: its classes' prefix. prefix: of the encoder's tensors under a head.

    head: of the masked-language-model head: its layer, that layer's norm, the map to ids, the bias.
    deep: a classifier with a layer of its own on the first token instead of the pooler. pooler: whether the bare model
    has one. pairs: whether it was trained to tell the next sentence. fixed: heads that are GELU and tanh whatever the
    config's activation is.
    """

    cls: str
    prefix: str
    head: tuple[str, str, str, str]
    deep: bool = False
    pooler: bool = True
    pairs: bool = False
    fixed: bool = False


PREDICTIONS = (
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.decoder",
    "cls.predictions.bias",
)
NAMES = Layout(cls="Bert", prefix="bert", head=PREDICTIONS, pairs=True)


def read(config: ConfigReader) -> Encoder:
    config.only("position_embedding_type", ["absolute"], "relative keys are not supported")
    config.only("pooler_type", ["first_token_transform"], "the pooler is a layer on the first token")
    # Sizes of a pooler that no release has.
    config.inert(
        "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head"
    )
    positions = config.int("max_position_embeddings", 512)
    return read_encoder(config, NAMES, positions, NoPosition()).replace(position=Learned())


def read_encoder(config: ConfigReader, names: Layout, context: int, position: Spec) -> Encoder:
    """What BERT, RoBERTa and RoFormer agree in. position: of the attentions."""
    config.only("is_decoder", [False], "an encoder that is made causal is not supported; load it without is_decoder")
    config.only("add_cross_attention", [False], "an encoder that reads another is not supported")
    dim, heads = config.int("hidden_size"), config.int("num_attention_heads")
    if dim % heads:
        raise config.contradiction(f"hidden_size {dim} is not a multiple of num_attention_heads {heads}")
    norm = LayerNorm(eps=config.float("layer_norm_eps", 1e-12, least=0.0))
    dropout = config.float("hidden_dropout_prob", 0.1)
    activation = config.choose("hidden_act", ACTIVATIONS, "gelu")
    attention = Attention(
        heads=heads, bias="all", dropout=config.float("attention_probs_dropout_prob", 0.1), position=position
    )
    feedforward = Mlp(hidden=config.int("intermediate_size"), activation=activation)
    tied = config.bool("tie_word_embeddings", True)
    config.take("classifier_dropout", None)
    return Encoder(
        vocab=config.int("vocab_size"),
        dim=dim,
        depth=config.int("num_hidden_layers"),
        context=context,
        norm_in=norm,
        blocks=(PostNorm(mixer=attention, feedforward=feedforward, norm=norm, dropout=dropout),),
        norm=None,
        dropout=dropout,
        token_types=config.int("type_vocab_size", 2),
        init=Normal(std=config.float("initializer_range", 0.02)),
        **_read_heads(config, names, activation, norm, tied, dropout),
    )


def _read_heads(
    config: ConfigReader, names: Layout, activation: Any, norm: LayerNorm, tied: bool, dropout: float
) -> dict[str, Any]:
    stored, arch = config.shapes, _architecture(config, names)
    mlm = any(name.startswith(names.head[0]) for name in stored) or arch in ("ForMaskedLM", "ForPreTraining")
    follows = "cls.seq_relationship.weight" in stored if stored else arch == "ForPreTraining"
    sentence = names.pairs and (follows or arch == "ForNextSentencePrediction")
    top = next((stored[n] for n in ("classifier.weight", "classifier.out_proj.weight") if n in stored), None)
    labelled = top is not None or arch in ("ForSequenceClassification", "ForTokenClassification")
    pooler = names.pooler and (
        any(name.endswith("pooler.dense.weight") for name in stored) if stored else arch in (None, "Model")
    )
    each = arch == "ForTokenClassification" or (  # the classifier reads every token
        arch != "ForSequenceClassification" and "classifier.weight" in stored and (names.deep or not pooler)
    )
    said: dict[str, Any] = {"head": None}
    if mlm:
        act = Gelu() if names.fixed else activation
        said["head"] = MlmHead(activation=act, norm=norm, output=Ref(path="embedding") if tied else LinearHead())
    if labelled and names.deep and not each:
        drop = config.float("classifier_dropout", dropout)
        act = Tanh() if names.fixed else activation
        said["pooling"] = DensePooling(of=First(), activation=act, dropout=drop)
    elif (pooler or labelled or sentence) and not each:
        said["pooling"] = DensePooling(of=First())
    if labelled:
        said |= {"classifier": LinearHead(bias=True), "classes": top[0] if top else labels(config.data)}
        said["classifier_dropout"] = config.float("classifier_dropout", dropout)
    elif sentence:
        said |= {"classifier": LinearHead(bias=True), "classes": 2}
    return said


def _architecture(config: ConfigReader, names: Layout) -> str | None:
    """Which class the config names, without the family's prefix; None for one that is not known. Raises ConfigError."""
    named = config.take("architectures", [], (str, list))
    for said in [named] if isinstance(named, str) else named:
        short = str(said).removeprefix("XLM").removeprefix(names.cls)
        if short in _REFUSED:
            raise ConfigError(
                f"architecture {said!r} has a head that is not supported",
                where=f"{config.where}: architectures",
                remedy=f"supported: {', '.join(names.cls + head for head in _HEADS)}; drop the head's tensors to load the rest",
            )
        if short in _HEADS:
            return short
    return None


def labels(config: dict[str, Any]) -> int:
    """How many classes a config says; two where it says none."""
    return int(config.get("num_labels") or len(config.get("id2label") or ()) or 2)


def write_labels(classes: int, config: dict[str, Any]) -> dict[str, Any]:
    """The keys that `labels` reads, where they say another number."""
    if classes == labels(config):
        return {}
    said = {"id2label": {str(i): f"LABEL_{i}" for i in range(classes)}}
    said |= {"label2id": {f"LABEL_{i}": i for i in range(classes)}}
    return said | ({"num_labels": classes} if "num_labels" in config else {})


def write(spec: Spec, config: dict[str, Any]) -> dict[str, Any]:
    model, semantic = write_encoder(spec, config, "bert", NAMES)
    if model.context is not None:
        semantic["max_position_embeddings"] = model.context
    defaults = DEFAULTS | {"max_position_embeddings": 512}
    return faithful("bert", read, updated(config, semantic, defaults), model, said_shapes(model, NAMES, config))


def write_encoder(spec: Spec, config: dict[str, Any], layout: str, names: Layout) -> tuple[Encoder, dict[str, Any]]:
    """The keys that `read_encoder` reads."""
    model = expect(spec, Encoder, layout, "the root")
    block = expect(model.blocks[0], PostNorm, layout, "blocks.0")
    mixer = expect(block.mixer, Attention, layout, "blocks.0.mixer")
    ff = expect(block.feedforward, Mlp, layout, "blocks.0.feedforward")
    norm = expect(block.norm, LayerNorm, layout, "blocks.0.norm")
    if not model.token_types:
        raise cannot_say(layout, "an embedding without token types", "token_types")
    head = None if model.head is None else expect(model.head, MlmHead, layout, "head")
    semantic: dict[str, Any] = {
        "vocab_size": model.vocab,
        "hidden_size": model.dim,
        "num_hidden_layers": model.depth,
        "num_attention_heads": mixer.sizes(model.dim)[0],
        "intermediate_size": ff.width(model.dim),
        "hidden_act": activation_name(ff.activation, layout, config.get("hidden_act")),
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": mixer.dropout,
        "type_vocab_size": model.token_types,
        "layer_norm_eps": norm.eps,
    }
    if head is not None:
        semantic["tie_word_embeddings"] = head.output.kind == "ref"
    pairs = _tells_pairs(model, names, config)
    if model.classes and not pairs:
        semantic |= write_labels(model.classes, config)
        rate = model.classifier_dropout
        semantic["classifier_dropout"] = None if rate == model.dropout else rate
    kind = "ForMaskedLM" if head else "ForSequenceClassification" if model.classes else "Model"
    kind = "ForTokenClassification" if model.classes and model.pooling is None else kind
    kind = "ForPreTraining" if head and pairs else "ForNextSentencePrediction" if pairs else kind
    if not config or lacks(model, pairs, _architecture(ConfigReader(config), names)):
        semantic["architectures"] = [f"{'XLM' * (config.get('model_type') == 'xlm-roberta')}{names.cls}{kind}"]
    if not config:
        semantic |= {"model_type": layout, "torch_dtype": "float32"}
        semantic["initializer_range"] = getattr(model.init, "std", 0.02)
    return model, semantic


def lacks(model: Encoder, pairs: bool, said: str | None) -> bool:
    """Whether a model has been given other heads than the class that its config names."""
    judged = model.classes is not None and not pairs
    return {
        "ForMaskedLM": model.head is None,
        "ForPreTraining": model.head is None,
        "ForNextSentencePrediction": not pairs,
        "ForSequenceClassification": not judged or model.pooling is None,
        "ForTokenClassification": not judged or model.pooling is not None,
        "ForQuestionAnswering": not judged or model.pooling is not None,
    }.get(said or "", False)


def _tells_pairs(model: Encoder, names: Layout, config: dict[str, Any]) -> bool:
    """Whether the classifier is the one that tells whether the second sentence follows the first.

    Without a head for masked tokens a new one for two classes is like any other.
    """
    if not names.pairs or model.pooling is None or model.classes != 2:
        return False
    if model.head is not None or not config:
        return model.head is not None
    said = _architecture(ConfigReader(config), names)
    return not model.classifier_dropout and said in (None, "Model", "ForNextSentencePrediction")


def said_shapes(model: Encoder, names: Layout, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes from which `read_encoder` tells which heads there are."""
    shapes: dict[str, tuple[int, ...]] = {"embeddings.word_embeddings.weight": (model.vocab, model.dim)}
    if model.head is not None:
        shapes[f"{names.head[0]}.weight"] = (model.dim, model.dim)
    if model.pooling is not None and not (names.deep and model.classes):
        shapes["pooler.dense.weight"] = (model.dim, model.dim)
    if model.classes:
        deep = names.deep and model.pooling is not None
        top = "cls.seq_relationship" if _tells_pairs(model, names, config) else f"classifier{'.out_proj' * deep}"
        shapes[f"{top}.weight"] = (model.classes, model.dim)
    return shapes


def keymap_of(names: Layout) -> Any:
    """The key map of a family."""

    def keymap(spec: Spec, stored: Iterable[str], config: dict[str, Any]) -> KeyMap:
        model: Any = spec
        return KeyMap(encoder_rules(model, names, set(stored)))

    return keymap


def encoder_rules(model: Encoder, names: Layout, stored: set[str]) -> list[Rule]:
    headed = model.head is not None or model.classifier is not None
    p = f"{names.prefix}." if (any(n.startswith(f"{names.prefix}.") for n in stored) if stored else headed) else ""
    tables = [f"{p}embeddings.word_embeddings.weight"]
    rules: list[Rule] = [Keep(f"{p}embeddings.{name}") for name in ("position_ids", "token_type_ids")]
    rules.append(Rename(f"{p}embeddings.token_type_embeddings.weight", "types.weight"))
    if model.position.kind == "learned":
        rules.append(Rename(f"{p}embeddings.position_embeddings.weight", "position.table.weight"))
    rules += _norm(f"{p}embeddings.LayerNorm", "norm_in", stored)
    rules += layer_rules(model, f"{p}encoder.layer", ("query", "key", "value"), stored)
    layer, norm, output, bias = names.head
    if isinstance(model.head, MlmHead):
        rules += both(layer, "head_part.linear") + _norm(norm, "head_part.norm", stored)
        biases = [bias, f"{output}.bias"]
        if model.head.output.kind == "ref":
            tables.append(f"{output}.weight")
            rules += shared(biases, "head_part.bias", stored)
        else:  # two biases of which the map's own is used, where both are there
            used = biases[1] if biases[1] in stored else biases[0]
            rules += [Rename(f"{output}.weight", "head_part.output.linear.weight"), Rename(used, "head_part.bias")]
            rules.append(Keep(bias))
            if used == bias:
                rules.append(Twin(biases[1], bias, beside=f"{output}.weight"))  # transformers reads the map's own
    rules += shared(tables, "embedding.table.weight", stored)
    pooled = model.pooling is not None
    if names.deep and model.classes and pooled:
        rules += both("classifier.dense", "pooling.linear") + both("classifier.out_proj", "classifier.linear")
    elif isinstance(model.pooling, DensePooling):
        rules += both(f"{p}pooler.dense", "pooling.linear")
    if model.classes and not (names.deep and pooled):
        pairs = pooled and ("cls.seq_relationship.weight" in stored if stored else _tells_pairs(model, names, {}))
        rules += both("cls.seq_relationship" if pairs else "classifier", "classifier.linear")
    # Where a directory of sentence-transformers pools in another way, its encoder's own pooler stands idle.
    return [*rules, Keep(f"{p}pooler.dense.*"), Keep("cls.seq_relationship.*")]


def layer_rules(model: Any, at: str, maps: tuple[str, str, str], stored: set[str]) -> list[Rule]:
    """The blocks, whose tensors stand under `at`. maps: what the three maps of an attention are called."""
    rules: list[Rule] = []
    for i in range(model.depth):
        theirs, ours = f"{at}.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            own = tuple(f"{theirs}.attention.self.{n}.{kind}" for n in maps)
            rules.append(Concat(own, f"{ours}.mixer.qkv.{kind}", (model.dim,) * 3))
        rules += both(f"{theirs}.attention.output.dense", f"{ours}.mixer.out")
        rules += both(f"{theirs}.intermediate.dense", f"{ours}.feedforward.up")
        rules += both(f"{theirs}.output.dense", f"{ours}.feedforward.down")
        rules += _norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.norm_mixer", stored)
        rules += _norm(f"{theirs}.output.LayerNorm", f"{ours}.norm_feedforward", stored)
    return rules


def both(theirs: str, ours: str) -> list[Rule]:
    """A weight and a bias under one name."""
    return [Rename(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in ("weight", "bias")]


def _norm(theirs: str, ours: str, stored: set[str]) -> list[Rule]:
    """The first releases call a norm's weight gamma and its bias beta."""
    old = f"{theirs}.gamma" in stored
    return [Rename(f"{theirs}.{a if old else b}", f"{ours}.{b}") for a, b in (("gamma", "weight"), ("beta", "bias"))]


def untyped(config: dict[str, Any], cls: str) -> bool:
    """A config of 2019 without model_type: its architecture's name, else BERT's keys."""
    said = [str(name) for name in config.get("architectures") or ()]
    if said:
        return any(name.startswith(cls) for name in said)
    theirs = {"attention_probs_dropout_prob", "hidden_dropout_prob", "intermediate_size", "type_vocab_size"}
    return theirs <= config.keys() and (config["type_vocab_size"] == 1) == (cls == "Roberta")


BERT = family(
    Family(
        name="bert",
        model_types=("bert",),
        read=read,
        write=write,
        keymap=keymap_of(NAMES),
        recognise=lambda config: untyped(config, "Bert"),
    )
)
