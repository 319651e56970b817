"""GPT-2: pre-norm blocks of LayerNorm, multi-head attention and a GELU MLP, with learned positions and a tied head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dovetail.models.activations import ACTIVATIONS, activation_name
from dovetail.models.config import ConfigReader
from dovetail.models.decoder import Decoder
from dovetail.models.family import Family, cannot_say, expect, faithful, family, updated
from dovetail.models.keymap import Keep, KeyMap, Rename, Rule, Transpose, shared
from dovetail.parts.attention.softmax import Attention
from dovetail.parts.block import PreNorm
from dovetail.parts.embedding import LinearHead
from dovetail.parts.feedforward.mlp import Mlp
from dovetail.parts.init import Gpt2
from dovetail.parts.norm import LayerNorm
from dovetail.parts.position.absolute import Learned
from dovetail.parts.position.base import NoPosition
from dovetail.spec import Ref, Spec

# What transformers assumes where an old config is silent (the first ones have no activation_function).
_DEFAULTS = {
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}


def read(config: ConfigReader) -> Decoder:
    dim, heads, depth = config.int("n_embd"), config.int("n_head"), config.int("n_layer")
    if dim % heads:
        raise config.contradiction(f"n_embd {dim} is not a multiple of n_head {heads}")
    norm = LayerNorm(eps=config.float("layer_norm_epsilon", 1e-5, least=0.0))
    attention = Attention(heads=heads, bias="all", dropout=config.float("attn_pdrop", 0.1), position=NoPosition())
    feedforward = Mlp(
        hidden=config.int("n_inner", 4 * dim), activation=config.choose("activation_function", ACTIVATIONS, "gelu_new")
    )
    dropout = config.float("resid_pdrop", 0.1)
    scales = _scales(
        dim // heads,
        depth,
        config.bool("scale_attn_weights", True),
        config.bool("scale_attn_by_inverse_layer_idx", False),
    )
    config.only("add_cross_attention", [False], "a GPT-2 that reads an encoder is not supported")
    # n_ctx sized a buffer; reorder_and_upcast_attn asks for fp32 scores, which ours are in any case.
    config.inert("n_ctx", "n_special", "predict_special_tokens", "reorder_and_upcast_attn")
    return Decoder(
        vocab=config.int("vocab_size"),
        dim=dim,
        depth=depth,
        context=config.int("n_positions", 1024),
        position=Learned(),
        dropout=config.float("embd_pdrop", 0.1),
        blocks=tuple(
            PreNorm(mixer=attention.replace(scale=s), feedforward=feedforward, norm=norm, dropout=dropout)
            for s in scales
        ),
        norm=norm,
        head=Ref(path="embedding") if config.bool("tie_word_embeddings", True) else LinearHead(),
        init=Gpt2(std=config.float("initializer_range", 0.02)),
    )


def _scales(width: int, depth: int, by_width: bool, by_layer: bool) -> list[float | None]:
    """The score's scale in each layer; None where it is the usual 1/sqrt(width)."""
    if by_width and not by_layer:
        return [None] * depth
    return [(width**-0.5 if by_width else 1.0) / (i + 1 if by_layer else 1) for i in range(depth)]


def _say_scales(scales: list[float | None], width: int, config: dict[str, Any]) -> dict[str, bool]:
    """The two flags that give these scales; the config's own where they do."""
    names = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx")
    before = tuple(config.get(name, _DEFAULTS[name]) for name in names)
    wanted = [s or width**-0.5 for s in scales]
    for flags in (before, (True, False), (False, False), (True, True), (False, True)):
        if [s or width**-0.5 for s in _scales(width, len(scales), *flags)] == wanted:
            return dict(zip(names, flags, strict=True))
    raise cannot_say("gpt2", f"attention scales {wanted}", "blocks.*.mixer.scale")


def write(spec: Spec, config: dict[str, Any]) -> dict[str, Any]:
    model = expect(spec, Decoder, "gpt2", "the root")
    block = expect(model.blocks[0], PreNorm, "gpt2", "blocks.0")
    mixer = expect(block.mixer, Attention, "gpt2", "blocks.0.mixer")
    ff = expect(block.feedforward, Mlp, "gpt2", "blocks.0.feedforward")
    norm = expect(block.norm, LayerNorm, "gpt2", "blocks.0.norm")
    heads, _, width, _ = mixer.sizes(model.dim)
    semantic = {
        "vocab_size": model.vocab,
        "n_embd": model.dim,
        "n_layer": model.depth,
        "n_head": heads,
        "n_inner": None if ff.width(model.dim) == 4 * model.dim else ff.width(model.dim),
        "activation_function": activation_name(ff.activation, "gpt2", config.get("activation_function", "gelu_new")),
        "resid_pdrop": block.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": mixer.dropout,
        "layer_norm_epsilon": norm.eps,
        "tie_word_embeddings": model.head.kind == "ref",
    }
    semantic |= _say_scales([getattr(b.mixer, "scale", None) for b in model.blocks], width, config)  # type: ignore[attr-defined]
    if model.context is not None:
        semantic["n_positions"] = model.context
    if not config:
        semantic |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "torch_dtype": "float32"}
        semantic |= {"initializer_range": getattr(model.init, "std", 0.02)}
    defaults = _DEFAULTS | ({"n_inner": config["n_inner"]} if config.get("n_inner") == 4 * model.dim else {})
    if "n_inner" in config and semantic["n_inner"] is None:
        semantic["n_inner"] = defaults["n_inner"]
    return faithful("gpt2", read, updated(config, semantic, defaults | {"n_positions": 1024}), model)


def keymap(spec: Spec, stored: Iterable[str], config: dict[str, Any]) -> KeyMap:
    model: Any = spec
    stored = set(stored)
    prefix = "" if "wpe.weight" in stored else "transformer."
    rules: list[Rule] = [Rename(f"{prefix}wpe.weight", "position.table.weight")]
    embeddings = [f"{prefix}wte.weight", "lm_head.weight"]
    if model.head.kind == "ref":
        rules += shared(embeddings, "embedding.table.weight", stored)
    else:
        rules += [Rename(embeddings[0], "embedding.table.weight"), Rename(embeddings[1], "head_part.linear.weight")]
    for i in range(model.depth):
        theirs, ours = f"{prefix}h.{i}", f"blocks.{i}"
        maps = {
            "attn.c_attn": "mixer.qkv",
            "attn.c_proj": "mixer.out",
            "mlp.c_fc": "feedforward.up",
            "mlp.c_proj": "feedforward.down",
        }
        for a, b in maps.items():  # Conv1D stores (in, out)
            rules += [
                Transpose(f"{theirs}.{a}.weight", f"{ours}.{b}.weight"),
                Rename(f"{theirs}.{a}.bias", f"{ours}.{b}.bias"),
            ]
        for a, b in {"ln_1": "norm_mixer", "ln_2": "norm_feedforward"}.items():
            rules += [Rename(f"{theirs}.{a}.{kind}", f"{ours}.{b}.{kind}") for kind in ("weight", "bias")]
    rules += [Rename(f"{prefix}ln_f.{kind}", f"norm.{kind}") for kind in ("weight", "bias")]
    # Old files carry the causal mask as buffers.
    rules += [Keep(f"{prefix}h.*.attn.bias"), Keep(f"{prefix}h.*.attn.masked_bias")]
    return KeyMap(rules)


GPT2 = family(
    Family(
        name="gpt2",
        model_types=("gpt2",),
        read=read,
        write=write,
        keymap=keymap,
        recognise=lambda config: "n_embd" in config and "n_head" in config and "layer_norm_epsilon" in config,
    )
)
