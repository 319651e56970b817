"""LSTM and GRU against torch.nn: weights by name, outputs, gradients, documents and decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dovetail.errors import BuildError, RunError
from dovetail.parts.context import Context
from dovetail.parts.recurrent import rnn
from dovetail.parts.state import Room, VectorState
from oracles import oracle_for
from parts.making import make

PEERS = {"lstm": nn.LSTM, "gru": nn.GRU}
PLAIN = Context.of(3, 9, torch.device("cpu"))


def pair(kind: str, hidden: int = 16, **fields: Any) -> tuple[Any, Any]:
    """Ours, and torch.nn's holding the same weights under the same names."""
    causal = not fields.get("bidirectional", False)
    ours = make("mixer", {"kind": kind, "hidden": hidden} | fields, dtype=torch.float64, causal=causal)
    theirs = PEERS[kind](
        16, hidden, batch_first=True, bias=fields.get("bias", True), bidirectional=not causal, dtype=torch.float64
    )
    theirs.load_state_dict({n: p for n, p in ours.state_dict().items() if not n.startswith("out.")})
    return ours, theirs


@oracle_for("mixer", "lstm", "gru")
@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("fields", [{}, {"bias": False}, {"bidirectional": True, "hidden": 8}], ids=str)
def test_recurrences_are_torchs(kind: str, fields: dict[str, Any]) -> None:
    ours, theirs = pair(kind, **fields)
    assert ours.out is None
    ours.load_state_dict(theirs.state_dict())  # a torch.nn checkpoint loads as it is
    x = torch.randn(3, 9, 16, dtype=torch.float64, requires_grad=True)
    y, z = ours(x, PLAIN), theirs(x)[0]
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    w = torch.randn_like(z)
    a = torch.autograd.grad((y * w).sum(), [x, *ours.parameters()])
    b = torch.autograd.grad((z * w).sum(), [x, *theirs.parameters()])
    for g, h in zip(a, b, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", PEERS)
def test_another_width_is_mapped_back(kind: str) -> None:
    ours, theirs = pair(kind, hidden=24)
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x, PLAIN), theirs(x)[0] @ ours.out.weight.T)


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_documents_start_from_zero_wherever_they_stand(kind: str, bidirectional: bool) -> None:
    """Padding before, between and after; documents of one token; a row of padding alone."""
    ours, theirs = pair(kind, hidden=8 if bidirectional else 16, bidirectional=bidirectional)
    segments = torch.tensor([[-1, 0, 0, 0, 1, 2, 2, 2, 2], [5, 5, -1, 5, 5, 6, -1, -1, -1], [-1] * 9])
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    y = ours(x, Context.of(3, 9, x.device, segments=segments))
    assert (y[segments < 0] == 0).all()
    for b in range(2):
        for number in segments[b].unique():
            if number >= 0:
                here = segments[b] == number
                torch.testing.assert_close(y[b, here], theirs(x[b : b + 1, here])[0][0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", PEERS)
def test_the_state_is_torchs(kind: str) -> None:
    """After an uneven prefill and a step, h (and c) are those of each row run alone."""
    ours, theirs = pair(kind)
    state = ours.new_state(Room(3, 20, torch.device("cpu"), torch.float64))
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    mask = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1], [0] * 8])
    with torch.no_grad():
        ours(x[:, :8], Context.of(3, 8, x.device, attention_mask=mask), state)
        assert (state["h"][2] == 0).all()  # a row of padding moves nothing
        ours(x[:, 8:], Context.of(3, 1, x.device, start=state["h"].new_tensor([8, 5, 0]).long()), state)
        for b, start in ((0, 0), (1, 3), (2, 8)):
            last = theirs(x[b : b + 1, start:])[1]
            for name, tensor in zip("hc", last if kind == "lstm" else (last,), strict=False):
                torch.testing.assert_close(state[name][b], tensor[0, 0], rtol=1e-12, atol=1e-12)
    assert state.nbytes() == 3 * 16 * 8 * (2 if kind == "lstm" else 1)
    with pytest.raises(RunError, match="gradients"):
        ours(x, PLAIN, state)
    with pytest.raises(RunError, match="truncated"):
        VectorState(h=x).truncate(1)


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_rows_longer_than_the_library_counts(kind: str, bidirectional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces: the same outputs, gradients and state, of whole rows and of documents."""
    mixer = pair(kind, hidden=8, bidirectional=bidirectional)[0]
    segments = torch.tensor([[0, 0, 0, 0, 0, 1, 1, -1, 2], [-1, -1, 0, 0, 0, 0, 0, 0, 0], [-1] * 9])
    for ctx in (PLAIN, Context.of(3, 9, torch.device("cpu"), segments=segments)):
        found = []
        for most in (9, 2):
            monkeypatch.setattr(rnn, "_LONGEST", {"cpu": most})
            x = torch.randn(3, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
            y = mixer(x, ctx)
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])])
            if not bidirectional:
                state = mixer.new_state(Room(3, 9, torch.device("cpu"), torch.float64))
                with torch.no_grad():
                    found[-1] += [mixer(x, ctx, state), *(state[n] for n in mixer.names)]
        for whole, pieces in zip(*found, strict=True):
            torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-12)


def test_no_rows_are_no_rows() -> None:
    assert pair("lstm")[0](torch.zeros(0, 5, 16, dtype=torch.float64), Context.of(0, 5, torch.device("cpu"))).shape == (
        0,
        5,
        16,
    )


def test_the_start_is_torchs_and_the_forget_bias_is_what_is_asked() -> None:
    lstm = make("mixer", "lstm", dim=64)
    for weight in lstm.parameters():
        assert 0.9 / 8 < weight.abs().max() <= 1 / 8
    biased = make("mixer", {"kind": "lstm", "forget_bias": 1.0}, dim=64)
    total = (biased.bias_ih_l0 + biased.bias_hh_l0).detach()
    assert (total[64:128] == 1).all() and total[:64].std() > 0 and total[128:].std() > 0
    assert torch.equal(biased.weight_ih_l0, lstm.weight_ih_l0)  # and nothing else moves


def test_refusals() -> None:
    with pytest.raises(BuildError, match="future"):
        make("mixer", {"kind": "lstm", "bidirectional": True})
    with pytest.raises(BuildError, match="encoder's output"):
        make("mixer", "gru", memory_dim=16)
    with pytest.raises(BuildError, match="forget"):
        make("mixer", {"kind": "lstm", "bias": False, "forget_bias": 1.0})
    both = make("mixer", {"kind": "gru", "bidirectional": True}, causal=False)
    with pytest.raises(BuildError, match="step by step"):
        both.new_state(Room(1, 4, torch.device("cpu"), torch.float32))
    with pytest.raises(BuildError, match="keys"):
        make("mixer", "gru")(torch.randn(3, 9, 16), PLAIN, keys=torch.randn(3, 9, 16))
