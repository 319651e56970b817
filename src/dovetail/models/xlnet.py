"""XLNet: post-norm blocks with Transformer-XL's positions in both directions, two streams for its objective.

Where transformers takes matrices, a model here takes numbers: `ranks` for perm_mask (i does not see j of a later rank,
nor a target itself) and `targets` for target_mapping. Memories of rows before (mems) are not kept, and training does
not drop entries of the sines, which transformers does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dovetail.models.activations import ACTIVATIONS, activation_name
from dovetail.models.config import ConfigReader
from dovetail.models.family import Family, expect, faithful, family, updated
from dovetail.models.keymap import Concat, KeyMap, Rename, Reshape, Rule, expect_shape, shared
from dovetail.models.two_stream import TwoStream
from dovetail.parts.attention.softmax import Attention
from dovetail.parts.biased_head import BiasedHead
from dovetail.parts.block import PostNorm
from dovetail.parts.embedding import LinearHead
from dovetail.parts.feedforward.mlp import Mlp
from dovetail.parts.init import Normal
from dovetail.parts.mask import Permutation
from dovetail.parts.norm import LayerNorm
from dovetail.parts.position.xlnet import XLNet as XLNetPosition
from dovetail.spec import Ref, Spec

# What transformers assumes where a config is silent.
_DEFAULTS = {
    "ff_activation": "gelu",
    "dropout": 0.1,
    "layer_norm_eps": 1e-12,
    "d_head": None,
    "tie_word_embeddings": True,
}
_BODY, _WORDS, _HEAD = "transformer.", "word_embedding.weight", "lm_loss.weight"


def read(config: ConfigReader) -> TwoStream:
    config.only("attn_type", ["bi"], "a one-way XLNet is Transformer-XL: a decoder with position transformer_xl")
    config.only("bi_data", [False], "half a batch read backwards is not supported")
    config.only("same_length", [False], "it belongs to one-way attention")
    config.only("untie_r", [True], "biases shared by all layers are not in this layout")
    if config.take("clamp_len", -1, int) > 0:
        raise config.contradiction("clamp_len cuts distances off, which is not supported", remedy="it must be -1")
    # How much of the rows before is remembered: the caller's choice there, and rows are read whole here.
    config.inert("mem_len", "reuse_len", "use_mems_eval", "use_mems_train", "use_mems", "start_n_top", "end_n_top")
    dim, heads = config.int("d_model"), config.int("n_head")
    if dim % heads:
        raise config.contradiction(f"d_model {dim} is not a multiple of n_head {heads}")
    if config.int("d_head", dim // heads) != dim // heads:
        raise config.contradiction(f"d_head {config.data['d_head']} beside d_model {dim} and n_head {heads}")
    dropout = config.float("dropout", 0.1)
    mixer = Attention(
        heads=heads,
        dropout=dropout,
        mask=Permutation(),
        position=XLNetPosition(),
    )
    feedforward = Mlp(
        hidden=config.int("d_inner"),
        activation=config.choose("ff_activation", ACTIVATIONS, "gelu"),
        dropout=dropout,
    )
    norm = LayerNorm(eps=config.float("layer_norm_eps", 1e-12, least=0.0))
    tied = config.bool("tie_word_embeddings", True)
    head = BiasedHead(output=Ref(path="embedding") if tied else LinearHead())
    return TwoStream(
        vocab=config.int("vocab_size"),
        dim=dim,
        depth=config.int("n_layer"),
        context=config.int("model_max_length", None),  # nothing in the model ends there
        blocks=(PostNorm(mixer=mixer, feedforward=feedforward, norm=norm, dropout=dropout),),
        norm=None,
        dropout=dropout,
        dropout_last=dropout,
        head=head if _has_head(config) else None,
        init=Normal(std=config.float("initializer_range", 0.02)),
    )


def _has_head(config: ConfigReader) -> bool:
    """The stored tensors tell; without them the architecture's name does."""
    if config.shapes:
        return "lm_loss.bias" in config.shapes
    return str((config.data.get("architectures") or ["XLNetLMHeadModel"])[0]) != "XLNetModel"


