"""Decoding against transformers' generate, and rows that do not know of each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sampling_models import VOCAB, llama

import dovetail as dt
from dovetail.errors import SpecError, UserError
from dovetail.sampling import Sampling, generate, sample, stream
from dovetail.sampling.decode import uniforms

PROMPTS = [[5, 17, 9], [41], [8, 8, 30, 55, 60, 7, 12], [90, 3]]


def peer_greedy(peer: Any, ids: list[int], new: int, **options: Any) -> list[int]:
    out = peer.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=new,
        do_sample=False, **options,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 1, "head_dim": 10},
        {"tie_word_embeddings": True, "attention_bias": True},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ],
    ids=["plain", "mqa", "tied", "yarn"],
)
def test_greedy_equals_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    peer, ours = llama(tmp_path, **changes)
    for ids in PROMPTS:
        want = peer_greedy(peer, ids, 24)
        got = generate(ours, None, torch.tensor([ids]), max_new_tokens=24, eos=(2,))
        assert got[0].tolist() == want


@pytest.mark.parametrize("batch", [PROMPTS, PROMPTS[:2], [PROMPTS[0], [1, 2, 3]]], ids=["ragged", "two", "even"])
def test_a_row_in_a_batch_is_the_row_alone(pair: Any, batch: list[list[int]]) -> None:
    """Each row also ends by itself: 20 % of all ids are ends, so that rows end at different steps."""
    peer, ours = pair
    eos = tuple(range(0, VOCAB, 5))
    result = sample(ours, None, batch, Sampling(max_new_tokens=20, eos=eos), logprobs=True)
    assert result.logprobs is not None
    for i, ids in enumerate(batch):
        alone = sample(ours, None, [ids], Sampling(max_new_tokens=20, eos=eos), logprobs=True)
        n = int(alone.lengths[0])
        assert result.lengths[i] == n
        assert (
            result.tokens[i, :n].tolist()
            == alone.tokens[0].tolist()
            == peer_greedy(peer, ids, 20, eos_token_id=list(eos))
        )
        assert (result.tokens[i, n:] == eos[0]).all() and (result.logprobs[i, n:] == 0).all()
        torch.testing.assert_close(result.logprobs[i, :n], alone.logprobs[0], rtol=1e-4, atol=1e-4)
    assert len(set(result.lengths.tolist())) > 1 or len(batch) == 2


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_logprobs_are_training_s(pair: Any, temperature: float) -> None:
    _, ours = pair
    options = Sampling(max_new_tokens=12, temperature=temperature, seed=4 if temperature else None)
    result = sample(ours, None, PROMPTS, options, logprobs=True)
    for i, ids in enumerate(PROMPTS):
        new = result.tokens[i]
        with torch.no_grad():
            full = ours(torch.cat([torch.tensor(ids), new])[None]).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        assert result.logprobs is not None
        torch.testing.assert_close(result.logprobs[i], full.gather(-1, new[:, None]).squeeze(-1), rtol=1e-4, atol=2e-5)


def test_a_seed_means_the_same_alone_and_in_any_batch(pair: Any) -> None:
    _, ours = pair

    def draw(batch: list[list[int]], seed: int | None, new: int = 16) -> list[list[int]]:
        return generate(ours, None, batch, max_new_tokens=new, temperature=2.0, top_p=0.95, seed=seed).tolist()

    together = draw(PROMPTS, 11)
    assert draw(PROMPTS[::-1], 11)[::-1] == together
    for ids, row in zip(PROMPTS, together):
        assert draw([ids], 11) == [row]
        assert draw([ids], 11, new=7) == [row[:7]]
    assert draw(PROMPTS, 12) != together
    assert draw(PROMPTS, None) != draw(PROMPTS, None)
    copies = draw([PROMPTS[0]] * 3, 11)
    assert copies[0] == together[0] and len({tuple(row) for row in copies}) == 3


@pytest.mark.parametrize("form", [torch.tensor, np.array, tuple], ids=["tensors", "arrays", "tuples"])
def test_ids_are_drawn_alike_whatever_holds_them(pair: Any, form: Any) -> None:
    _, ours = pair
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 2.0, "seed": 11}
    want = generate(ours, None, [PROMPTS[0]] * 3, **options).tolist()
    assert generate(ours, None, [form(PROMPTS[0])] * 3, **options).tolist() == want
    assert len({tuple(row) for row in want}) == 3


def test_uniforms_are_uniform_and_apart() -> None:
    table = uniforms([[1], [2], [1]], 5, 4000)
    assert table.shape == (3, 4000) and table.min() >= 0 and table.max() < 1
    assert abs(table.mean() - 0.5) < 3 / (12 * 12000) ** 0.5
    assert len({row.tobytes() for row in table}) == 3


def test_constraints_equal_transformers(pair: Any) -> None:
    peer, ours = pair
    for ids in PROMPTS[:3]:
        want = peer_greedy(
            peer, ids, 20, repetition_penalty=1.6, no_repeat_ngram_size=2, min_new_tokens=15, suppress_tokens=[4, 9],
        )  # fmt: skip
        got = generate(
            ours, None, [*PROMPTS, ids], max_new_tokens=20, repetition_penalty=1.6, no_repeat_ngram=2,
            min_new_tokens=15, suppress=[4, 9], eos=2,
        )  # fmt: skip
        assert got[-1, : len(want)].tolist() == want


def window_model(size: int, kind: str = "rope") -> Any:
    mixer = {"kind": "attention", "heads": 4, "mask": {"kind": "window", "size": size}, "position": kind}
    spec = {"kind": "decoder", "vocab": VOCAB, "dim": 32, "depth": 2, "blocks": {"mixer": mixer}}
    model = dt.build(spec, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() == 2 else 1)
    return model


@pytest.mark.parametrize("size", [1, 3, 5])
@torch.no_grad()
def test_a_ring_decodes_what_the_full_forward_says(size: int) -> None:
    """A window's ring is overwritten many times over, at a prompt longer and shorter than it."""
    model = window_model(size)
    batch = [[7, 3, 60, 12, 44, 9, 81], [5, 6], [1]]
    got = generate(model, None, batch, max_new_tokens=14)
    for ids, row in zip(batch, got.tolist()):
        grown = list(ids)
        for token in row:
            assert int(model(torch.tensor([grown])).logits[0, -1].argmax()) == token
            grown.append(token)


