"""Word vectors as the start of a token embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.errors import BuildError
from dovetail.parts.init import Init, Normal
from dovetail.spec import Slot, register
from dovetail.spec.categories import InitPart
from dovetail.stats import WordVectors


@register(
    "init",
    "word_vectors",
    oracle="formula: row i of the file is the vector of id i",
    source="Collobert et al. 2011, section 4 (embeddings from unlabelled text)",
)
class WordVectorsInit(Init):
    """The token embedding from a file of word vectors, all else by another scheme.

    path: word2vec's text or binary format, row i for id i, as wide as the model;
    `WordVectors.load(...).embedding(tokens).save(path)` puts vectors into a tokenizer's order.
    """

    path: str
    base: InitPart = Normal()

    def draw(self, weight: Tensor, role: str, fan_in: int, fan_out: int, slot: Slot, rng: torch.Generator) -> None:
        if role != "embedding" or fan_in != slot.dim_out:  # a table of segments stands in no embedding's slot
            self._base.draw(weight, role, fan_in, fan_out, slot, rng)
            return
        matrix = WordVectors.load(self.path).matrix
        if matrix.shape != weight.shape:
            raise BuildError(
                f"{self.path} has {matrix.shape[0]} vectors of width {matrix.shape[1]}, the embedding "
                f"{weight.shape[0]} of width {weight.shape[1]}",
                where=slot.path,
                remedy="put them into the tokenizer's order with WordVectors.embedding(tokens), at the model's width",
            )
        weight.copy_(matrix)

    def multiplier(self, role: str, fan_in: int, fan_out: int) -> float:
        return self._base.multiplier(role, fan_in, fan_out)

    def lr_scale(self, role: str, fan_in: int, fan_out: int) -> float:
        return self._base.lr_scale(role, fan_in, fan_out)

    @property
    def _base(self) -> Init:
        return self.base  # type: ignore[return-value]
