"""RoFormer (v1): BERT's blocks with rotary positions in every attention, pairs side by side (Su et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dovetail.models.bert import DEFAULTS, PREDICTIONS, Layout, encoder_rules, read_encoder, said_shapes, write_encoder
from dovetail.models.config import ConfigReader
from dovetail.models.encoder import Encoder
from dovetail.models.family import Family, faithful, family, updated
from dovetail.models.keymap import Keep, KeyMap
from dovetail.parts.position.rotary import Rope
from dovetail.spec import Spec

NAMES = Layout(cls="RoFormer", prefix="roformer", head=PREDICTIONS, deep=True, pooler=False)


def read(config: ConfigReader) -> Encoder:
    config.only("rotary_value", [False], "values that are turned too are not supported")
    dim = config.data.get("hidden_size")
    config.only("embedding_size", [dim], "an embedding of another width than the model's is not supported")
    position = Rope(theta=10_000.0, layout="interleaved")
    return read_encoder(config, NAMES, config.int("max_position_embeddings", 1536), position)


def write(spec: Spec, config: dict[str, Any]) -> dict[str, Any]:
    model, semantic = write_encoder(spec, config, "roformer", NAMES)
    if model.context is not None:
        semantic["max_position_embeddings"] = model.context
    if config.get("embedding_size") is not None:
        semantic["embedding_size"] = model.dim
    defaults = DEFAULTS | {"max_position_embeddings": 1536}
    return faithful("roformer", read, updated(config, semantic, defaults), model, said_shapes(model, NAMES, config))


def keymap(spec: Spec, stored: Iterable[str], config: dict[str, Any]) -> KeyMap:
    model: Any = spec
    rows, width = config.get("max_position_embeddings") or 1536, model.blocks[0].mixer.sizes(model.dim)[2]
    table_of_sines = Keep("*encoder.embed_positions.weight", (rows, width))
    return KeyMap([*encoder_rules(model, NAMES, set(stored)), table_of_sines])


ROFORMER = family(Family(name="roformer", model_types=("roformer",), read=read, write=write, keymap=keymap))
