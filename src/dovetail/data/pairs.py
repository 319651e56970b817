"""Prompt-completion pairs: the prompt is read, the completion and its end are learnt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

from pydantic import field_validator

from dovetail.data.corpus import Corpus, json_objects, no_text
from dovetail.errors import DataError
from dovetail.hub import Tokenizer
from dovetail.spec import register

Pair = tuple[str, str]  # prompt, completion


class Pairs(Corpus):
    """Base of corpora whose documents are pairs. `items()` yields where each item stands, and its fields by name.

    prompt, completion: templates over the fields, such as "{meaning} |||" and " {text}"; `{{` is a brace. Each
    pair becomes a document of its own: the label of a prompt's token is ignored, those of the completion and of the
    end token count. Several items with one prompt are several references of one question when it is scored.
    """

    prompt: str = "{prompt}"
    completion: str = "{completion}"

    @field_validator("prompt", "completion")
    @classmethod
    def _template(cls, value: str) -> str:
        fields = _fields(value)
        if not fields:
            raise ValueError(f"{value!r} names no field of the data; write the name in braces: {{text}}")
        return value

    def items(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(where, fields) of each item, always in the same order. Raises DataError as `documents` does."""
        raise TypeError(f"{self.kind} does not say where its pairs are")

    def pairs(self) -> Iterator[Pair]:
        """Prompt and completion of each item. Raises DataError for missing fields and for empty completions."""
        for where, fields in self.items():
            completion = _filled(self.completion, fields, where)
            if not completion.strip():
                raise DataError("a completion is empty", where=where, remedy="leave the item out: it teaches nothing")
            yield _filled(self.prompt, fields, where), completion

    def documents(self) -> Iterator[str]:
        """Each prompt with its completion behind it, as one text (what a tokenizer is trained on)."""
        yield from (prompt + completion for prompt, completion in self.pairs())

    def fingerprint(self) -> str:
        """SHA-256 of the prompts and completions, each with its length."""
        digest = hashlib.sha256(b"pairs")
        for pair in self.pairs():
            for data in (text.encode() for text in pair):
                digest.update(len(data).to_bytes(8, "little"))
                digest.update(data)
        return digest.hexdigest()


@register("corpus", "pairs", oracle="formula: the fields of each line", source="JSON Lines")
class JsonPairs(Pairs):
    """A file with a JSON object a line; its text fields fill the templates."""

    path: str

    def items(self) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from json_objects(Path(self.path))


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, completion ids) of each pair; the begin token stands before, the (first) end token behind.

    The two are encoded apart, so that a prompt has the same ids in training as when it is asked.
    """
    befores = encode_prompts(tokenizer, [prompt for prompt, _ in pairs])
    texts = [completion for _, completion in pairs]
    end = list(tokenizer.eos_ids[:1])
    afters = [e.ids + end for e in tokenizer.fast.encode_batch_fast(texts, add_special_tokens=False)]
    return list(zip(befores, afters, strict=True))


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Ids of each prompt behind the begin token, if the tokenizer has one: what generation begins with."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [begin + e.ids for e in tokenizer.fast.encode_batch_fast(list(prompts), add_special_tokens=False)]


def _fields(template: str) -> list[str]:
    """The field names of a template. Raises ValueError for what is none."""
    names = []
    for _, name, form, conversion in Formatter().parse(template):
        if name is None:
            continue
        if not name or form or conversion:
            raise ValueError(f"{template!r} is no template: a field stands as {{name}}, without format or conversion")
        names.append(name)
    return names


def _filled(template: str, fields: dict[str, Any], where: str) -> str:
    text = []
    for literal, name, _, _ in Formatter().parse(template):
        text.append(literal)
        if name is not None:
            if not isinstance(fields.get(name), str):
                raise no_text(name, fields, where, f"let the template {template!r} name one of")
            text.append(fields[name])
    return "".join(text)
