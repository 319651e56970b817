"""The shared matrix, part 3: decoding with a state gives what training saw, and the state can be handled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.errors import RunError
from dovetail.spec import Entry
from matrix.harness import LENGTH, VOCAB, close, looking_back, name, subject, tokens

each = pytest.mark.parametrize("e", looking_back(), ids=name)
exact = pytest.mark.parametrize("e", [e for e in looking_back() if e.decode == "exact"], ids=name)
pytestmark = pytest.mark.usefixtures("_no_grad")


@pytest.fixture
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def decode(model: Any, x: Tensor, chunks: list[int], state: Any = None) -> tuple[Tensor, Any]:
    """Logits of x (B,T) fed in chunks, and the state."""
    state = model.new_state(x.shape[0], 2 * LENGTH) if state is None else state
    return torch.cat([model(part, state=state).logits for part in x.split(chunks, 1)], 1), state


@exact
def test_prefill_steps_and_chunks_equal_the_training_forward(e: Entry) -> None:
    model, x = subject(e.category, e.kind), tokens(2, LENGTH)
    full = model(x).logits
    for chunks in ([LENGTH], [1] * LENGTH, [5, 1, 4, LENGTH - 10], [1, LENGTH - 1]):
        close(decode(model, x, chunks)[0], full, what=f"chunks {chunks}")


@pytest.mark.parametrize("e", [e for e in looking_back() if e.decode != "exact"], ids=name)
def test_approximate_decoding_is_bounded(e: Entry) -> None:
    """Exact in one prefill and within the trained length; different, but not by much, when stepped beyond it."""
    model, x = subject(e.category, e.kind), tokens(2, LENGTH)
    full = model(x).logits
    close(decode(model, x, [LENGTH])[0], full, what="one prefill")
    close(decode(model, x[:, :8], [3, 1, 1, 3])[0], model(x[:, :8]).logits, what="within the trained length")
    stepped = decode(model, x, [1] * LENGTH)[0]
    shift = (stepped.softmax(-1) - full.softmax(-1)).abs().sum(-1).max() / 2
    assert 0 < shift < 0.5, f"total variation {shift}: if it is 0, the part should be declared exact"


@exact
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_uneven_length_decode_together(e: Entry, side: str) -> None:
    model, rows = subject(e.category, e.kind), [tokens(n) for n in (LENGTH, LENGTH - 3, 5)]
    first = [len(row) - 4 for row in rows]  # prefill unevenly, then four steps together
    width = max(first)
    batch, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width)
    for i, (row, n) in enumerate(zip(rows, first, strict=True)):
        where = slice(width - n, None) if side == "left" else slice(0, n)
        batch[i, where], mask[i, where] = row[:n], 1
    state = model.new_state(3, 2 * LENGTH)
    prefill = model(batch, attention_mask=mask, state=state).logits
    steps = decode(model, torch.stack([row[-4:] for row in rows]), [1, 1, 2], state)[0]
    for i, row in enumerate(rows):
        close(torch.cat([prefill[i][mask[i] > 0], steps[i]]), model(row[None]).logits[0], what=f"row {i}")


@exact
def test_state_survives_reordering(e: Entry) -> None:
    model, x = subject(e.category, e.kind), tokens(3, LENGTH)
    _, state = decode(model, x[:, :6], [4, 1, 1])
    state.reorder(torch.tensor([2, 0, 0, 1]))
    mixed = torch.cat([x[[2, 0, 0, 1], :6], tokens(4, LENGTH - 6)], 1)
    rest = decode(model, mixed[:, 6:], [1, 1, LENGTH - 8], state)[0]
    close(rest, model(mixed).logits[:, 6:])


@exact
@pytest.mark.parametrize("length", [3, 10])
def test_state_survives_truncation_or_refuses_it(e: Entry, length: int) -> None:
    """What comes after the cut is as if what was cut had never been; a part that cannot forget says so."""
    model, x = subject(e.category, e.kind), tokens(2, LENGTH)
    _, state = decode(model, x[:, :length], [length])
    before = state.snapshot()
    try:
        state.truncate(length - 2)
    except RunError as refusal:
        assert refusal.remedy and "snapshot" in refusal.remedy
        other = tokens(2, 3)
        close(decode(model, other, [1, 2], before)[0], model(torch.cat([x[:, :length], other], 1)).logits[:, length:])
        return
    other = torch.cat([x[:, : length - 2], tokens(2, LENGTH - length + 2)], 1)
    rest = decode(model, other[:, length - 2 :], [1, LENGTH - length + 1], state)[0]
    close(rest, model(other).logits[:, length - 2 :])


@exact
def test_snapshot_is_independent(e: Entry) -> None:
    model, x = subject(e.category, e.kind), tokens(2, LENGTH)
    _, state = decode(model, x[:, :7], [7])
    kept = state.snapshot()
    other = torch.cat([x[:, :7], (x[:, 7:] + 1) % 5], 1)
    decode(model, other[:, 7:], [1] * (LENGTH - 7), state)
    close(decode(model, x[:, 7:], [2, LENGTH - 9], kept)[0], model(x).logits[:, 7:])


@pytest.mark.parametrize("e", [e for e in looking_back() if e.category == "mixer"], ids=name)
def test_a_state_of_another_dtype_decodes(e: Entry) -> None:
    """As new_state(dtype=...) says: half the memory of a cache, at the price of its roundings."""
    model, x = subject(e.category, e.kind), tokens(2, 7)
    state = model.new_state(2, 8, dtype=torch.float32)
    close(decode(model, x, [3, 1, 3], state)[0], model(x).logits, 1e-4)


@pytest.mark.parametrize("e", [e for e in looking_back() if e.category in ("mixer", "block")], ids=name)
def test_no_tokens_change_nothing(e: Entry) -> None:
    """Rows of none, as what is left of a prompt may be, and none of padding."""
    model, x, none = subject(e.category, e.kind), tokens(2, 6), tokens(2, 0)
    assert model(none).logits.shape == (2, 0, VOCAB) and model(x[:0]).logits.shape == (0, 6, VOCAB)
    state = model.new_state(2, 12)
    first = [model(part, state=state).logits for part in (none, x[:, :4], none)]
    model(x[:, :3], attention_mask=torch.zeros(2, 3), state=state)
    close(torch.cat([*first, model(x[:, 4:], state=state).logits], 1), model(x).logits)


def reached(value: Any, seen: dict[int, Any]) -> dict[int, Any]:
    """Everything that attributes, mappings and sequences lead to from `value`, by id."""
    if id(value) in seen or isinstance(value, type):
        return seen
    seen[id(value)] = value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for each in (*inner, *vars(value).values()) if hasattr(value, "__dict__") else inner:
        reached(each, seen)
    return seen


@each
def test_a_state_names_its_buffers(e: Entry) -> None:
    """Each tensor once, none left out: what compiled steps copy from one prompt to the next. Equal states name alike."""
    model = subject(e.category, e.kind)
    states = [decode(model, tokens(2, n), [n])[1] for n in (4, 7)]
    for state in states:
        state.uncount()
        found = {id(t) for t in reached(state, {}).values() if isinstance(t, Tensor)}
        named = [id(t) for t in state.buffers()]
        assert len(named) == len(set(named)) and set(named) == found
    assert [(t.shape, t.dtype) for t in states[0].buffers()] == [(t.shape, t.dtype) for t in states[1].buffers()]


@each
def test_a_state_refuses_gradients(e: Entry) -> None:
    model = subject(e.category, e.kind)
    with torch.enable_grad(), pytest.raises(RunError, match="gradients"):
        model(tokens(1, 3), state=model.new_state(1, 8))


@pytest.mark.parametrize("uneven", [False, True])
def test_a_full_state_says_so(uneven: bool) -> None:
    """Rows of 6 and 2 tokens in a state for 8: two more fit, a third does not, padding or not."""
    model, x = subject("mixer", "attention"), tokens(2, 6)
    state = model.new_state(2, 8)
    mask = torch.tensor([[1] * 6, [0, 0, 0, 0, 1, 1]])
    model(x, attention_mask=mask if uneven else None, state=state)
    decode(model, x[:, :2], [1, 1], state)
    with pytest.raises(RunError, match="holds 8 tokens and 9 are needed"):
        decode(model, x[:, :1], [1], state)
