"""Text that says passages of itself again: practice in copying from context, which small models hardly get otherwise."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, model_validator

from dovetail.data.corpus import Corpus
from dovetail.data.pairs import Pairs
from dovetail.spec import register
from dovetail.spec.categories import CorpusPart


@register(
    "corpus",
    "echoed",
    oracle="formula: without its echoes the text is as it was, and every echo stands before it",
    source="Olsson et al. 2022, section 3: in-context copying (induction) of repeated passages",
)
class Echoed(Corpus):
    """Another corpus, into which passages that it has just said are put again, at word borders.

    After every `span` words (drawn between the two numbers) a passage of so many words, drawn anew, follows with chance
    `share`; it begins at most `reach` words back, echoes counted, and within its document. The draw depends on the seed
    and the number of the document alone.
    """

    corpus: CorpusPart
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    span: Annotated[tuple[int, int], Field(strict=False)] = (16, 64)
    reach: int = Field(default=256, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> Echoed:
        if not 1 <= self.span[0] <= self.span[1] <= self.reach:
            raise ValueError(f"span {list(self.span)}, reach {self.reach}; give 1 <= span[0] <= span[1] <= reach")
        if isinstance(self.corpus, Pairs):
            raise ValueError("pairs would lose which tokens are their prompts; give a corpus of texts")
        return self

    def documents(self) -> Iterator[str]:
        for number, text in enumerate(self.corpus.documents()):  # type: ignore[attr-defined]
            yield "".join(word for piece in self.pieces(text, number) for word in piece)

    def pieces(self, text: str, number: int = 0) -> Iterator[list[str]]:
        """The document `text` cut into words with the space before them, in turn of the text and an echo, often empty."""
        words = re.findall(r"\s*\S+|\s+$", text)
        draw = random.Random(f"{self.seed} {number}")
        said: list[str] = []  # the last `reach` words and more
        at = 0
        while at < len(words):
            piece = words[at : at + draw.randint(*self.span)]
            at += len(piece)
            said += piece
            yield piece
            echo: list[str] = []
            size = draw.randint(*self.span)
            if draw.random() < self.share and len(said) >= size and at < len(words):
                begin = draw.randint(max(0, len(said) - self.reach), len(said) - size)
                echo = said[begin : begin + size]
                said += echo
            yield echo
            del said[: -self.reach]
