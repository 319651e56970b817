"""The encoder: embeddings, a stack in which every token sees every other, a head on each token, a vector of each row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.errors import BuildError, DataError
from dovetail.parts.containers import Stack, StackModule
from dovetail.parts.context import Context
from dovetail.parts.embedding import TokenEmbedding
from dovetail.parts.init import Normal
from dovetail.parts.mlm_head import MlmHead
from dovetail.parts.outputs import Outputs
from dovetail.parts.position.base import position_axes
from dovetail.parts.virtual import Front, Tokens
from dovetail.parts.weights import Lookup
from dovetail.spec import Slot, Spec, register
from dovetail.spec.categories import EmbeddingPart, HeadPart, InitPart, PoolingPart
from dovetail.spec.ranges import Chance, Count, Natural


@register(
    "model",
    "encoder",
    oracle="transformers bert, roberta, roformer, deberta_v2, t5",
    source="Devlin et al. 2019, section 3",
    causal=False,
)
class Encoder(Stack):
    """A bidirectional model of one sequence. vocab: ids. dim: width. context: trained length, in tokens.

    token_types: kinds of tokens (first and second sentence) whose vectors are added to the embedded tokens; 0: none.
    head: of each token, the masked language model's unless given; null: none. pooling: makes a vector of each row.
    classifier: of that vector, or of each token where there is no pooling, to `classes` logits; classifier_dropout: on
    what it reads.
    """

    vocab: Count
    dim: Count
    context: Count | None = None
    embedding: EmbeddingPart = TokenEmbedding()
    token_types: Natural = 0
    head: HeadPart | None = MlmHead()
    pooling: PoolingPart | None = None
    classifier: HeadPart | None = None
    classes: Count | None = None
    classifier_dropout: Chance = 0.0
    init: InitPart = Normal()

    def build(self, slot: Slot) -> nn.Module:
        slot = replace(slot, dim=self.dim, depth=self.depth, context=self.context, init=self.init, causal=False)
        return EncoderModule(self, replace(slot, vocab=self.vocab, on_grid=False))


class WholeRows(StackModule):
    """Base of models in which every token sees those that come later: a head on each, and nothing to go on from."""

    spec: Spec
    head_part: Any  # None: hidden states alone
    front: Front

    def head(self, h: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V). Raises BuildError for a model without a head."""
        if self.head_part is None:
            usual = type(self.spec).model_fields["head"].default.kind
            raise BuildError(
                f"this {self.spec.kind} has no head: it gives hidden states alone",
                where="head",
                remedy=f"give it one: {{head: {{kind: {usual}}}}}",
            )
        return self.head_part.logits(h)

    def new_state(self, batch: int, capacity: int, dtype: Any = None) -> Any:
        """Raises BuildError."""
        raise BuildError(
            f"a model {self.spec.kind!r} reads whole rows and does not go on from what it read",
            where="the root",
            remedy="generate with a decoder or an encoder-decoder",
        )


