"""Control codes: a word before each document that says what sort it is, so that generation can be asked for that sort."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import model_validator

from dovetail.data.corpus import Corpus
from dovetail.data.pairs import Pairs
from dovetail.spec import register
from dovetail.spec.categories import CorpusPart


@register(
    "corpus",
    "controlled",
    oracle="formula: code, a space, the document",
    source="Keskar et al. 2019 (CTRL), section 3: p(x | c)",
)
class Controlled(Corpus):
    """Several corpora one after another, each document behind the code of its corpus and a space.

    A model trained on them is asked by beginning the prompt with a code. A code is a prefix of real tokens: a prefix
    adapter that starts from its ids (`tokens`) goes on from there. codes: one for each of `corpora`, in their order.
    """

    codes: tuple[str, ...]
    corpora: tuple[CorpusPart, ...]

    @model_validator(mode="after")
    def _one_each(self) -> Controlled:
        if len(self.codes) != len(self.corpora) or not self.codes:
            raise ValueError(f"{len(self.codes)} codes for {len(self.corpora)} corpora; give one each")
        if not all(code.strip() == code != "" for code in self.codes) or len(set(self.codes)) < len(self.codes):
            raise ValueError(f"codes {self.codes}; give different words without space around them")
        if any(isinstance(corpus, Pairs) for corpus in self.corpora):
            raise ValueError(
                "pairs would lose which tokens are their prompts; write the code into their prompt template"
            )
        return self

    def documents(self) -> Iterator[str]:
        for code, corpus in zip(self.codes, self.corpora, strict=True):
            yield from (f"{code} {text}" if text else "" for text in corpus.documents())  # type: ignore[attr-defined]
