"""ReRoPE: two regions that differ in how queries and keys are turned, merged into one softmax, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contracts.skeleton import SINGLE, build, close, match
from contracts.skeleton import keys as renames
from dovetail.errors import BuildError
from dovetail.parts.context import Context
from oracles import oracle_for

DIM, HEADS, GROUPS, WIDTH, THETA = 16, 4, 2, 4, 30.0


def spec(window: int, **fields: Any) -> dict[str, Any]:
    position = {"kind": "rerope", "window": window, "theta": THETA}
    return {"kind": "attention", "heads": HEADS, "kv_heads": GROUPS, "position": position} | fields


class Dense(nn.Module):
    """softmax over Re(q · conj(k) · exp(i θ min(i - j, window))), every pair by the formula, in fp64."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.qkv = nn.Linear(DIM, (HEADS + 2 * GROUPS) * WIDTH, bias=False, dtype=torch.float64)
        self.out = nn.Linear(HEADS * WIDTH, DIM, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        q, k, v = self.qkv(x).split([HEADS * WIDTH, GROUPS * WIDTH, GROUPS * WIDTH], -1)
        q, k, v = (t.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (k, v))
        qc, kc = (torch.complex(*t.chunk(2, -1)) for t in (q, k))
        theta = THETA ** -(torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
        back = torch.arange(T)[:, None] - torch.arange(T)
        turn = torch.exp(1j * theta * back.clamp_max(self.window)[..., None])
        scores = torch.einsum("bhif,bhjf,ijf->bhij", qc, kc.conj(), turn).real / WIDTH**0.5
        scores = scores.masked_fill(back < 0, float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


@oracle_for("position", "rerope")
@oracle_for("mask", "beyond")
@pytest.mark.parametrize("window", [1, 5, 40])
def test_outputs_and_gradients(window: int) -> None:
    """A window of one (almost all far), of five, and one that holds everything (plain RoPE)."""
    ours, theirs = build("mixer", spec(window), dim=DIM), Dense(window)
    x, ctx = torch.randn(2, 23, DIM, dtype=torch.float64), Context.of(2, 23, torch.device("cpu"))
    both = renames(("qkv", "qkv"), ("out", "out"))
    match(ours, theirs, both, lambda x: ours(x, ctx), theirs, [x], tol=SINGLE)


def test_a_wide_window_is_rope() -> None:
    x, ctx = torch.randn(2, 23, DIM, dtype=torch.float64), Context.of(2, 23, torch.device("cpu"))
    ours, rope = (
        build("mixer", spec(23), dim=DIM),
        build("mixer", spec(0, position={"kind": "rope", "theta": THETA}), dim=DIM),
    )
    close(ours(x, ctx), rope(x, ctx), 1e-12, "rope")


def model(**fields: Any) -> Any:
    block = {"mixer": spec(4, **fields), "feedforward": {"kind": "glu", "hidden": 20}}
    init = {"kind": "normal", "std": 0.2}
    return build(
        "model", {"kind": "decoder", "vocab": 17, "dim": DIM, "depth": 2, "blocks": block, "init": init}, dim=0
    )


@pytest.mark.parametrize("fields", [{}, {"mask": {"kind": "window", "size": 6}}], ids=["plain", "window"])
def test_keys_are_cached_raw_and_decoding_equals_the_whole_forward(fields: dict[str, Any]) -> None:
    ours = model(**fields)
    tokens = torch.randint(17, (2, 15))
    with torch.no_grad():
        whole, state = ours(tokens).logits, ours.new_state(2, 16)
        parts = [ours(tokens[:, :5], state=state).logits, ours(tokens[:, 5:8], state=state).logits]
        parts += [ours(tokens[:, i : i + 1], state=state).logits for i in range(8, 15)]
    close(torch.cat(parts, 1), whole, 1e-12, "decoding")


def test_stored_keys_do_not_depend_on_where_they_stand() -> None:
    ours = model()
    token = torch.full((1, 9), 3)
    with torch.no_grad():
        state = ours.new_state(1, 9)
        ours(token, state=state)
    keys = state.layers[0]["mixer"].k[0, :9]
    close(keys, keys[:1].expand_as(keys), 1e-12, "raw keys")


def test_packing_and_padding_change_nothing() -> None:
    ours = model()
    tokens = torch.randint(17, (1, 15))
    segments = torch.tensor([[0] * 6 + [1] * 9])
    packed = ours(tokens, segments=segments).logits
    close(packed[:, :6], ours(tokens[:, :6]).logits, 1e-12, "first document")
    close(packed[:, 6:], ours(tokens[:, 6:]).logits, 1e-12, "second document")
    real = torch.tensor([[0] * 6 + [1] * 9])
    close(ours(tokens, attention_mask=real).logits[:, 6:], ours(tokens[:, 6:]).logits, 1e-12, "left padding")


def test_refusals() -> None:
    with pytest.raises(BuildError, match="causal attention"):
        build("mixer", spec(4), dim=DIM, causal=False)
    with pytest.raises(BuildError, match="window of 0"):
        build("mixer", spec(0), dim=DIM)
