"""The LLaMA family: LLaMA 1/2/3.x, Mistral, Qwen2, Qwen2.5, Qwen3 (dense), and Meta's own layout.

One arrangement: pre-norm blocks of RMSNorm, grouped attention with RoPE, and a gated feed-forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dovetail.errors import ConfigError
from dovetail.models.activations import ACTIVATIONS, activation_name
from dovetail.models.config import ConfigReader
from dovetail.models.decoder import Decoder
from dovetail.models.family import Family, cannot_say, family, updated
from dovetail.models.keymap import Concat, Keep, KeyMap, Rename, Rule, shared
from dovetail.models.rope_config import read_rope, same_rope, write_rope
from dovetail.parts.attention.softmax import Attention
from dovetail.parts.block import PreNorm
from dovetail.parts.embedding import LinearHead, TokenEmbedding
from dovetail.parts.feedforward.glu import Glu
from dovetail.parts.init import Normal
from dovetail.parts.mask import Window
from dovetail.parts.norm import RmsNorm
from dovetail.parts.position.base import NoPosition
from dovetail.spec import Ref, Spec

_BIAS = {"qwen2": "qkv"}  # model types whose q, k, v carry a bias that no config key announces
_SAYS_BIAS = {"attention_bias": ("llama", "qwen3"), "mlp_bias": ("llama",)}  # elsewhere these keys are read by nobody
# What transformers assumes where a config lacks a key (null is something else: no window, as many key heads as heads).
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768}
_ABSENT: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}
_DEFAULTS = {
    "head_dim": None,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
}


def _absent(config: Any, kind: str, key: str, null: Any = None) -> Any:
    """The value of a key that is null or absent."""
    return null if key in config else _ABSENT[kind].get(key, null)


def read(config: ConfigReader) -> Decoder:
    kind = _type(config.data)
    dim, heads, depth = config.int("hidden_size"), config.int("num_attention_heads"), config.int("num_hidden_layers")
    context = config.int("max_position_embeddings", _ABSENT[kind]["max_position_embeddings"])
    norm = RmsNorm(eps=config.float("rms_norm_eps", 1e-6, least=0.0))
    head_dim = config.int("head_dim", _absent(config.data, kind, "head_dim"))
    kv_heads = config.int("num_key_value_heads", _absent(config.data, kind, "num_key_value_heads", heads))
    if head_dim is None and dim % heads:
        raise config.contradiction(f"hidden_size {dim} is not a multiple of num_attention_heads {heads}")
    if heads % kv_heads:
        raise config.contradiction(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    bias = "all" if _says(config, kind, "attention_bias") else _BIAS.get(kind, "none")
    attention = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        bias=bias,  # type: ignore[arg-type]
        qk_norm=norm if kind == "qwen3" else None,
        dropout=config.float("attention_dropout", 0.0),
        position=read_rope(config, context),
    )
    feedforward = Glu(
        hidden=config.int("intermediate_size"),
        activation=config.choose("hidden_act", ACTIVATIONS, "silu"),
        bias=_says(config, kind, "mlp_bias"),
    )
    windows = _windows(config, kind, depth)
    config.only("use_mrope", [False], "positions on several axes belong to models that see")
    config.only("rope_interleaved", [False], "pairs side by side are Meta's layout, with its params.json")
    config.inert("is_llama_config", "transformers.js_config")
    tied = config.bool("tie_word_embeddings", False)
    if "norm.weight" in config.shapes and "lm_head.weight" not in config.shapes and not tied:
        raise ConfigError(
            f"this is the body of a {kind} alone (an embedding model, say), and a decoder has a head",
            where=config.where,
            remedy='set "tie_word_embeddings": true there: its last_hidden_state is what such a model gives',
        )
    blocks = tuple(
        PreNorm(mixer=attention.replace(mask=Window(size=w) if w else None), feedforward=feedforward, norm=norm)
        for w in windows
    )
    return Decoder(
        vocab=config.int("vocab_size"),
        dim=dim,
        depth=depth,
        context=context,
        blocks=blocks,
        norm=norm,
        head=Ref(path="embedding") if tied else LinearHead(),
        init=Normal(std=config.float("initializer_range", 0.02)),
    )


def _says(config: ConfigReader, kind: str, key: str) -> bool:
    """Whether a bias is said, by a key that models of this type read."""
    if kind in _SAYS_BIAS[key]:
        return config.bool(key, False)
    config.inert(key)
    return False


def _windows(config: ConfigReader, kind: str, depth: int) -> list[int | None]:
    """The window of each layer, as `sliding_window` and its companions say."""
    window = config.int("sliding_window", _absent(config.data, kind, "sliding_window"))
    if kind == "mistral":
        return [window] * depth
    first = config.take("max_window_layers", _absent(config.data, kind, "max_window_layers", depth), int)
    if kind == "llama" or not config.bool("use_sliding_window", False):
        window = None
    types = config.take("layer_types", None, list)
    if types is None:
        return [window if i >= first else None for i in range(depth)]
    if len(types) != depth:
        raise config.contradiction(f"layer_types has {len(types)} entries for {depth} layers")
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigError(f"layer types {sorted(unknown)} are not supported", where=f"{config.where}: layer_types")
    if (
        window is None
        and "sliding_attention" in types
        and (kind == "llama" or config.bool("use_sliding_window", False))
    ):
        raise config.contradiction("layer_types has sliding layers, but no sliding_window is in use")
    return [window if t == "sliding_attention" else None for t in types]


def write(spec: Spec, config: dict[str, Any]) -> dict[str, Any]:
    model = _plain(spec)
    first: Any = model.blocks[0]
    mixer, ff = first.mixer, first.feedforward
    kind = _type(config) if config else _kind(mixer, ff)
    windows = [None if b.mixer.mask is None else b.mixer.mask.size for b in model.blocks]  # type: ignore[attr-defined]
    same = [b.replace(mixer=b.mixer.replace(mask=None)) for b in model.blocks]  # type: ignore[attr-defined]
    if any(block != same[0] for block in same):
        raise cannot_say(kind, "layers that differ in more than their window", "blocks")
    heads, kv_heads, head_dim, _ = mixer.sizes(model.dim)
    semantic = {
        "vocab_size": model.vocab,
        "hidden_size": model.dim,
        "num_hidden_layers": model.depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ff.width(model.dim),
        "hidden_act": activation_name(ff.activation, kind, config.get("hidden_act")),
        "rms_norm_eps": first.norm.eps,
        "tie_word_embeddings": model.head.kind == "ref",
        "attention_dropout": mixer.dropout,
        "head_dim": head_dim,
    }
    if model.context is not None:
        semantic["max_position_embeddings"] = model.context
    if kind in ("llama", "qwen3"):
        semantic["attention_bias"] = mixer.bias == "all"
    if kind == "llama":
        semantic["mlp_bias"] = ff.bias
    semantic |= _write_windows(kind, windows, config)
    if not config:
        semantic |= {"architectures": [_ARCHITECTURES[kind]], "model_type": kind, "torch_dtype": "float32"}
        semantic |= {"initializer_range": getattr(model.init, "std", 0.02)}
    if not config or not same_rope(config, mixer.position, model.context):
        if "rope_parameters" not in config:
            config = {k: v for k, v in config.items() if k not in ("rope_scaling",) or v is None}
        semantic |= write_rope(mixer.position, config, kind, model.context)
    if not config:
        return updated({}, semantic, {})  # a new config says everything
    defaults = _DEFAULTS | {"num_key_value_heads": heads} | {k: v for k, v in _ABSENT[kind].items() if k not in config}
    if head_dim * heads == model.dim and "head_dim" not in _ABSENT[kind]:
        defaults["head_dim"] = head_dim
    return updated(config, semantic, defaults)


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def _type(config: dict[str, Any]) -> str:
    """The model type of a config; one that leaves it out may name the class."""
    said = config.get("architectures")
    named = [kind for kind, name in _ARCHITECTURES.items() if isinstance(said, list) and name in said]
    return config.get("model_type") or next(iter(named), "llama")


def _kind(mixer: Any, ff: Any) -> str:
    """The model type that can say an arrangement made here."""
    if mixer.qk_norm is not None:
        return "qwen3"
    return "qwen2" if mixer.bias == "qkv" else "mistral" if mixer.mask is not None else "llama"


def _write_windows(kind: str, windows: list[int | None], config: dict[str, Any]) -> dict[str, Any]:
    sizes = {w for w in windows if w}
    before = _windows(ConfigReader(config), kind, len(windows)) if config else [None] * len(windows)
    if windows == before and (config or kind == "llama"):
        return {}
    if len(sizes) > 1 or kind == "llama":
        raise cannot_say(kind, f"attention windows {sorted(sizes)}", "blocks.*.mixer.mask")
    if kind == "mistral":
        if None in windows and sizes:
            raise cannot_say(kind, "a window on some layers only", "blocks.*.mixer.mask")
        return {"sliding_window": windows[0]}
    types = ["sliding_attention" if w else "full_attention" for w in windows]
    first = next((i for i, w in enumerate(windows) if w), len(windows))
    return {
        "sliding_window": next(iter(sizes), None),
        "use_sliding_window": bool(sizes),
        "max_window_layers": first,
        "layer_types": types,
    }


def _plain(spec: Spec) -> Decoder:
    """The spec as a Decoder that this layout can say, or an error that names what it cannot."""
    if not isinstance(spec, Decoder):
        raise cannot_say("llama", f"a model of kind {spec.kind!r}", "the root")
    expected = {
        "position": isinstance(spec.position, NoPosition),
        "embedding": spec.embedding == TokenEmbedding(),
        "head": spec.head.kind == "ref" or spec.head == LinearHead(),
        "norm": isinstance(spec.norm, RmsNorm) and spec.norm.cast == "before" and not spec.norm.offset,
        "norm_in": spec.norm_in is None,
        "dropout": spec.dropout == 0,
    }
    for i, block in enumerate(spec.blocks):
        mixer, ff = getattr(block, "mixer", None), getattr(block, "feedforward", None)
        here = f"blocks.{i}"
        expected[here] = isinstance(block, PreNorm) and block.cross is None and block.dropout == 0
        expected[f"{here}.norm"] = getattr(block, "norm", None) == spec.norm
        expected[f"{here}.feedforward"] = isinstance(ff, Glu) and ff.dropout == 0
        expected[f"{here}.mixer"] = (
            isinstance(mixer, Attention)
            and mixer.value_dim in (None, mixer.head_dim)
            and mixer.bias in ("none", "qkv", "all")
            and mixer.qk_norm in (None, spec.norm)
            and mixer.qk_norm_over == "head"
            and mixer.qk_norm_on == "both"
            and mixer.scale is None
            and mixer.cap is None
            and isinstance(mixer.mask, Window | None)
        )
    for path, fine in expected.items():
        if not fine:
            raise cannot_say("llama", f"this {path.split('.')[-1]}", path)
    return spec


def keymap(spec: Spec, stored: Iterable[str], config: dict[str, Any]) -> KeyMap:
    model: Any = spec
    stored = set(stored)
    prefix = "" if "norm.weight" in stored else "model."
    rules: list[Rule] = []
    if model.head.kind == "ref":
        rules += shared([f"{prefix}embed_tokens.weight", "lm_head.weight"], "embedding.table.weight", stored)
    else:
        rules.append(Rename(f"{prefix}embed_tokens.weight", "embedding.table.weight"))
        rules.append(Rename("lm_head.weight", "head_part.linear.weight"))
    for i, block in enumerate(model.blocks):
        theirs, ours, mixer = f"{prefix}layers.{i}", f"blocks.{i}", block.mixer
        heads, kv_heads, width, _ = mixer.sizes(model.dim)
        sizes = (heads * width, kv_heads * width, kv_heads * width)
        hidden = block.feedforward.width(model.dim)
        kinds = ["weight"] + (["bias"] if mixer.bias in ("qkv", "all") else [])
        for kind in kinds:
            names = tuple(f"{theirs}.self_attn.{n}_proj.{kind}" for n in "qkv")
            rules.append(Concat(names, f"{ours}.mixer.qkv.{kind}", sizes))
        rules.append(Rename(f"{theirs}.self_attn.o_proj.weight", f"{ours}.mixer.out.weight"))
        if mixer.bias == "all":
            rules.append(Rename(f"{theirs}.self_attn.o_proj.bias", f"{ours}.mixer.out.bias"))
        if mixer.qk_norm is not None:
            rules += [Rename(f"{theirs}.self_attn.{n}_norm.weight", f"{ours}.mixer.{n}_norm.weight") for n in "qk"]
        for kind in ["weight"] + (["bias"] if block.feedforward.bias else []):
            gate_up = (f"{theirs}.mlp.gate_proj.{kind}", f"{theirs}.mlp.up_proj.{kind}")
            rules.append(Concat(gate_up, f"{ours}.feedforward.gate_up.{kind}", (hidden, hidden)))
            rules.append(Rename(f"{theirs}.mlp.down_proj.{kind}", f"{ours}.feedforward.down.{kind}"))
        rules.append(Rename(f"{theirs}.input_layernorm.weight", f"{ours}.norm_mixer.weight"))
        rules.append(Rename(f"{theirs}.post_attention_layernorm.weight", f"{ours}.norm_feedforward.weight"))
    rules.append(Rename(f"{prefix}norm.weight", "norm.weight"))
    rules.append(Keep("*.rotary_emb.inv_freq"))
    return KeyMap(rules)


LLAMA = family(
    Family(
        name="llama",
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        read=read,
        write=write,
        keymap=keymap,
        recognise=lambda config: "rms_norm_eps" in config and "hidden_size" in config and "intermediate_size" in config,
    )
)
