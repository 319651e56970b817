"""Masks against their formulas written as loops, the algebra, and the rings that windows keep while decoding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dovetail as dt
from dovetail.kernels.attention import BoundMask, Coords, Side
from dovetail.parts.context import Context
from dovetail.parts.mask import (
    And,
    Band,
    Causal,
    Dilated,
    Document,
    Full,
    Mask,
    Or,
    Padding,
    Prefix,
    Strided,
    Window,
)  # fmt: skip
from oracles import oracle_for

T = 11
SEGMENTS = [0, 0, 0, 1, 1, 1, 1, 2, -1, -1, -1]
FORMULAS: list[tuple[Mask, Callable[[int, int], bool]]] = [
    (Full(), lambda i, j: True),
    (Causal(), lambda i, j: j <= i),
    (Window(size=4), lambda i, j: 0 <= i - j < 4),
    (Band(before=3, after=1), lambda i, j: -1 <= i - j <= 3),
    (Prefix(length=3), lambda i, j: j < 3),
    (Dilated(step=3), lambda i, j: (i - j) % 3 == 0),
    (Strided(stride=3), lambda i, j: 0 <= i - j < 3 or (i - j) % 3 == 0),
    (Document(), lambda i, j: SEGMENTS[i] == SEGMENTS[j] >= 0),
    (Padding(), lambda i, j: SEGMENTS[j] >= 0),
    (Padding(lengths=(5,)), lambda i, j: j < 5),
    (And(rules=(Causal(), Dilated(step=2))), lambda i, j: j <= i and (i - j) % 2 == 0),
    (Or(rules=(Window(size=2), Prefix(length=1))), lambda i, j: 0 <= i - j < 2 or j < 1),
]


def bound(rule: Mask) -> BoundMask:
    side = Side(torch.arange(T)[None], torch.tensor([SEGMENTS]))
    return BoundMask(rule, Coords(side, side))


@oracle_for(
    "mask", "full", "causal", "window", "band", "prefix", "dilated", "strided", "document", "padding", "and", "or"
)
@pytest.mark.parametrize(("rule", "formula"), FORMULAS, ids=[f"{r.kind}-{n}" for n, (r, _) in enumerate(FORMULAS)])
def test_masks_are_their_formulas(rule: Mask, formula: Callable[[int, int], bool]) -> None:
    expected = torch.tensor([[formula(i, j) for j in range(T)] for i in range(T)])
    assert torch.equal(bound(rule).dense()[0, 0], expected)
    assert not rule.is_full() or expected.all()
    assert not rule.is_causal() or torch.equal(expected, torch.ones(T, T).tril() > 0)
    span = (rule & Causal()).span()
    if span is not None:
        assert not any(expected[i, j] for i in range(T) for j in range(i - span + 1))


RULES = st.sampled_from([rule for rule, _ in FORMULAS])


@settings(max_examples=60, deadline=None)
@given(a=RULES, b=RULES, c=RULES)
def test_the_algebra_is_sets(a: Mask, b: Mask, c: Mask) -> None:
    x, y, z = (bound(rule).dense() for rule in (a, b, c))
    assert torch.equal(bound(a & b).dense(), x & y)
    assert torch.equal(bound(a | b).dense(), x | y)
    assert torch.equal(bound((a & b) | c).dense(), (x & y) | z)
    assert torch.equal(bound((a | b) & c).dense(), (x | y) & z)


@settings(max_examples=60, deadline=None)
@given(a=RULES, b=RULES, ring=st.sampled_from([None, 4]))
def test_the_newest_query_needs_only_the_rest_of_the_rule(a: Mask, b: Mask, ring: int | None) -> None:
    """for_newest over what a state holds (all of the past, or a ring of it) equals the rule's last row."""
    rule = Causal() & a & b
    if ring is not None and (rule.span() or T) > ring:
        return
    kept = slice(0, T) if ring is None else slice(T - ring, T)
    last = bound(rule).dense()[0, 0, -1:]
    assert torch.equal(bound(rule.for_newest(ring)).dense()[0, 0, -1:, kept], last[:, kept])
    assert not last[:, : kept.start].any()


def test_rings_hold_what_the_window_sees_and_no_more() -> None:
    """A window's state has as many slots as the window, and equals the full forward however it is fed."""
    mixer = {"kind": "attention", "heads": 2, "mask": {"kind": "window", "size": 5}}
    model = dt.build({"kind": "decoder", "vocab": 9, "dim": 16, "depth": 2, "init": {"kind": "normal", "std": 0.3},
                      "blocks": {"mixer": mixer}}, dtype=torch.float64)  # fmt: skip
    x = torch.randint(0, 9, (2, 30))
    full = model(x).logits
    for chunks in ([30], [1] * 30, [7, 1, 1, 12, 9], [4, 2, 5, 6, 13], [29, 1]):
        state = model.new_state(2, 30)
        assert state.layers[0]["mixer"].k.shape[1] == 6  # five, and one that nobody reads
        with torch.no_grad():
            out = torch.cat([model(part, state=state).logits for part in x.split(chunks, 1)], 1)
        assert torch.allclose(out, full, atol=1e-12), chunks


def test_documents_restart_order_and_positions() -> None:
    segments = torch.tensor([[-1, -1, 0, 0, 0, 1, 1, -1], [3, 3, -1, 3, 4, 4, -1, 4], [-1] * 8])
    ctx = Context.of(3, 8, segments.device, segments=segments)
    expected = torch.tensor([[0, 0, 0, 1, 2, 0, 1, 0], [0, 1, 0, 2, 0, 1, 0, 2], [0] * 8])
    assert torch.equal(ctx.order, expected) and torch.equal(ctx.positions[..., 0], expected)
    mask = torch.tensor([[0, 1, 1, 0, 1, 0]])
    ctx = Context.of(1, 6, mask.device, attention_mask=mask)
    assert ctx.positions[mask.bool()][:, 0].tolist() == [0, 1, 2]  # padding inside a row does not count either
