"""Masks against their formulas written as loops, the algebra, and the rings that windows keep while decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

import dovetail as dt
from dovetail.kernels.attention import BoundMask, Coords, Side
from dovetail.parts.context import Context
from dovetail.parts.mask import (
    And,
    Band,
    Causal,
    Dilated,
    Document,
    Fixed,
    Full,
    Globals,
    Mask,
    Or,
    Padding,
    Prefix,
    Strided,
    Window,
)  # fmt: skip
from dovetail.parts.random_blocks import RandomBlocks
from oracles import oracle_for
from parts.making import make

T = 11
SEGMENTS = [0, 0, 0, 1, 1, 1, 1, 2, -1, -1, -1]


def drawn(block: int, count: int, seed: int, among: int) -> set[int]:
    """Floyd's sample of `count` of `among` blocks, by the mask's generator in plain integers."""
    chosen: set[int] = set()
    for r in range(count):
        x = (block * 40503 + r * 69069 + seed * 1664525 + 12345) % 2**31
        for factor in (1103515245, 134775813, 22695477):
            x = (x * factor + 12345) % 2**31
            x ^= x >> 16
        last = among - count + r
        if last >= 0:
            chosen.add(last if x % (last + 1) in chosen else x % (last + 1))
    return chosen


FORMULAS: list[tuple[Mask, Callable[[int, int], bool]]] = [
    (Full(), lambda i, j: True),
    (Causal(), lambda i, j: j <= i),
    (Window(size=4), lambda i, j: 0 <= i - j < 4),
    (Band(before=3, after=1), lambda i, j: -1 <= i - j <= 3),
    (Prefix(length=3), lambda i, j: j < 3),
    (Dilated(step=3), lambda i, j: (i - j) % 3 == 0),
    (Strided(stride=3), lambda i, j: 0 <= i - j < 3 or (i - j) % 3 == 0),
    (Fixed(stride=4, summary=2), lambda i, j: i // 4 == j // 4 or j % 4 in (2, 3)),
    (Globals(length=2), lambda i, j: i < 2 or j < 2),
    (RandomBlocks(size=2, count=2, seed=5), lambda i, j: j // 2 in drawn(i // 2, 2, 5, i // 2)),
    (RandomBlocks(size=2, count=3, among=6), lambda i, j: j // 2 in drawn(i // 2, 3, 0, 6)),
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
    "mask", "full", "causal", "window", "band", "prefix", "dilated", "strided", "document", "padding", "and", "or",
    "fixed", "random_blocks",
)  # fmt: skip
@pytest.mark.parametrize(("rule", "formula"), FORMULAS, ids=[f"{r.kind}-{n}" for n, (r, _) in enumerate(FORMULAS)])
def test_masks_are_their_formulas(rule: Mask, formula: Callable[[int, int], bool]) -> None:
    expected = torch.tensor([[formula(i, j) for j in range(T)] for i in range(T)])
    assert torch.equal(bound(rule).dense()[0, 0], expected)
    assert not rule.is_full() or expected.all()
    assert not rule.is_causal() or torch.equal(expected, torch.ones(T, T).tril() > 0)
    kept = (rule & Causal()).kept()
    if kept is not None:
        assert not any(expected[i, j] for i in range(T) for j in range(kept.first, i - kept.last + 1))


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
@given(a=RULES, b=RULES, apart=st.booleans(), all_kept=st.booleans())
@example(a=Prefix(length=3), b=Globals(length=2), apart=True, all_kept=False)
def test_the_newest_query_needs_only_the_rest_of_the_rule(a: Mask, b: Mask, apart: bool, all_kept: bool) -> None:
    """for_newest over what a state holds (all of the past, or what the rule says) equals the rule's last row."""
    rule = Causal() & (a | b if apart else a & b)
    kept = None if all_kept else rule.kept()
    there = torch.ones(T, dtype=torch.bool)
    if kept is not None:
        there[kept.first : max(kept.first, T - kept.last)] = False
    last = bound(rule).dense()[0, 0, -1]
    assert torch.equal(bound(rule.for_newest(kept)).dense()[0, 0, -1, there], last[there])
    assert not last[~there].any()


SINKS = {"kind": "or", "rules": [{"kind": "window", "size": 5}, {"kind": "prefix", "length": 3}]}


