"""RoBERTa (and XLM-R): BERT without sentence pairs, its positions counted from the padding's id on, as fairseq does."""

from __future__ import annotations

from typing import Any

from dovetail.models.bert import DEFAULTS, Layout, keymap_of, read_encoder, said_shapes, untyped, write_encoder
from dovetail.models.config import ConfigReader
from dovetail.models.encoder import Encoder
from dovetail.models.family import Family, cannot_say, expect, faithful, family, updated
from dovetail.parts.position.absolute import Learned
from dovetail.parts.position.base import NoPosition
from dovetail.spec import Spec

NAMES = Layout(
    cls="Roberta",
    prefix="roberta",
    head=("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
    deep=True,
    fixed=True,
)


def read(config: ConfigReader) -> Encoder:
    config.only("position_embedding_type", ["absolute"], "relative keys are not supported")
    padding, rows = config.take("pad_token_id", 1, int), config.int("max_position_embeddings", 512)
    if rows < padding + 2:
        raise config.contradiction(f"max_position_embeddings {rows} leaves no position behind pad_token_id {padding}")
    spec = read_encoder(config, NAMES, rows - padding - 1, NoPosition())
    return spec.replace(position=Learned(offset=padding + 1))


def write(spec: Spec, config: dict[str, Any]) -> dict[str, Any]:
    model, semantic = write_encoder(spec, config, "roberta", NAMES)
    position = expect(model.position, Learned, "roberta", "position")
    if position.offset < 1:  # they begin behind the padding's, and no token has the id -1
        raise cannot_say("roberta", "positions that begin at 0", "position.offset")
    semantic["pad_token_id"] = position.offset - 1
    if model.context is not None:
        semantic["max_position_embeddings"] = model.context + position.offset
    defaults = DEFAULTS | {"max_position_embeddings": 512, "pad_token_id": 1}
    return faithful("roberta", read, updated(config, semantic, defaults), model, said_shapes(model, NAMES, config))


ROBERTA = family(
    Family(
        name="roberta",
        model_types=("roberta", "xlm-roberta"),
        read=read,
        write=write,
        keymap=keymap_of(NAMES),
        recognise=lambda config: untyped(config, "Roberta"),
    )
)
