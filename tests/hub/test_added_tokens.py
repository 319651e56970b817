"""What stands beside a tokenizer.json and changes ids: the same as transformers gives; tokenizer.json itself stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

import dovetail as dt
from dovetail.errors import CheckpointError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NAMED = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED}
BERT = {"tokenizer_class": "BertTokenizer", **NAMED}
TEXT = "Hello abc! <extra> EFG <u> a"
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    letters = list("abcdefghijklmnopqrstuvwxyzABCDEFGH.,!<>")
    vocab = {word: i for i, word in enumerate([*SPECIAL, *letters, *(f"##{c}" for c in letters)])}
    fast = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    fast.normalizer, fast.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder: Path, said: dict[str, Any], **files: Any) -> None:
    for name, content in {"tokenizer_config": said, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def edit(folder: Path, **changes: Any) -> bytes:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path.read_bytes()


def ids(folder: Path) -> list[int]:
    """Of TEXT, the same as transformers'."""
    from transformers import AutoTokenizer

    ours = dt.load_tokenizer(folder).encode(TEXT)
    assert ours == AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    return ours


def test_a_length_to_cut_and_fill_to_is_no_call_s_choice(folder: Path, tmp_path: Path) -> None:
    """Exports of sentence encoders say both; and saving gives the file back as it was."""
    write(folder, GENERIC)
    plain = ids(folder)
    cut = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    before = edit(folder, truncation=cut, padding={**fill, "pad_type_id": 0, "pad_token": "[PAD]"})
    assert ids(folder) == plain
    model = dt.build({"kind": "decoder", "vocab": 90, "dim": 16, "depth": 1})
    out = dt.save(model, tmp_path / "out", tokenizer_from=folder)
    assert (out / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize(
    ("config", "files", "new"),
    [
        (GENERIC, {}, 0),
        (GENERIC | {"added_tokens_decoder": {"83": {"content": "<extra>", **FLAGS}}}, {}, 1),
        (GENERIC | {"additional_special_tokens": ["<extra>", "<u>"]}, {}, 2),
        (GENERIC | {"extra_special_tokens": ["<extra>"]}, {}, 1),
        (GENERIC | {"extra_special_tokens": {"image_token": "<u>"}}, {}, 1),
        (GENERIC | {"image_token": "<u>"}, {}, 1),
        (GENERIC | {"pad_token": "<u>"}, {}, 1),
        (GENERIC, {"special_tokens_map": {"additional_special_tokens": ["<extra>"]}}, 1),
        (GENERIC, {"special_tokens_map": {"bos_token": {"content": "<u>", "lstrip": True}}}, 1),
        (GENERIC, {"added_tokens": {"<extra>": 83}}, 1),
        (GENERIC | {"added_tokens_decoder": {}}, {"added_tokens": {"<extra>": 83}}, 0),
    ],
)
def test_tokens_that_tokenizer_json_lacks(folder: Path, config: Any, files: Any, new: int) -> None:
    write(folder, config, **files)
    assert len({i for i in ids(folder) if i > 82}) == new
    assert dt.load_tokenizer(folder).vocab_size == 83 + new


def test_flags_beside_tokenizer_json(folder: Path) -> None:
    """A token that is there is taken with the flags of tokenizer_config.json where it says them."""
    said = {"content": "[MASK]", **FLAGS, "lstrip": True}
    write(folder, GENERIC | {"added_tokens_decoder": {"4": said}})
    ids(folder)
    assert dt.load_tokenizer(folder).fast.get_added_tokens_decoder()[4].lstrip
    write(folder, GENERIC | {"added_tokens_decoder": {"4": said | {"lstrip": False}}})
    assert not dt.load_tokenizer(folder).fast.get_added_tokens_decoder()[4].lstrip


def test_case_as_bert_s_own_class_is_told(folder: Path) -> None:
    write(folder, BERT | {"do_lower_case": True})
    lower = ids(folder)
    write(folder, BERT | {"do_lower_case": False})
    assert ids(folder) != lower
    write(folder, GENERIC | {"do_lower_case": False})
    assert ids(folder) == lower


def test_a_space_in_front_as_gpt2_s_own_class_is_told(tmp_path: Path) -> None:
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    for stored in (False, True):
        fast = Tokenizer(models.BPE(vocab, []))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=stored)
        fast.save(str(tmp_path / "tokenizer.json"))
        for told in (True, False):
            write(tmp_path, {"add_prefix_space": told}, config={"model_type": "gpt2"})
            assert (ids(tmp_path)[0] == vocab["Ġ"]) is told
        write(tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": not stored})
        assert (ids(tmp_path)[0] == vocab["Ġ"]) is stored


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("Bert", "bert"),
        ("DebertaV2", "deberta-v2"),
        ("Bart", "bart"),
        ("Roberta", "roberta"),
        ("XLMRoberta", "xlm-roberta"),
        ("XLNet", "xlnet"),
        ("T5", "mt5"),
        ("GPT2", "gpt2"),
        ("Qwen2", "qwen3"),
        ("Llama", None),
    ],
)
def test_roles_that_no_file_names(tmp_path: Path, name: str, model: str | None) -> None:
    """The first releases (bert-base, gpt2, roberta-base) say none: their class knows them."""
    import transformers as hf

    usual = {role: str(token) for role, token in getattr(hf, f"{name}Tokenizer")().special_tokens_map.items()}
    vocab = {token: i for i, token in enumerate(dict.fromkeys(usual.values()))}
    Tokenizer(models.WordLevel(vocab, unk_token=usual["unk_token"])).save(str(tmp_path / "tokenizer.json"))
    configs = [{"tokenizer_class": f"{name}Tokenizer"}, {"tokenizer_class": f"{name}TokenizerFast"}]
    for config in configs:
        write(tmp_path, config)
        assert dt.load_tokenizer(tmp_path).special == usual
    write(tmp_path, {}, config={"tokenizer_class": f"{name}Tokenizer"})
    assert dt.load_tokenizer(tmp_path).special == usual
    if model is not None:
        (tmp_path / "tokenizer_config.json").unlink()
        write(tmp_path, {}, config={"model_type": model})
        assert dt.load_tokenizer(tmp_path).special == usual
    write(tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast"}, config={"model_type": model})
    assert dt.load_tokenizer(tmp_path).special == {}
    write(tmp_path, configs[0] | {"unk_token": None, "eos_token": None})
    assert not dt.load_tokenizer(tmp_path).special.keys() & {"unk_token", "eos_token"}


def test_roles_of_tokens_that_are_not_there(folder: Path) -> None:
    write(folder, {"tokenizer_class": "RobertaTokenizer"})
    assert dt.load_tokenizer(folder).special == {}
    write(folder, {"tokenizer_class": "BertTokenizer", "mask_token": "[PAD]"})
    tokenizer = dt.load_tokenizer(folder)
    assert tokenizer.special == NAMED | {"mask_token": "[PAD]"} and tokenizer.pad_id == 0


def test_ids_that_cannot_be(folder: Path) -> None:
    write(folder, GENERIC | {"added_tokens_decoder": {"900": {"content": "<extra>", **FLAGS}}})
    with pytest.raises(CheckpointError, match="'<extra>' is said to have id 900"):
        dt.load_tokenizer(folder)
    for wrong in ({"added_tokens_decoder": [1]}, {"added_tokens_decoder": {"x": {}}}, {"extra_special_tokens": 5}):
        write(folder, GENERIC | wrong)
        with pytest.raises(CheckpointError, match="added tokens cannot be read"):
            dt.load_tokenizer(folder)


def test_the_template_for_tools(folder: Path) -> None:
    several = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with {{ tools|length }}"}]
    write(folder, GENERIC | {"chat_template": several})
    tokenizer = dt.load_tokenizer(folder)
    assert (tokenizer.chat([]), tokenizer.chat([], tools=[{}])) == ("plain", "with 1")
    write(folder, GENERIC)
    (folder / "chat_template.jinja").write_text("one")
    assert dt.load_tokenizer(folder).chat([], tools=[{}]) == "one"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("other")
    assert dt.load_tokenizer(folder).chat([], tools=[{}]) == "other"
    (folder / "chat_template.jinja").unlink()
    for wrong in (["x"], 5, [{"name": "default", "template": 5}]):
        write(folder, GENERIC | {"chat_template": wrong})
        with pytest.raises(CheckpointError, match="chat_template is neither"):
            dt.load_tokenizer(folder)


def test_every_file_of_a_tokenizer_goes_along(folder: Path, tmp_path: Path) -> None:
    from fnmatch import fnmatch

    from dovetail.hub.remote import PATTERNS

    names = ["sentencepiece.bpe.model", "source.spm", "target.spm", "target_vocab.json", "vocab.spm", "spm.model"]
    names += ["tekken.json", "additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"]
    (folder / "additional_chat_templates").mkdir()
    for name in names:
        (folder / name).write_text(name)
    write(folder, GENERIC)
    out = dt.save(
        dt.build({"kind": "decoder", "vocab": 90, "dim": 16, "depth": 1}), tmp_path / "o", tokenizer_from=folder
    )
    assert all((out / name).read_text() == name for name in names)
    assert all(any(fnmatch(name, pattern) for pattern in PATTERNS) for name in names)
