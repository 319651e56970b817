"""FlexAttention's block masks: as torch makes them, without all pairs at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from dovetail.kernels.attention import BoundMask, Coords, Side, flex
from dovetail.parts.mask import Causal, Dilated, Document, Globals, Mask, Window, interned

NAMES = ("kv", "full_kv", "q", "full_q")


def tiles(block: Any, name: str) -> list[Any]:
    """The tiles of each row, as sets: only the first `num` of the listed are meant."""
    count, index = getattr(block, f"{name}_num_blocks"), getattr(block, f"{name}_indices")
    return [set(row[:n].tolist()) for row, n in zip(index.flatten(0, 2), count.flatten(), strict=True)]


def same(mask: BoundMask, T: int, S: int, rows: int | None) -> None:
    ours, theirs = flex.blocks(mask), create_block_mask(mask.mod(), rows, None, T, S, device="cpu")
    assert ours.seq_lengths == theirs.seq_lengths == (T, S) and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in NAMES:
        assert tiles(ours, name) == tiles(theirs, name)
    i = torch.randint(T, (500,)), torch.randint(S, (500,))
    b = torch.randint(rows or 1, (500,))
    assert torch.equal(ours.mask_mod(b, b * 0, *i), theirs.mask_mod(b, b * 0, *i))


@pytest.mark.parametrize("T", [512, 700])
@pytest.mark.parametrize(
    "rule",
    [
        Causal() & Window(size=200),
        Causal() & Window(size=300) & Dilated(step=2),
        Causal() & (Window(size=130) | Globals(length=5)),
    ],
)
def test_aligned_masks_are_torchs_and_kept(rule: Mask, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_PAIRS", 256 * T)  # several bands
    side = Side(torch.arange(T)[None])
    rule = interned(rule)
    same(BoundMask(rule, Coords(side, side, True)), T, T, None)
    again = Side(torch.arange(T)[None])
    assert flex.blocks(BoundMask(rule, Coords(side, side, True))) is flex.blocks(
        BoundMask(rule, Coords(again, again, True))
    )


def test_what_is_kept_serves_training_too() -> None:
    rule, side = Causal() & Window(size=77), Side(torch.arange(256)[None])
    with torch.inference_mode():
        block = flex.blocks(BoundMask(rule, Coords(side, side, True)))
    assert not block.kv_indices.is_inference() and not block.q_indices.is_inference()


def test_documents_and_more_keys_than_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_PAIRS", 256 * 600)
    segments = torch.stack([torch.arange(600) // 250, torch.arange(600) // 90])
    segments[1, 500:] = -1
    order = torch.arange(600).expand(2, -1)
    side = Side(order, segments)
    same(BoundMask(Causal() & Document() & Window(size=150), Coords(side, side)), 600, 600, 2)
    later = Side(torch.arange(300, 600)[None])
    same(BoundMask(Causal() & Window(size=150), Coords(later, Side(torch.arange(600)[None]))), 300, 600, None)
