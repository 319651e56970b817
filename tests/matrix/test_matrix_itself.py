"""The matrix catches what it is for: broken parts, registered for the length of one test, fail the right check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dovetail.parts.context import Context
from dovetail.parts.state import Room, VectorState
from dovetail.spec import Entry, Slot, Spec, entry, register, registry
from matrix import test_matrix_decoding as decoding
from matrix import test_matrix_sequences as sequences
from matrix.harness import subject


class Averaging(nn.Module):
    """Adds a running mean of the row, done wrong in one way."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def new_state(self, room: Room) -> VectorState:
        return VectorState(sum=torch.zeros(room.batch, 16, dtype=room.dtype), n=torch.zeros(room.batch, 1))

    def forward(self, x: Tensor, ctx: Context, state: VectorState | None = None) -> Tensor:
        if self.how == "sees the future":
            return x.mean(1, keepdim=True).expand_as(x)
        total, n = x.cumsum(1), torch.arange(1, x.shape[1] + 1)[:, None].expand(*x.shape[:2], 1)
        if state is not None and self.how != "forgets its state":
            total, n = total + state["sum"][:, None], n + state["n"][:, None]
            state.update(sum=total[:, -1], n=n[:, -1].to(state["n"].dtype))
        return total / n


@pytest.fixture
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Entry]:
    known = dict(registry._ENTRIES["mixer"])
    monkeypatch.setitem(registry._ENTRIES, "mixer", known)

    @register("mixer", "broken", oracle="none", source="this test")
    class Broken(Spec):
        def build(self, slot: Slot) -> nn.Module:
            return Averaging(request.param)

    subject.cache_clear()
    yield entry("mixer", "broken")
    subject.cache_clear()


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        ("sees the future", sequences.test_nothing_leaks_from_the_future),
        ("ignores padding", lambda e: sequences.test_padding_changes_nothing(e, "left")),
        ("ignores packing", sequences.test_packing_changes_nothing),
        ("forgets its state", torch.no_grad()(decoding.test_prefill_steps_and_chunks_equal_the_training_forward)),
    ],
    indirect=["broken"],
)
def test_a_broken_mixer_is_caught(broken: Entry, check: Callable[[Entry], Any]) -> None:
    with pytest.raises(AssertionError, match=r"differs by|reaches the future"):
        check(broken)