@pytest.mark.parametrize(
    ("given", "slots"),
    [
        ({"mask": {"kind": "window", "size": 5}}, 5),
        ({"mask": SINKS}, 8),
        ({"position": {"kind": "streaming_llm", "window": 5, "sinks": 3}}, 8),
        (
            {
                "position": {
                    "kind": "logn",
                    "trained": 9,
                    "position": {"kind": "streaming_llm", "window": 5, "sinks": 3},
                }
            },
            8,
        ),
        ({"position": {"kind": "streaming_llm", "window": 5, "sinks": 3}, "mask": {"kind": "window", "size": 4}}, 7),
    ],
)
def test_rings_hold_what_the_window_sees_and_no_more(given: dict[str, Any], slots: int) -> None:
    """A window's state has as many slots as the window (and the sinks), and equals the full forward however it is fed."""
    mixer = {"kind": "attention", "heads": 2, **given}
    model = dt.build({"kind": "decoder", "vocab": 9, "dim": 16, "depth": 2, "init": {"kind": "normal", "std": 0.3},
                      "blocks": {"mixer": mixer}}, dtype=torch.float64)  # fmt: skip
    x = torch.randint(0, 9, (2, 30))
    full = model(x).logits
    for chunks in ([30], [1] * 30, [7, 1, 1, 12, 9], [4, 2, 5, 6, 13], [29, 1]):
        state = model.new_state(2, 30)
        assert state.layers[0]["mixer"].k.shape[1] == slots + 1  # one that nobody reads
        with torch.no_grad():
            out = torch.cat([model(part, state=state).logits for part in x.split(chunks, 1)], 1)
        assert torch.allclose(out, full, atol=1e-12), chunks
    state = model.new_state(2, 30)
    ragged = torch.ones(2, 13)
    ragged[0, :4] = 0  # the first row begins later, and stays behind
    with torch.no_grad():
        model(x[:, :13], attention_mask=ragged, state=state)
        out = torch.cat([model(part, state=state).logits for part in x[:, 13:].split([1, 6, 1, 9], 1)], 1)
    assert torch.allclose(out[1], full[1, 13:], atol=1e-12)
    assert torch.allclose(out[0], model(x[:1, 4:]).logits[0, 9:], atol=1e-12)


def test_random_blocks_are_uniform_and_their_own_by_seed() -> None:
    """Over many seeds every candidate is drawn equally often (chi² of 9 degrees), `count` different ones each time."""
    at = Coords(Side(torch.tensor([[73]])), Side(torch.arange(10)[None] * 4))
    seen = torch.stack([RandomBlocks(size=4, count=3, seed=s, among=10).allowed(at.q.rows(), at.k.columns())[0, 0]
                        for s in range(2000)])  # fmt: skip
    assert (seen.sum(1) == 3).all()
    counts = seen.sum(0).double()
    assert ((counts - 600).square() / (600 * 0.7)).sum() * 0.9 < 27.9  # 0.1% of true draws lie beyond
    row = bound(RandomBlocks(size=1, count=3, seed=1)).dense()[0, 0]
    assert row.sum(1).tolist() == [0, 1, 2] + [3] * 8 and not row.triu().any()  # of those before, whatever comes after
    assert not torch.equal(row, bound(RandomBlocks(size=1, count=3, seed=2)).dense()[0, 0])


@oracle_for("mask", "globals")
@pytest.mark.parametrize("wanted", [1, 3])
def test_longformer_is_a_band_and_globals(wanted: int) -> None:
    """Longformer's own attention, its second set of projections set to the first; outputs and gradients."""
    config = LongformerConfig(hidden_size=12, num_attention_heads=2, attention_window=[4],
                              attention_probs_dropout_prob=0.0)  # fmt: skip
    theirs = LongformerSelfAttention(config, 0).double()
    for name in ("query", "key", "value"):
        getattr(theirs, f"{name}_global").load_state_dict(getattr(theirs, name).state_dict())
    mask = {"kind": "or", "rules": [{"kind": "band", "before": 2, "after": 2}, {"kind": "globals", "length": wanted}]}
    spec = {"kind": "attention", "heads": 2, "bias": "qkv", "mask": mask, "position": "none"}
    ours = make("mixer", spec, dim=12, causal=False, dtype=torch.float64)
    for kind in ("weight", "bias"):
        joined = torch.cat([getattr(getattr(theirs, n), kind) for n in ("query", "key", "value")])
        getattr(ours.qkv, kind).data.copy_(joined)
    torch.nn.init.eye_(ours.out.weight)
    x = torch.randn(2, 16, 12, dtype=torch.float64, requires_grad=True)
    place = torch.zeros(2, 16)
    place[:, :wanted] = 10000.0
    expected = theirs(x.clone(), place, place < 0, place > 0, True)[0]
    found = ours(x, Context.of(2, 16, x.device))
    weight = torch.randn_like(found)
    for a, b in zip(*[(y, *torch.autograd.grad((y * weight).sum(), x)) for y in (found, expected)], strict=True):
        assert torch.allclose(a, b, atol=2e-6)  # their softmax is fp32


def test_documents_restart_order_and_positions() -> None:
    segments = torch.tensor([[-1, -1, 0, 0, 0, 1, 1, -1], [3, 3, -1, 3, 4, 4, -1, 4], [-1] * 8])
    ctx = Context.of(3, 8, segments.device, segments=segments)
    expected = torch.tensor([[0, 0, 0, 1, 2, 0, 1, 0], [0, 1, 0, 2, 0, 1, 0, 2], [0] * 8])
    assert torch.equal(ctx.order, expected) and torch.equal(ctx.positions[..., 0], expected)
    mask = torch.tensor([[0, 1, 1, 0, 1, 0]])
    ctx = Context.of(1, 6, mask.device, attention_mask=mask)
    assert ctx.positions[mask.bool()][:, 0].tolist() == [0, 1, 2]  # padding inside a row does not count either
