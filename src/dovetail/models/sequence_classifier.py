"""A class for each sequence of numbers: a linear map of what stands at each time, a stack, pooling, class logits."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from dovetail.errors import BuildError, DataError
from dovetail.models.encoder import JudgedRows
from dovetail.parts.containers import Stack
from dovetail.parts.embedding import LinearHead
from dovetail.parts.init import Normal
from dovetail.parts.outputs import Outputs
from dovetail.parts.pooling import Mean
from dovetail.parts.position.base import position_axes
from dovetail.parts.virtual import Front
from dovetail.parts.weights import Linear
from dovetail.spec import Slot, Spec, register
from dovetail.spec.categories import HeadPart, InitPart, PoolingPart
from dovetail.spec.ranges import Chance, Count


@register(
    "model",
    "sequence_classifier",
    oracle="torch.nn.Linear, LSTM and TransformerEncoder",
    source="Le et al. 2015 (IRNN), section 4.2; Gu et al. 2022 (S4), section 4",
    causal=False,
    reads="values",
)
class SequenceClassifier(Stack):
    """A model of sequences (T,F) of numbers, such as pixels one by one. features: F. dim: width. classes: K.

    context: trained length. causal: whether attention and its like see the past alone; recurrences and state spaces do
    so in any case. pooling: makes a vector of each row (mean, last, ...); null: class logits at each time. classifier:
    of that vector to the classes; classifier_dropout: on what it reads.
    """

    features: Count
    dim: Count
    classes: Count
    context: Count | None = None
    causal: bool = False
    pooling: PoolingPart | None = Mean()
    classifier: HeadPart = LinearHead(bias=True)
    classifier_dropout: Chance = 0.0
    init: InitPart = Normal()

    def build(self, slot: Slot) -> nn.Module:
        slot = replace(slot, dim=self.dim, depth=self.depth, context=self.context, init=self.init, causal=self.causal)
        return SequenceClassifierModule(self, replace(slot, vocab=None, on_grid=False))


class SequenceClassifierModule(JudgedRows):
    """read (C,F) with a bias: what stands at each time."""

    spec: Spec

    def __init__(self, spec: SequenceClassifier, slot: Slot):
        if spec.streams > 1:
            raise BuildError(
                "a classifier of two streams", where="streams", remedy="set streams to 1: its pooling reads one"
            )
        super().__init__(spec, slot)
        self.features, self.head_part = spec.features, None
        self.read = Linear(spec.features, spec.dim, slot=slot.at("read"), bias=True)
        self.set_classifier(spec, slot)
        self.axes = position_axes(self)
        self.front = Front()

    def forward(  # type: ignore[override]
        self,
        values: Tensor,
        *,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        logits: bool = True,
    ) -> Outputs:
        """values (B,T,F) -> Outputs with last_hidden_state (B,T,C), pooler_output (B,C') where there is a pooling, and
        class_logits (B,K), or (B,T,K) without one.

        attention_mask (B,T): nonzero where real; padding may stand on either side. segments (B,T): numbers of packed
        sequences, of which nothing is pooled. positions (B,T) or (B,T,A): when not counted from the masks. logits: of
        tokens, of which there are none. Raises DataError for shapes that do not fit.
        """
        if values.dim() != 3 or values.shape[-1] != self.features:
            raise DataError(f"values have shape {tuple(values.shape)}", remedy=f"give (batch, length, {self.features})")
        h = self.hidden(self.read(values), None, attention_mask, positions, segments)
        pooled, classes = self.judge(h, attention_mask, segments)
        return Outputs(last_hidden_state=h, pooler_output=pooled, class_logits=classes)

    def head(self, h: Tensor) -> Tensor:
        """Raises BuildError."""
        raise BuildError(
            "a sequence_classifier gives a class for each row, and says no tokens",
            where="head",
            remedy="read its class_logits, or train it with the objective classification",
        )
