"""Text as it comes: whole characters, stop strings that straddle tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dovetail as dt
from dovetail.errors import UserError
from dovetail.sampling import Detokeniser, Sampling, TextRow, generate, sample, stream

LINES = ["the cat, 月光 and déjà vu 👩‍🚀!", "床前明月光，疑是地上霜。", "a\n\n  b\t c", "🚀🚀🚀", "mañana"]


def split(tokenizer: Any, text: str, at: int) -> tuple[list[int], list[int]]:
    ids = tokenizer.encode(text)
    return ids[:at], ids[at:]


@pytest.mark.parametrize("text", LINES)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_deltas_join_to_the_whole(tokenizer: Any, text: str, at: int) -> None:
    prompt, new = split(tokenizer, text, at)
    row = Detokeniser(tokenizer, prompt)
    pieces = [row.add(token) for token in new]
    assert all("\ufffd" not in piece for piece in pieces[:-1])
    before = tokenizer.decode(prompt)
    if "\ufffd" not in before:
        assert before + "".join([*pieces, row.flush()]) == tokenizer.decode([*prompt, *new]) == text
    assert at or len([piece for piece in pieces if piece]) > 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="ab tเ月é🚀光", min_size=1, max_size=14))
def test_any_text_survives(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    row = Detokeniser(tokenizer)
    assert "".join([*map(row.add, ids), row.flush()]) == tokenizer.decode(ids)


def test_bytes_that_are_no_character_are_shown_and_do_not_block(tokenizer: Any) -> None:
    """A model may emit anything: broken bytes come out as replacement signs and the text goes on."""
    half = tokenizer.encode("月亮")  # 亮 is in bytes in both tokenizers
    broken = [half[-2]] * 9
    row = Detokeniser(tokenizer, tokenizer.encode("the"))
    shown = "".join([*map(row.add, broken), *map(row.add, tokenizer.encode(" the end")), row.flush()])
    assert shown.count("\ufffd") >= 4 and shown.rstrip().endswith("the end")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(alphabet="aab月", min_size=1, max_size=16),
    stop=st.lists(st.text(alphabet="ab月", min_size=1, max_size=4), min_size=1, max_size=2),
)
def test_stop_strings_cut_wherever_tokens_break(tokenizer: Any, text: str, stop: list[str]) -> None:
    row = TextRow(tokenizer, [], tuple(stop), ())
    pieces = [row.add(token) for token in tokenizer.encode(text)]
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    shown = "".join([*pieces, row.flush()])
    assert row.stopped == bool(found)
    if not found:
        assert shown == text
    elif len(stop) == 1:
        assert shown == text[: found[0]]
    else:  # with several, the one that is complete first decides; what it cuts is still free of both
        assert text.startswith(shown) and not any(s in shown for s in stop)


@pytest.fixture(scope="module")
def model() -> Any:
    built = dt.build(
        {"kind": "decoder", "vocab": 320, "dim": 32, "depth": 2, "blocks": {"mixer": {"kind": "attention"}}}, seed=2
    )
    with torch.no_grad():
        for p in built.parameters():
            p.mul_(6 if p.dim() == 2 else 1)
    return built


def test_text_in_text_out(model: Any, tokenizer: Any) -> None:
    bars = list(range(tokenizer.vocab_size, 320))
    options = {"max_new_tokens": 24, "temperature": 1.0, "seed": 1, "suppress": bars}
    prompts = ["the cat", "月光", "a"]
    texts = generate(model, tokenizer, prompts, **options)
    assert [generate(model, tokenizer, prompt, **options) for prompt in prompts] == texts
    for prompt, text in zip(prompts, texts):
        pieces = list(stream(model, tokenizer, prompt, **options))
        assert "".join(pieces) == text and len(pieces) > 3


def test_a_stop_string_ends_its_row_alone(model: Any, tokenizer: Any) -> None:
    options = {"max_new_tokens": 30, "temperature": 1.0, "seed": 7, "suppress": list(range(tokenizer.vocab_size, 320))}
    prompts = ["the cat", "月光"]
    free = generate(model, tokenizer, prompts, **options)
    stop = free[0][4:7]
    assert len(stop) == 3
    got = sample(model, tokenizer, prompts, Sampling.of(**options, stop=stop))
    assert got.texts is not None
    assert got.texts[0] == free[0][: free[0].find(stop)]
    assert got.texts[1] == (free[1] if stop not in free[1] else free[1][: free[1].find(stop)])
    assert got.lengths[0] < 30
    assert "".join(stream(model, tokenizer, prompts[0], **options, stop=stop)) == got.texts[0]


def test_an_end_that_the_model_cannot_make_ends_nothing(model: Any, tokenizer: Any, monkeypatch: Any) -> None:
    """A published default may name an id that a smaller vocabulary lacks; one that is asked for is still refused."""
    want = generate(model, tokenizer, "the cat", max_new_tokens=8)
    monkeypatch.setattr(tokenizer, "eos_ids", (*tokenizer.eos_ids, 50256))
    assert generate(model, tokenizer, "the cat", max_new_tokens=8) == want
    with pytest.raises(UserError, match="token 50256 is outside"):
        generate(model, tokenizer, "the cat", max_new_tokens=8, eos=50256)
