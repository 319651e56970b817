"""Tokenizers as checkpoints ship them: tokenizer.json by the `tokenizers` library, chat templates by sandboxed jinja."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from dovetail.errors import CheckpointError, UserError
from dovetail.hub import files
from dovetail.hub.chat import Conversation, render
from dovetail.hub.remote import resolve
from dovetail.hub.vocabulary import complete, roles_of


class Tokenizer:
    """Text to ids and back, with the checkpoint's special tokens and chat template.

    tool_template: the template of a conversation with tools, where it is another.
    """

    def __init__(
        self,
        fast: FastTokenizer,
        *,
        bos: str | None = None,
        eos: Sequence[str] = (),
        pad: str | None = None,
        template: str | None = None,
        extra_eos: Sequence[int] = (),
        special: Mapping[str, str] | None = None,
        tool_template: str | None = None,
        beside: int = 0,
    ):
        self.fast = fast
        named_here = {"bos_token": bos, "eos_token": eos[0] if eos else None, "pad_token": pad}
        self.special = {**(special or {}), **{k: v for k, v in named_here.items() if v is not None}}
        self.bos, self.eos, self.pad, self.template = bos, tuple(eos), pad, template
        self.tool_template, self.beside = tool_template, beside
        self.bos_id = None if bos is None else fast.token_to_id(bos)
        self.pad_id = None if pad is None else fast.token_to_id(pad)
        named = [i for t in eos if (i := fast.token_to_id(t)) is not None]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*named, *extra_eos]))

    @property
    def stored_size(self) -> int:
        """`vocab_size` without the tokens at its end that only the files beside tokenizer.json name."""
        return self.vocab_size - self.beside

    @cached_property
    def vocab_size(self) -> int:
        """The largest id and one: ids may have gaps."""
        return max(self.fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text; special: with what the tokenizer adds by itself (a BOS, say), but to what `chat` made."""
        return self.fast.encode(text, add_special_tokens=special and not isinstance(text, Conversation)).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return self.fast.decode(list(ids), skip_special_tokens=skip_special)

    def chat(self, messages: Sequence[dict[str, Any]], *, generate: bool = True, **variables: Any) -> Conversation:
        """The text of a conversation by the checkpoint's template, rendered in jinja's immutable sandbox.

        Raises UserError when there is no template or it refuses the messages.
        """
        template = self.tool_template if variables.get("tools") is not None else None
        template = self.template if template is None else template
        if template is None:
            raise UserError("this tokenizer has no chat template", remedy="prompt it with plain text")
        return render(template, messages, generate, self.special | variables)


def load_tokenizer(path: str | Path, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a directory or hub id.

    Raises CheckpointError when there is none, or no tokenizer.json in it, or that is damaged.
    """
    folder = resolve(path, revision, weights=False)
    old = folder / "0_Transformer"  # of the first sentence-transformers directories
    folder = old if not (folder / "tokenizer.json").exists() and (old / "tokenizer.json").exists() else folder
    file = folder / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(
            "no tokenizer.json here",
            where=str(folder),
            remedy="save the tokenizer in the fast format beside the weights",
        )
    try:
        fast = FastTokenizer.from_file(str(file))
    except Exception as error:
        raise CheckpointError(f"tokenizer.json cannot be read: {error}", where=str(file)) from None
    config, special, added, model = (
        files.read_json(folder / name) if (folder / name).exists() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
    )
    before = fast.get_vocab_size()
    complete(fast, config, special, added, model, folder)
    beside = fast.get_vocab_size() - before
    roles = roles_of(fast, config, special, model)
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            value = files.read_json(folder / name).get("eos_token_id")
            ids += [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
            if ids:
                break
    eos = roles.get("eos_token")
    template, tool_template = _templates(folder, config)
    return Tokenizer(
        fast,
        bos=roles.get("bos_token"),
        eos=() if eos is None else (eos,),
        pad=roles.get("pad_token"),
        template=template,
        extra_eos=ids,
        special=roles,
        tool_template=tool_template,
        beside=beside,
    )


def _templates(folder: Path, config: dict[str, Any]) -> tuple[str | None, str | None]:
    """(the chat template, the one for conversations with tools where there is another). Raises CheckpointError."""
    value: Any = config.get("chat_template")
    if isinstance(value, list):  # several named templates
        value = {str(t.get("name")): t.get("template") for t in value if isinstance(t, dict)} or value
    found: dict[str, Any] = dict(value) if isinstance(value, dict) else {"default": value}
    if (folder / "chat_template.json").exists():
        found = {"default": files.read_json(folder / "chat_template.json").get("chat_template")}
    if (folder / "chat_template.jinja").exists():
        found = {"default": (folder / "chat_template.jinja").read_text(encoding="utf-8")}
    tools = folder / "additional_chat_templates" / "tool_use.jinja"
    if tools.exists():
        found["tool_use"] = tools.read_text(encoding="utf-8")
    both = found.get("default"), found.get("tool_use")
    if any(not isinstance(t, str | None) for t in both):
        raise CheckpointError(
            "chat_template is neither text nor a list of {name, template}",
            where=str(folder),
            remedy="mend it there, or put the template into chat_template.jinja",
        )
    return both
