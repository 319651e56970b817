"""Columns that are kept between calls: what is generated is always what the weights say at that moment."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sampling_models import VOCAB

import dovetail as dt
from dovetail.sampling import Sampling, layout, sample, stream
from dovetail.sampling.layout import vector_layout

PROMPT = [3, 1, 4, 1, 5]
SHORT = Sampling.of(max_new_tokens=16)


@pytest.fixture
def model() -> Any:
    """Widths of both parities, a head that is the table too, weights that tell tokens apart."""
    blocks = {"mixer": {"kind": "attention", "heads": 2}, "feedforward": {"kind": "glu", "hidden": 45}}
    built = dt.build({"kind": "decoder", "vocab": VOCAB, "dim": 32, "depth": 2, "context": 64, "blocks": blocks}).eval()
    for p in built.parameters():
        p.data.mul_(8 if p.dim() == 2 else 1)
    return built


def made(model: Any) -> tuple[list[int], torch.Tensor]:
    result = sample(model, None, [PROMPT], SHORT, logprobs=True)
    assert result.logprobs is not None
    return result.tokens[0].tolist(), result.logprobs


def assert_fresh(model: Any) -> None:
    """Bit for bit what a copy without kept columns makes."""
    got, want = made(model), made(copy.deepcopy(model))
    assert got[0] == want[0]
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0)


def trained(model: Any) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.tensor([PROMPT])).logits.logsumexp(-1).sum().backward()
    optimiser.step()
    optimiser.zero_grad()


def last_bit(model: Any) -> None:
    """The smallest change there is, which no version counter sees."""
    entry = model.blocks[0].mixer.qkv.weight.data[5, 7]
    entry.copy_(torch.nextafter(entry, torch.tensor(9.0)))


def doubled(model: Any) -> None:
    for p in model.parameters():
        p.data.mul_(2)


def swapped_rows(model: Any) -> None:
    for w in layout._matrices(model, wide=False):
        w.data.copy_(w.data.flip(0))


def other_weights(model: Any) -> None:
    model.load_state_dict({k: v + 0.1 * v.sin() for k, v in model.state_dict().items()}, assign=True)


def other_memory(model: Any) -> None:
    for p in model.parameters():
        p.data = p.data + 0.1 * p.data.sin()


@pytest.mark.parametrize("change", [trained, last_bit, doubled, swapped_rows, other_weights, other_memory])
def test_a_change_between_two_calls_is_seen(model: Any, change: Callable[[Any], None]) -> None:
    before = made(model)
    weights = layout._matrices(model, wide=False)
    old = {w: layout._kept[w].data.clone() for w in weights}
    change(model)
    assert_fresh(model)
    if change is not last_bit:
        assert made(model) != before
    assert any(
        w not in old or not torch.equal(layout._kept[w].data, old[w]) for w in layout._matrices(model, wide=False)
    )


def test_an_unchanged_model_is_not_laid_out_again(model: Any) -> None:
    made(model)
    weights = layout._matrices(model, wide=False)
    rows, columns = ([t.data_ptr() for t in ts] for ts in (weights, [layout._kept[w].data for w in weights]))
    kept = [layout._kept[w] for w in weights]
    for one in kept:
        one.data.fill_(0.5)  # what is used next is what was kept: wrong now, and its print with it
        one.print = layout._print(one.data)
    with vector_layout(model, 1, 16):
        assert all((w == 0.5).all() for w in weights)
        assert columns == [w.data_ptr() for w in weights]
    assert rows == [w.data_ptr() for w in weights] and all(w.is_contiguous() for w in weights)


@pytest.mark.parametrize("change", [trained, last_bit, doubled])
def test_a_change_within_a_stream_stays(model: Any, change: Callable[[Any], None]) -> None:
    """It falls on the columns, and the rows have it afterwards."""
    made(model)
    other = copy.deepcopy(model)
    pieces = stream(model, None, PROMPT, max_new_tokens=16)
    next(pieces)
    change(model)
    pieces.close()
    change(other)
    torch.testing.assert_close(dict(model.named_parameters()), dict(other.named_parameters()), rtol=1e-5, atol=1e-5)
    assert_fresh(model)


def test_other_memory_within_a_stream_stays(model: Any) -> None:
    pieces = stream(model, None, PROMPT, max_new_tokens=16)
    next(pieces)
    other_memory(model)
    want = {name: p.detach().clone() for name, p in model.named_parameters()}
    pieces.close()
    assert all(torch.equal(p, want[name]) and p.is_contiguous() for name, p in model.named_parameters())
    assert_fresh(model)


@pytest.mark.parametrize("shape", [(4, 6), (4, 5), (3, 4), (3, 5), (1, 6), (6, 1), (1, 1), (5, 1)])
def test_a_print_sees_every_entry(shape: tuple[int, int]) -> None:
    """At an even and an odd offset, of rows and of columns that were turned."""
    for offset in (0, 1):
        store = torch.randn(shape[0] * shape[1] + 1)
        rows = store[offset : offset + shape[0] * shape[1]].view(shape)
        for matrix in (rows, rows.t().contiguous()):
            first, prints = layout._print(matrix), set()
            for i in range(matrix.numel()):
                matrix.view(-1)[i] *= 2
                prints.add(tuple(layout._print(matrix).tolist()))
                matrix.view(-1)[i] /= 2
            assert len(prints) == matrix.numel() and tuple(first.tolist()) not in prints
            assert torch.equal(layout._print(matrix), first)


def test_columns_go_with_the_model(model: Any) -> None:
    made(model)
    kept = [weakref.ref(layout._kept[w]) for w in layout._matrices(model, wide=False)]
    gc.collect()
    assert all(one() is not None for one in kept)
    for part in model.modules():  # the fixture holds the model itself
        part._parameters.clear()
    gc.collect()
    assert len(kept) > 8 and all(one() is None for one in kept)


def test_a_vector_is_turned_in_memory_of_its_own() -> None:
    """Other memory is put in the weight's place, and what it had before stays as it was."""
    narrow = torch.nn.Linear(1, 6, bias=False)
    before = narrow.weight.data
    want = before.clone()
    for _ in range(2):
        with vector_layout(narrow, 1, 16):
            pass
        narrow.weight.data = torch.randn(6, 1)
    assert torch.equal(before, want)


def test_a_large_model_keeps_none(model: Any, monkeypatch: Any) -> None:
    want = made(model)
    total = sum(w.nbytes for w in layout._matrices(model, wide=False))
    for most, keeps in ((total - 1, False), (total, True)):
        monkeypatch.setattr(layout, "KEPT", most)
        other = copy.deepcopy(model)
        tokens, chances = made(other)
        assert tokens == want[0] and torch.equal(chances, want[1])
        weights = layout._matrices(other, wide=False)
        assert len(weights) > 8 and all((w in layout._kept) is keeps for w in weights)