def test_streaming_is_generating(pair: Any) -> None:
    _, ours = pair
    want = generate(ours, None, [PROMPTS[0]], max_new_tokens=15, temperature=1.0, seed=3, eos=2)[0].tolist()
    assert list(stream(ours, None, PROMPTS[0], max_new_tokens=15, temperature=1.0, seed=3, eos=2)) == want
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_the_column_layout_comes_and_goes(pair: Any) -> None:
    """It changes strides while a single row is decoded, never values, and is gone however decoding ends."""
    _, ours = pair
    before = {name: (p.stride(), p.detach().clone()) for name, p in ours.named_parameters()}

    def as_before() -> bool:
        now = {name: (p.stride(), p) for name, p in ours.named_parameters()}
        assert all(torch.equal(now[name][1], before[name][1]) for name in before)
        return all(now[name][0] == before[name][0] for name in before)

    pieces = stream(ours, None, PROMPTS[0], max_new_tokens=20)
    next(pieces)
    assert not as_before()
    pieces.close()
    assert as_before()
    generate(ours, None, [PROMPTS[0]], max_new_tokens=20)
    assert as_before()
    with pytest.raises(UserError):
        generate(ours, None, [[VOCAB]], max_new_tokens=20)
    assert as_before() and not any(p.is_inference() for p in ours.parameters())
    ours(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    ours.zero_grad()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beams": 2, "temperature": 1.0}, "search or draw"),
        ({"beams": 2, "stop": "x"}, "stop strings"),
        ({"top_k": 5}, "top_k has no effect at temperature 0"),
        ({"seed": 5}, "seed has no effect"),
        ({"length_penalty": 2.0}, "without beam search"),
        ({"early_stopping": True}, "without beam search"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": 90}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p"),
        ({"max_new_tokens": "5"}, "max_new_tokens"),
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"stop": [""]}, "empty stop string"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Sampling.of(**options)


def test_bad_prompts_are_refused(pair: Any) -> None:
    _, ours = pair
    for prompts, words in (
        ([[]], "empty prompt"),
        ([], "no prompts"),
        ([[1] * 65], "65 tokens and the model's context is 64"),
        ([[VOCAB]], f"token {VOCAB} is outside"),
        ([[-1]], "token -1 is outside"),
        (torch.zeros(2, 3), "integer ids"),
        (torch.zeros(3, dtype=torch.long), "shape"),
        ("text", "without a tokenizer"),
        ([1, 2, 3], "no rows of ids"),
        ([[1.5, 2]], "no rows of ids"),
        ([torch.tensor([[1, 2]])], "no rows of ids"),
    ):
        with pytest.raises(UserError, match=words):
            generate(ours, None, prompts)
    with pytest.raises(UserError, match="stop strings without a tokenizer"):
        generate(ours, None, [[1]], stop="x")
    assert generate(ours, None, [[1] * 64], max_new_tokens=4).shape == (1, 4)


def test_a_scaling_lifts_the_limit_and_a_table_sets_one() -> None:
    def model(position: dict[str, Any], stack: dict[str, Any]) -> Any:
        mixer = {"kind": "attention", "position": position}
        spec = {"kind": "decoder", "vocab": 9, "dim": 16, "depth": 1, "context": 8, "blocks": {"mixer": mixer}, **stack}
        return dt.build(spec)

    scaled = model({"kind": "rope", "scaling": {"kind": "yarn", "factor": 4.0}}, {})
    assert generate(scaled, None, [[1] * 32], max_new_tokens=2).shape == (1, 2)
    with pytest.raises(UserError, match="33 tokens and the model's context is 32"):
        generate(scaled, None, [[1] * 33], max_new_tokens=2)
    learned = model({"kind": "none"}, {"position": {"kind": "learned"}})
    assert generate(learned, None, [[1] * 5], max_new_tokens=3).shape == (1, 3)
    with pytest.raises(UserError, match=r"need 9 positions.*table has 8") as caught:
        generate(learned, None, [[1] * 5], max_new_tokens=4)
    assert caught.value.remedy is not None and "at most 3" in caught.value.remedy
