"""What the files beside a tokenizer.json say of its tokens, made part of it as transformers does.

Nearly every checkpoint's tokenizer.json has all its tokens, and then nothing here changes anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import ByteLevel

from dovetail.errors import CheckpointError

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Classes that go by the keys of _CASES; others take tokenizer.json as it is. None is a directory of before there were names.
_CASED = re.compile(
    r"(Bert|DistilBert|MobileBert|ConvBert|SqueezeBert|RoFormer|Electra|MPNet|Funnel|Lxmert|DPR\w*|LayoutLM\w*)Tokenizer(Fast)?"
)
_CASES = {
    "do_lower_case": "lowercase",
    "tokenize_chinese_chars": "handle_chinese_chars",
    "strip_accents": "strip_accents",
}
# Classes that go by add_prefix_space where tokenizer.json says something else.
_SPACED = ("GPT2", "Roberta", "Bart")
# What transformers' classes call their special tokens where no file does, as in many first releases (BERT, GPT-2, RoBERTa).
_BERT = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")}
_FAIRSEQ = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>"}
_FAIRSEQ |= {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
_END = "<|endoftext|>"
_ROLES: dict[str, dict[str, str]] = {
    "Bert": _BERT,
    "DistilBert": _BERT,
    "RoFormer": _BERT,
    "DebertaV2": {"bos_token": "[CLS]", "eos_token": "[SEP]", **_BERT},
    "Bart": _FAIRSEQ,
    "Roberta": _FAIRSEQ,
    "XLMRoberta": _FAIRSEQ,
    "XLNet": _FAIRSEQ | {"sep_token": "<sep>", "cls_token": "<cls>"},
    "T5": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "GPT2": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "Llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
}
# The class of a model type where no file names one.
_CLASS = {
    "bert": "Bert",
    "roformer": "RoFormer",
    "deberta-v2": "DebertaV2",
    "bart": "Bart",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "xlnet": "XLNet",
    "t5": "T5",
    "mt5": "T5",
    "gpt2": "GPT2",
    "qwen2": "Qwen2",
    "qwen3": "Qwen2",
}


def named(value: Any) -> str | None:
    """The text of a token that a file gives as text or as a mapping with `content`."""
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else None


def roles_of(
    fast: FastTokenizer, config: Mapping[str, Any], special: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, str]:
    """Role -> token, as tokenizer_config.json and special_tokens_map.json say, else as the class in use calls it.

    model: config.json, which tells the class where the others do not. A role said to be null has no token.
    """
    first, second = (config, special) if "added_tokens_decoder" in config else (special, config)
    said = {role: named(first.get(role) or second.get(role)) for role in SPECIAL if role in first or role in second}
    usual = _ROLES.get(_class(config, model), {})
    there = {role: token for role, token in usual.items() if fast.token_to_id(token) is not None}
    return {role: token for role, token in (there | said).items() if token is not None}


def _class(config: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """The class that reads the files, without its ending."""
    said = str(config.get("tokenizer_class") or model.get("tokenizer_class") or "")
    return re.sub(r"Tokenizer(Fast)?$", "", said) or _CLASS.get(str(model.get("model_type")), "")


def complete(
    fast: FastTokenizer,
    config: Mapping[str, Any],
    special: Mapping[str, Any],
    added: Mapping[str, Any],
    model: Mapping[str, Any],
    where: Path,
) -> None:
    """Adds to `fast` what tokenizer_config.json, special_tokens_map.json and added_tokens.json say beside it.

    With `added_tokens_decoder` the first alone counts. Raises CheckpointError for tokens that are none, and for one
    that would not get the id that it has there.
    """
    # A length to cut or fill to is a call's to choose: exports of sentence encoders carry one.
    fast.no_truncation()
    fast.no_padding()
    fast.encode_special_tokens = config.get("split_special_tokens") is True
    _set_case(fast, config)
    space, splitter = config.get("add_prefix_space"), fast.pre_tokenizer
    if _class(config, model) in _SPACED and isinstance(space, bool) and isinstance(splitter, ByteLevel):
        splitter.add_prefix_space = space
        fast.pre_tokenizer = splitter
    roles = dict(config) if "added_tokens_decoder" in config else {**config, **special}
    there = {token.content: token for token in fast.get_added_tokens_decoder().values()}
    new: dict[str, AddedToken] = {}
    ids: dict[str, Any] = {}
    titles = {text for role in roles if _is_role(role) and (text := named(roles[role])) is not None}
    try:
        numbered, titled = list(_numbered(roles, added, titles)), list(_titled(roles))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the added tokens cannot be read ({error!r})",
            where=str(where),
            remedy="look at added_tokens_decoder, extra_special_tokens and added_tokens.json there",
        ) from None
    for number, token in numbered:
        if token.content in titles:
            token.special = True
        if token.content not in there or _flags(token) != _flags(there[token.content]):
            new[token.content], ids[token.content] = token, number
    for token in titled:
        if token.content not in there and token.content not in new:
            new[token.content] = token
    if not new:
        return
    fast.add_tokens(list(new.values()))
    for content, number in ids.items() if "added_tokens_decoder" in roles else ():  # added_tokens.json may be stale
        if content not in there and fast.token_to_id(content) != number:
            raise CheckpointError(
                f"the token {content!r} is said to have id {number}, and tokenizer.json, which lacks it, leaves it "
                f"{fast.token_to_id(content)}",
                where=str(where),
                remedy="save the tokenizer again with the library that made it, so that tokenizer.json has the token",
            )


def _numbered(roles: Mapping[str, Any], added: Mapping[str, Any], titles: set[str]) -> Iterator[tuple[int, AddedToken]]:
    """The tokens that a file gives an id, in the order of their ids."""
    said = roles.get("added_tokens_decoder")
    if said is not None:
        yield from sorted(((int(i), _token(t, False)) for i, t in said.items()), key=lambda pair: pair[0])
        return
    special = titles | {named(t) for key in _EXTRA for t in roles.get(key) or ()}
    for content, number in sorted(added.items(), key=lambda pair: int(pair[1])):
        yield int(number), AddedToken(content, normalized=content not in special, special=content in special)


def _titled(roles: Mapping[str, Any]) -> Iterator[AddedToken]:
    """The special tokens that have a role, then those that have none."""
    for role in dict.fromkeys((*SPECIAL, *roles)):
        if _is_role(role) and named(roles.get(role)):
            yield _token(roles[role], True)
    extra = roles.get("extra_special_tokens", roles.get("additional_special_tokens"))
    for value in (extra.values() if isinstance(extra, Mapping) else extra) or ():
        if named(value):
            yield _token(value, True)


def _is_role(key: str) -> bool:
    return key in SPECIAL or (key.endswith("_token") and not key.startswith("add_"))


def _token(value: Any, special: bool) -> AddedToken:
    """A token from its text, or from a mapping with its text and its flags."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    flags = {name: value[name] for name in _FLAGS if name in value}
    return AddedToken(str(value["content"]), **flags | ({"special": True} if special else {}))


def _flags(token: AddedToken) -> tuple[bool, ...]:
    return tuple(getattr(token, name) for name in _FLAGS)


def _set_case(fast: FastTokenizer, config: Mapping[str, Any]) -> None:
    """BERT's own classes go by these keys where tokenizer.json says something else."""
    normalizer = fast.normalizer
    if not isinstance(normalizer, BertNormalizer) or not _CASED.fullmatch(
        str(config.get("tokenizer_class", "BertTokenizer"))
    ):
        return
    for key, name in _CASES.items():
        if isinstance(config.get(key), bool) and config[key] != getattr(normalizer, name):
            setattr(normalizer, name, config[key])
    fast.normalizer = normalizer
