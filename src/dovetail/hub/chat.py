"""Chat templates as checkpoints ship them: jinja in an immutable sandbox, because a template is somebody's program."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from dovetail.errors import UserError
from dovetail.hub.sandbox import Sandbox


class Conversation(str):
    """What a template wrote, its special tokens among it: encoding adds no more of them, such as a second BOS."""

    def __add__(self, more: str) -> Conversation:
        return Conversation(str(self) + more)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks what the assistant says: rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """jinja's own tojson escapes what HTML would misread; templates want plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def render(
    template: str, messages: Sequence[Mapping[str, Any]], generate: bool, variables: Mapping[str, Any]
) -> Conversation:
    """The text of a conversation. generate: with the opening of an answer. Raises UserError for anything that fails.

    Templates find what transformers gives them: messages, tools, documents, add_generation_prompt, the special
    tokens, raise_exception, strftime_now, tojson, break and continue.
    """
    given = {"tools": None, "documents": None} | dict(variables)
    options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [loopcontrols, _Generation]}
    environment = Sandbox((list(messages), given), **options)
    environment.filters["tojson"] = environment.bounded("tojson", _json)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        compiled = environment.from_string(template)
        return Conversation(compiled.render(messages=list(messages), add_generation_prompt=generate, **given))
    except Exception as error:  # a template is foreign code: whatever it raises is its own failure
        raise UserError(
            f"the chat template failed: {error}",
            remedy="check the roles and contents of the messages; a template that asks for more than text is refused",
        ) from None