class JudgedRows(WholeRows):
    """Base of those that make a vector of each row, and class logits of it."""

    def set_classifier(self, spec: Any, slot: Slot) -> None:
        """Pooling and classifier as the fields of those names say. Raises BuildError where one lacks the other."""
        self.pooling = None if spec.pooling is None else slot.build(spec.pooling, "pooling")
        self.classifier, self.classifier_dropout = None, spec.classifier_dropout
        told = spec.classes is not None or spec.classifier_dropout > 0
        if (spec.classifier is None) == told or (told and spec.classes is None):
            raise BuildError(
                "a classifier needs classes, and they need it",
                where="classifier",
                remedy="give classifier and classes, or neither of them",
            )
        if spec.classifier is not None:
            width = spec.dim if spec.pooling is None else spec.pooling.width(spec.dim)
            self.classifier = slot.build(spec.classifier, "classifier", dim=width, dim_out=spec.classes)

    def hidden(
        self,
        x: Tensor,
        tokens: Tensor | None,
        attention_mask: Tensor | None,
        positions: Tensor | None,
        segments: Tensor | None,
    ) -> Tensor:
        """Vectors (B,T,C) that enter the stack -> hidden states (B,T,C). tokens (B,T): their ids, where they have any."""
        batch, front = x.shape[0], self.front
        if positions is None and attention_mask is None and segments is None:
            self.check_length(x.shape[1] + front.vectors + front.held)
        read = front.precede(Tokens(x, attention_mask, positions, segments))
        ctx = front.behind(Context.of(batch, read.x.shape[1], x.device, **read.beside), batch)
        return read.own(self.run(self.embed(read.x, ctx, tokens), ctx))

    def judge(
        self, h: Tensor, attention_mask: Tensor | None, segments: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(pooled (B,C'), class logits (B,K) or, where there is no pooling, (B,T,K)) of hidden states; packed rows are not
        pooled."""
        pooled = classes = None
        if self.pooling is not None and segments is None:
            real = (
                h.new_ones(h.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask.to(torch.bool)
            )
            pooled = self.pooling(h, real)
        read_by_class = h if self.pooling is None else pooled
        if self.classifier is not None and read_by_class is not None:
            rate = self.classifier_dropout if self.training else 0.0
            classes = self.classifier.logits(F.dropout(read_by_class, rate) if rate else read_by_class)
        return pooled, classes


class EncoderModule(JudgedRows):
    def __init__(self, spec: Encoder, slot: Slot):
        if spec.streams > 1:
            raise BuildError(
                "an encoder of two streams", where="streams", remedy="set streams to 1, or build a decoder"
            )
        embedding = slot.build(spec.embedding, "embedding", dim_out=spec.vocab)
        super().__init__(spec, slot)
        self.embedding = embedding
        self.types = Lookup(spec.token_types, slot.dim, slot=slot.at("types")) if spec.token_types else None
        self.head_part = None if spec.head is None else slot.build(spec.head, "head", dim_out=spec.vocab)
        self.set_classifier(spec, slot)
        self.axes = position_axes(self)
        self.front = Front()

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        *,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        token_types: Tensor | None = None,
        logits: bool = True,
    ) -> Outputs:
        """tokens (B,T) int64 -> Outputs with last_hidden_state (B,T,C), logits (B,T,V) unless logits=False or there is
        no head, pooler_output (B,C') where there is a pooling and class_logits, (B,K) or of each token (B,T,K), where
        there is a classifier.

        attention_mask (B,T): nonzero where real; padding may stand on either side. segments (B,T): document numbers of
        packed rows, of which nothing is pooled. positions (B,T) or (B,T,A): when not counted from the masks.
        token_types (B,T): which kind each token is, 0 unless given. Raises DataError for shapes that do not fit.
        """
        if tokens.dim() != 2:
            raise DataError(f"tokens have shape {tuple(tokens.shape)}", remedy="give (batch, length)")
        h = self.hidden(self._typed(self.embedding(tokens), token_types), tokens, attention_mask, positions, segments)
        pooled, classes = self.judge(h, attention_mask, segments)
        scores = self.head(h) if logits and self.head_part is not None else None
        return Outputs(logits=scores, last_hidden_state=h, pooler_output=pooled, class_logits=classes)

    def _typed(self, x: Tensor, token_types: Tensor | None) -> Tensor:
        """x (B,T,C) with the vectors of its tokens' kinds."""
        if self.types is None:
            if token_types is not None:
                raise DataError("token_types for a model that knows one kind of token", remedy="leave them out")
            return x
        if token_types is None:
            return x + self.types(x.new_zeros((), dtype=torch.long))
        if token_types.shape != x.shape[:2]:
            raise DataError(f"token_types have shape {tuple(token_types.shape)}", remedy=f"give {tuple(x.shape[:2])}")
        return x + self.types(token_types)