def write(spec: Spec, config: dict[str, Any]) -> dict[str, Any]:
    model = expect(spec, TwoStream, "xlnet", "the root")
    block = expect(model.blocks[0], PostNorm, "xlnet", "blocks.0")
    mixer = expect(block.mixer, Attention, "xlnet", "blocks.0.mixer")
    ff = expect(block.feedforward, Mlp, "xlnet", "blocks.0.feedforward")
    norm = expect(block.norm, LayerNorm, "xlnet", "blocks.0.norm")
    head = None if model.head is None else expect(model.head, BiasedHead, "xlnet", "head")
    heads, _, width, _ = mixer.sizes(model.dim)
    semantic = {
        "vocab_size": model.vocab,
        "d_model": model.dim,
        "n_layer": model.depth,
        "n_head": heads,
        "d_head": width,
        "d_inner": ff.width(model.dim),
        "ff_activation": activation_name(ff.activation, "xlnet", config.get("ff_activation")),
        "dropout": block.dropout,
        "layer_norm_eps": norm.eps,
        "tie_word_embeddings": head is None or head.output.kind == "ref",
    }
    if model.context is not None:
        semantic["model_max_length"] = model.context
    if not config:
        name = "XLNetModel" if head is None else "XLNetLMHeadModel"
        semantic |= {"architectures": [name], "model_type": "xlnet", "torch_dtype": "float32", "attn_type": "bi"}
        semantic |= {"initializer_range": getattr(model.init, "std", 0.02), "mem_len": None, "untie_r": True}
    defaults = _DEFAULTS | {"d_head": model.dim // heads}
    shapes = {_WORDS: (model.vocab, model.dim)} | ({"lm_loss.bias": (model.vocab,)} if head is not None else {})
    return faithful("xlnet", read, updated(config, semantic, defaults), model, shapes)


@dataclass(frozen=True)
class Heads(Concat):
    """Maps that are stored as (C, heads, width) each; ours are one above the other, (Σ heads·width, C)."""

    shape: tuple[int, ...] = ()  # of each, as it is stored
    rows: ClassVar[bool] = False

    def load(self, parts: list[Tensor]) -> list[Tensor]:
        for name, part in zip(self.stored, parts, strict=True):
            expect_shape(part, self.shape, name)
        return [torch.cat([part.flatten(1).t() for part in parts])]

    def save(self, parts: list[Tensor]) -> list[Tensor]:
        return [part.t().reshape(self.shape) for part in parts[0].split(self.sizes)]


def keymap(spec: Spec, stored: Iterable[str], config: dict[str, Any]) -> KeyMap:
    model: Any = spec
    stored = set(stored)
    headed = any(name.startswith(_BODY) for name in stored) if stored else model.head is not None
    p, C = _BODY if headed else "", model.dim
    rules: list[Rule] = [Reshape(f"{p}mask_emb", "query", (1, 1, C), (C,))]
    tables = [f"{p}{_WORDS}"]
    if model.head is not None:
        rules.append(Rename("lm_loss.bias", "head_part.bias"))
        if model.head.output.kind == "ref":
            tables.append(_HEAD)
        else:
            rules.append(Rename(_HEAD, "head_part.output.linear.weight"))
    rules += shared(tables, "embedding.table.weight", stored)
    for i, block in enumerate(model.blocks):
        (H, _, D, _), ours = block.mixer.sizes(C), f"blocks.{i}"
        attention, ff = f"{p}layer.{i}.rel_attn", f"{p}layer.{i}.ff"
        maps = tuple(f"{attention}.{n}" for n in "qkv")
        rules.append(Heads(maps, f"{ours}.mixer.qkv.weight", (H * D,) * 3, shape=(C, H, D)))
        rules.append(Heads((f"{attention}.r",), f"{ours}.mixer.position.r.weight", (H * D,), shape=(C, H, D)))
        rules.append(Reshape(f"{attention}.o", f"{ours}.mixer.out.weight", (C, H, D), (C, H * D)))
        for theirs, name in {"r_w_bias": "u", "r_r_bias": "v", "r_s_bias": "s", "seg_embed": "e"}.items():
            rules.append(Rename(f"{attention}.{theirs}", f"{ours}.mixer.position.{name}"))
        for kind in ("weight", "bias"):
            rules.append(Rename(f"{attention}.layer_norm.{kind}", f"{ours}.norm_mixer.{kind}"))
            rules.append(Rename(f"{ff}.layer_norm.{kind}", f"{ours}.norm_feedforward.{kind}"))
            rules.append(Rename(f"{ff}.layer_1.{kind}", f"{ours}.feedforward.up.{kind}"))
            rules.append(Rename(f"{ff}.layer_2.{kind}", f"{ours}.feedforward.down.{kind}"))
    return KeyMap(rules)


XLNET = family(Family(name="xlnet", model_types=("xlnet",), read=read, write=write, keymap=keymap))
