"""Span corruption: an encoder-decoder fills in what was left out of its source."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dovetail.objectives.next_token import NextToken
from dovetail.spec import register
from dovetail.spec.ranges import Count, Positive


@register(
    "objective",
    "span_corruption",
    oracle="formula: t5's random_spans_helper and random_spans_noise_mask; torch.nn.functional.cross_entropy",
    source="Raffel et al. 2020 (T5), section 3.1.4 and figure 2",
)
class SpanCorruption(NextToken):
    """−log p of the stretches that were left out of a source, each behind its sentinel; rows are made from plain text.

    density: share of the tokens that is left out. span: mean length of a stretch. sentinels: ids for them, at most: the
    tokenizer's <extra_id_0>, <extra_id_1> ... where it has such, else counted down from the end of the vocabulary (a
    new model's is made larger by as many). closing: what ends a target: the tokenizer's end ("end", as released) or one
    sentinel more (figure 2). train.length is the source's; 512 with the defaults are 568 tokens of text and a target of
    114. Masks are drawn anew every epoch.
    """

    density: Annotated[float, Field(gt=0, lt=1)] = 0.15  # of all, a source of any length is three tokens
    span: Positive = 3.0
    sentinels: Count = 100
    closing: Literal["end", "sentinel"] = "end"
