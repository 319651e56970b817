"""Tokenizers and chat templates: the same text and ids as transformers; a hostile template ends in a clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel

import dovetail as dt
from dovetail.errors import CheckpointError, UserError

REAL = Path(__file__).parents[3] / "shared/configs"
TEXT = ["def main():\n    return 1\n", "你好，世界。", "The quick brown fox 🦊", "    \n\n<s> not special"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Written here after the styles in use: alternation enforced, tools as JSON, loop controls, namespaces, whitespace trims.
STYLES = {
    "chatml": CHATML,
    "alternating": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "tools": (
        "{%- if tools %}\n    {%- for t in tools %}\n{{- t | tojson(indent=2) }}\n    {%- endfor %}\n{%- endif %}\n"
        "{%- if tools is none %}{{ 'no tools' }}{% endif %}{{ documents | string }}"
        "{%- set ns = namespace(last=0) %}\n{%- for m in messages %}\n  {%- if loop.index > 2 %}{%- break %}{% endif %}\n"
        "  {%- set ns.last = loop.index0 %}{{ m.content | tojson }}\n{%- endfor %}\n{{ ns.last }}"
    ),
    "specials": "{% for n in [bos_token, eos_token, unk_token] %}{{ n }}{% endfor %}{{ pad_token is defined }}{{ mask_token is defined }}",
}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "  1 + 1 = ? <b>&</b> "}],
    [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": '"好"\n'},
        {"role": "user", "content": "再见"},
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "加法 <a>", "parameters": {"x": "int"}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with special tokens, as checkpoints ship it."""
    where = tmp_path_factory.mktemp("tokenizer")
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(TEXT * 4, trainer)
    fast.add_special_tokens([AddedToken(t, special=True) for t in special])
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.save(str(where / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }
    config["eos_token"] = {"content": "</s>", "__type": "AddedToken", "special": True}  # type: ignore[assignment]
    (where / "tokenizer_config.json").write_text(json.dumps(config))
    return where


def both(folder: Path, template: str) -> tuple[Any, Any]:
    from transformers import PreTrainedTokenizerFast

    ours, theirs = dt.load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    ours.template = theirs.chat_template = template
    return ours, theirs


@pytest.mark.parametrize("text", TEXT)
def test_ids_equal_transformers(folder: Path, text: str) -> None:
    ours, theirs = both(folder, "")
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False)["input_ids"]
    ids = ours.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert (ours.bos_id, ours.eos_ids, ours.pad_id) == (
        theirs.bos_token_id,
        (theirs.eos_token_id,),
        theirs.pad_token_id,
    )


def rendered(tokenizer: Any, chat: list[dict[str, Any]], generate: bool, tools: Any) -> str | None:
    """The text, or None where the template refuses the conversation."""
    from jinja2 import TemplateError

    try:
        if hasattr(tokenizer, "chat"):
            return tokenizer.chat(chat, generate=generate, **({"tools": tools} if tools else {}))
        return tokenizer.apply_chat_template(chat, tools=tools, add_generation_prompt=generate, tokenize=False)
    except (UserError, TemplateError):
        return None


def check(folder: Path, template: str) -> None:
    ours, theirs = both(folder, template)
    texts = []
    for chat in CHATS:
        for generate in (False, True):
            for tools in (None, TOOLS):
                texts.append(rendered(theirs, chat, generate, tools))
                assert rendered(ours, chat, generate, tools) == texts[-1]
    assert any(texts)


@pytest.mark.parametrize("style", ["chatml", "alternating"])
def test_a_conversation_has_its_special_tokens_once(folder: Path, style: str) -> None:
    """The tokenizer begins texts with <s>; the template writes its own, or wants none."""
    ours, theirs = both(folder, STYLES[style])
    text = ours.chat(CHATS[0])
    wanted = theirs.apply_chat_template(CHATS[0], add_generation_prompt=True, return_dict=False)
    assert ours.encode(text) == wanted and wanted.count(1) == (style == "alternating")
    assert ours.encode(text + "Sure") == wanted + ours.encode("Sure", special=False)
    assert ours.encode(str(text)) == [1, *wanted]


@pytest.mark.parametrize("style", STYLES)
def test_templates_equal_transformers(folder: Path, style: str) -> None:
    check(folder, STYLES[style])


@pytest.mark.skipif(not REAL.exists(), reason="the real templates lie outside the repository")
@pytest.mark.parametrize(
    "name", ["qwen2.5-1.tokenizer_config.json", "minimind-1.tokenizer_config.json", "llama-1.chat_template.json"]
)
def test_real_templates_equal_transformers(folder: Path, name: str) -> None:
    check(folder, json.loads((REAL / name).read_text(encoding="utf-8"))["chat_template"])


def test_where_a_template_lies(folder: Path, tmp_path: Path) -> None:
    """chat_template.jinja before chat_template.json before tokenizer_config.json, whose list has a default."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert dt.load_tokenizer(tmp_path).template is None
    with pytest.raises(UserError, match="no chat template"):
        dt.load_tokenizer(tmp_path).chat(CHATS[0])
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "a"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert dt.load_tokenizer(tmp_path).chat(CHATS[0]) == "a"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "b"}')
    assert dt.load_tokenizer(tmp_path).chat(CHATS[0]) == "b"
    (tmp_path / "chat_template.jinja").write_text("c")
    assert dt.load_tokenizer(tmp_path).chat(CHATS[0]) == "c"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self.__init__.__globals__['__builtins__'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ (messages | attr('append'))('x') }}",
        "{% set _ = messages.append(1) %}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ messages[0].content.missing.deeper }}",
        "{{ 1 / 0 }}",
        "{% if %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_hostile_templates_end_in_a_clear_error(folder: Path, template: str) -> None:
    tokenizer = dt.load_tokenizer(folder)
    tokenizer.template = template
    chat = [dict(message) for message in CHATS[1]]
    try:
        text = tokenizer.chat(chat)
    except UserError as error:
        assert "chat template failed" in str(error) and error.exit_code == 2
    else:
        raise AssertionError(f"rendered {text[:80]!r}")
    assert chat == CHATS[1]


def test_damaged_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        dt.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:500])
    with pytest.raises(CheckpointError, match="cannot be read"):
        dt.load_tokenizer(tmp_path)


def test_a_new_model_says_its_tokenizers_special_ids(tmp_path: Path) -> None:
    import dovetail as dt
    from dovetail.data import train_tokenizer

    train_tokenizer(["def f(x): return x"] * 20, 280, tmp_path / "tok")
    tokenizer = dt.load_tokenizer(tmp_path / "tok")
    model = dt.build({"kind": "decoder", "vocab": tokenizer.vocab_size, "dim": 16, "depth": 1})
    with pytest.raises(CheckpointError, match="no directory"):
        dt.save(model, tmp_path / "out", tokenizer_from=tmp_path / "elsewhere")
    dt.save(model, tmp_path / "out", tokenizer_from=tmp_path / "tok")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["bos_token_id"] == tokenizer.bos_id and config["eos_token_id"] == tokenizer.eos_ids[0]
    assert dt.load_tokenizer(tmp_path / "out").eos_ids == tokenizer.eos_ids
