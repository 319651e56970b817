"""Mamba: pre-norm layers of a selective state space alone, with a tied head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dovetail.models.activations import ACTIVATIONS, activation_name
from dovetail.models.config import ConfigReader
from dovetail.models.decoder import Decoder
from dovetail.models.family import Family, cannot_say, expect, faithful, family, updated
from dovetail.models.keymap import KeyMap, Rename, Rule, shared
from dovetail.parts.block import PreNorm
from dovetail.parts.embedding import LinearHead
from dovetail.parts.init import Normal
from dovetail.parts.norm import RmsNorm
from dovetail.parts.recurrent.mamba import Mamba
from dovetail.spec import Ref, Spec

# What MambaConfig assumes where a config is silent.
_DEFAULTS = {
    "vocab_size": 50280,
    "hidden_size": 768,
    "num_hidden_layers": 32,
    "state_size": 16,
    "expand": 2,
    "conv_kernel": 4,
    "time_step_rank": "auto",
    "time_step_min": 1e-3,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
# Copies of sizes from the original layout, what chose a kernel there, and how dt and the last maps were started.
_INERT = (
    "d_model", "d_inner", "n_layer", "ssm_cfg", "rms_norm", "fused_add_norm", "pad_vocab_size_multiple", "use_mambapy",
    "use_associative_scan", "time_step_scale", "time_step_init_scheme", "rescale_prenorm_residual",
)  # fmt: skip


def read(config: ConfigReader) -> Decoder:
    config.inert(*_INERT)
    config.inert("residual_in_fp32")  # how residuals are rounded between layers of fewer bits: ours as the stream is
    dim, expand = config.int("hidden_size", 768), config.int("expand", 2)
    if config.int("intermediate_size", expand * dim) != expand * dim:
        raise config.contradiction(f"intermediate_size is not expand {expand} times hidden_size {dim}")
    rank = config.take("time_step_rank", "auto", (int, str))
    if isinstance(rank, str) and rank != "auto":
        raise config.contradiction(f"time_step_rank is {rank!r}", "give a whole number, or auto")
    mixer = Mamba(
        hidden=expand * dim,
        state=config.int("state_size", 16),
        kernel=config.int("conv_kernel", 4),
        dt_rank=None if isinstance(rank, str) else rank,
        bias=config.bool("use_bias", False),
        conv_bias=config.bool("use_conv_bias", True),
        activation=config.choose("hidden_act", ACTIVATIONS, "silu"),
        dt_min=config.float("time_step_min", 1e-3),
        dt_max=config.float("time_step_max", 0.1),
        dt_floor=config.float("time_step_floor", 1e-4),
    )
    norm = RmsNorm(eps=config.float("layer_norm_epsilon", 1e-5, least=0.0))
    return Decoder(
        vocab=config.int("vocab_size", 50280),
        dim=dim,
        depth=config.int("num_hidden_layers", 32),
        blocks=(PreNorm(mixer=mixer, feedforward=None, norm=norm),),
        norm=norm,
        head=Ref(path="embedding") if config.bool("tie_word_embeddings", True) else LinearHead(),
        init=Normal(std=config.float("initializer_range", 0.1)),
    )


def write(spec: Spec, config: dict[str, Any]) -> dict[str, Any]:
    model = expect(spec, Decoder, "mamba", "the root")
    block = expect(model.blocks[0], PreNorm, "mamba", "blocks.0")
    mixer = expect(block.mixer, Mamba, "mamba", "blocks.0.mixer")
    norm = expect(block.norm, RmsNorm, "mamba", "blocks.0.norm")
    hidden, rank = mixer.sizes(model.dim)
    if hidden % model.dim:
        raise cannot_say("mamba", f"a hidden width of {hidden} at a width of {model.dim}", "blocks.*.mixer.hidden")
    semantic = {
        "vocab_size": model.vocab,
        "hidden_size": model.dim,
        "num_hidden_layers": model.depth,
        "state_size": mixer.state,
        "expand": hidden // model.dim,
        "conv_kernel": mixer.kernel,
        "time_step_rank": "auto" if rank == Mamba().sizes(model.dim)[1] and _auto(config) else rank,
        "time_step_min": mixer.dt_min,
        "time_step_max": mixer.dt_max,
        "time_step_floor": mixer.dt_floor,
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
        "hidden_act": activation_name(mixer.activation, "mamba", config.get("hidden_act", "silu")),
        "layer_norm_epsilon": norm.eps,
        "tie_word_embeddings": model.head.kind == "ref",
    }
    if "intermediate_size" in config:
        semantic["intermediate_size"] = hidden
    if not config:
        semantic |= {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "torch_dtype": "float32"}
        semantic["initializer_range"] = getattr(model.init, "std", 0.1)
    return faithful("mamba", read, updated(config, semantic, _DEFAULTS), model)


def _auto(config: dict[str, Any]) -> bool:
    return not isinstance(config.get("time_step_rank"), int)


def keymap(spec: Spec, stored: Iterable[str], config: dict[str, Any]) -> KeyMap:
    model: Any = spec
    stored = set(stored)
    prefix = "" if "norm_f.weight" in stored else "backbone."
    # The original checkpoints' name, and that of transformers.
    words = f"{prefix}{'embedding' if f'{prefix}embedding.weight' in stored else 'embeddings'}.weight"
    if model.head.kind == "ref":
        rules: list[Rule] = shared([words, "lm_head.weight"], "embedding.table.weight", stored)
    else:
        rules = [Rename(words, "embedding.table.weight"), Rename("lm_head.weight", "head_part.linear.weight")]
    for i, block in enumerate(model.blocks):
        theirs, ours, mixer = f"{prefix}layers.{i}", f"blocks.{i}", block.mixer
        names = {"in_proj": "inward", "conv1d": "conv", "x_proj": "choose", "dt_proj": "dt", "out_proj": "out"}
        biased = {"in_proj": mixer.bias, "out_proj": mixer.bias, "conv1d": mixer.conv_bias, "dt_proj": True}
        rules.append(Rename(f"{theirs}.norm.weight", f"{ours}.norm_mixer.weight"))
        rules += [Rename(f"{theirs}.mixer.{name}", f"{ours}.mixer.{name}") for name in ("A_log", "D")]
        for a, b in names.items():
            kinds = ("weight", "bias") if biased.get(a) else ("weight",)
            rules += [Rename(f"{theirs}.mixer.{a}.{kind}", f"{ours}.mixer.{b}.{kind}") for kind in kinds]
    rules.append(Rename(f"{prefix}norm_f.weight", "norm.weight"))
    return KeyMap(rules)


MAMBA = family(Family(name="mamba", model_types=("mamba",), read=read, write=write, keymap=keymap))
