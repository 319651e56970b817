"""Meta's own LLaMA layout: params.json and consolidated weights, RoPE interleaved. Mistral publishes it too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dovetail.models.config import ConfigReader
from dovetail.models.decoder import Decoder
from dovetail.models.family import Family, cannot_say, family, updated
from dovetail.models.keymap import Concat, Keep, KeyMap, Rename, Rule
from dovetail.parts.attention.softmax import Attention
from dovetail.parts.block import PreNorm
from dovetail.parts.feedforward.glu import Glu
from dovetail.parts.mask import Window
from dovetail.parts.norm import RmsNorm
from dovetail.parts.position.rotary import Rope
from dovetail.parts.position.scaling import Llama3Scaling
from dovetail.spec import Spec


def read(config: ConfigReader) -> Decoder:
    dim, heads, depth = config.int("dim"), config.int("n_heads"), config.int("n_layers")
    vocab = config.take("vocab_size", -1, int)
    if vocab <= 0:  # LLaMA 1 and 2 leave it to the tokenizer
        if "tok_embeddings.weight" not in config.shapes:
            raise config.contradiction("vocab_size is not said, and there is no tok_embeddings.weight to read it from")
        vocab = config.shapes["tok_embeddings.weight"][0]
    hidden = config.int("hidden_dim", None)
    multiple, stretch = config.int("multiple_of", 256), config.float("ffn_dim_multiplier", 1.0)
    if hidden is None:
        hidden = int(int(2 * 4 * dim / 3) * stretch)
        hidden = multiple * -(-hidden // multiple)
    scaled = config.bool("use_scaled_rope", False)
    window = config.int("sliding_window", None)
    norm = RmsNorm(eps=config.float("norm_eps", 1e-5, least=0.0))
    attention = Attention(
        heads=heads,
        kv_heads=config.int("n_kv_heads", heads),
        head_dim=config.int("head_dim", None),
        mask=Window(size=window) if window else None,
        position=Rope(
            theta=config.float("rope_theta", 10_000.0),
            layout="interleaved",
            scaling=Llama3Scaling(original=8192) if scaled else None,
        ),
    )
    config.inert("max_batch_size", "model_parallel_size", "vocab_parallel")
    return Decoder(
        vocab=vocab,
        dim=dim,
        depth=depth,
        context=config.int("max_seq_len", None),
        blocks=(PreNorm(mixer=attention, feedforward=Glu(hidden=hidden), norm=norm),) * depth,
        norm=norm,
    )


def write(spec: Spec, config: dict[str, Any]) -> dict[str, Any]:
    """params.json again. Anything but the numbers it knows is refused: this layout has no words for it."""
    again: Any = read(ConfigReader(config | {"vocab_size": getattr(spec, "vocab", -1)})) if config else None
    if again is None or again != spec:
        raise cannot_say("meta", "an arrangement other than the one it was read from", "the root")
    return updated(config, {}, {})


def keymap(spec: Spec, stored: Iterable[str], config: dict[str, Any]) -> KeyMap:
    model: Any = spec
    rules: list[Rule] = [Rename("tok_embeddings.weight", "embedding.table.weight")]
    for i, block in enumerate(model.blocks):
        theirs, ours = f"layers.{i}", f"blocks.{i}"
        heads, kv_heads, width, _ = block.mixer.sizes(model.dim)
        hidden = block.feedforward.width(model.dim)
        qkv = tuple(f"{theirs}.attention.w{n}.weight" for n in "qkv")
        rules += [
            Concat(qkv, f"{ours}.mixer.qkv.weight", (heads * width, kv_heads * width, kv_heads * width)),
            Rename(f"{theirs}.attention.wo.weight", f"{ours}.mixer.out.weight"),
            Concat(
                (f"{theirs}.feed_forward.w1.weight", f"{theirs}.feed_forward.w3.weight"),
                f"{ours}.feedforward.gate_up.weight",
                (hidden, hidden),
            ),
            Rename(f"{theirs}.feed_forward.w2.weight", f"{ours}.feedforward.down.weight"),
            Rename(f"{theirs}.attention_norm.weight", f"{ours}.norm_mixer.weight"),
            Rename(f"{theirs}.ffn_norm.weight", f"{ours}.norm_feedforward.weight"),
        ]
    rules += [
        Rename("norm.weight", "norm.weight"),
        Rename("output.weight", "head_part.linear.weight"),
        Keep("rope.freqs"),
    ]
    return KeyMap(rules)


META = family(
    Family(
        name="meta",
        model_types=(),
        read=read,
        write=write,
        keymap=keymap,
        recognise=lambda config: "n_heads" in config and "norm_eps" in config and "dim" in config,
        file="params.json",
    )
)
