"""What a document is: a run of one number. The same to masks, positions and recurrences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dovetail.parts.context import Context
from dovetail.parts.mask import Causal
from parts.making import make

# Rows with numbers that come again, and where their documents lie: (row, its tokens).
SEGMENTS = torch.tensor([
    [0, 0, 1, 1, 0, 0, 0, 2],
    [7, -1, 7, 3, -1, 7, 3, 3],  # padding inside a document, and between two
    [-1, 0, -1, -1, 0, 1, 0, -1],
    [-5, -1, -1, -2, -1, -1, -1, -1],
])  # fmt: skip
DOCUMENTS = [
    (0, [0, 1]), (0, [2, 3]), (0, [4, 5, 6]), (0, [7]),
    (1, [0, 2]), (1, [3]), (1, [5]), (1, [6, 7]),
    (2, [1, 4]), (2, [5]), (2, [6]),
]  # fmt: skip
ROPE = {"kind": "rope"}


def packed(**more: Any) -> Context:
    return Context.of(4, 8, SEGMENTS.device, segments=SEGMENTS, **more)


def test_order_and_segments_say_the_same_documents() -> None:
    ctx = packed()
    order, number = torch.zeros_like(SEGMENTS), torch.full_like(SEGMENTS, -1)
    for row, at in DOCUMENTS:
        order[row, at] = torch.arange(len(at))
        number[row, at] = number[row].max() + 1
    assert torch.equal(ctx.order, order) and torch.equal(ctx.positions[..., 0], order)
    assert ctx.segments is not None and torch.equal(ctx.segments, number)


def test_the_mask_keeps_documents_of_one_number_apart() -> None:
    seen = torch.zeros(4, 8, 8, dtype=torch.bool)
    for row, at in DOCUMENTS:
        for n, i in enumerate(at):
            seen[row, i, at[: n + 1]] = True
    assert torch.equal(packed().bind(Causal()).dense()[:, 0], seen)


@pytest.mark.parametrize(
    "mixer",
    [
        {"kind": "attention", "heads": 2, "position": ROPE},
        {"kind": "attention", "heads": 2, "position": {"kind": "t5_buckets"}},
        {"kind": "latent", "heads": 2, "rank": 8},
        {"kind": "lstm"},
        {"kind": "gru", "bidirectional": True},
    ],
    ids=lambda m: m["kind"],
)
def test_every_mixer_sees_a_document_as_if_alone(mixer: dict[str, Any]) -> None:
    module = make("mixer", mixer, dtype=torch.float64, causal=not mixer.get("bidirectional", False))
    x = torch.randn(4, 8, 16, dtype=torch.float64, requires_grad=True)
    y = module(x, packed())
    alone = torch.zeros_like(y)
    for row, at in DOCUMENTS:
        alone[row, at] = module(x[row : row + 1, at], Context.of(1, len(at), x.device))[0]
    real = SEGMENTS >= 0
    torch.testing.assert_close(y[real], alone[real], rtol=1e-10, atol=1e-12)
    w = torch.randn_like(y[real])
    ours, theirs = (torch.autograd.grad((out[real] * w).sum(), [x, *module.parameters()]) for out in (y, alone))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_hiding_a_document_does_not_join_its_neighbours() -> None:
    mask = torch.ones_like(SEGMENTS)
    mask[0, 2:4] = 0  # all of document 1
    mask[0, 5] = 0  # and a token of the next
    ctx = packed(attention_mask=mask)
    assert ctx.segments is not None
    assert ctx.segments[0].tolist() == [0, 0, -1, -1, 2, -1, 2, 3]
    assert ctx.order[0].tolist() == [0, 1, 0, 0, 0, 0, 1, 0]
    assert torch.equal(ctx.order[1:], packed().order[1:])
