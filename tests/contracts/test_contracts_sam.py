"""SAM's vision block: windows padded before the projection, decomposed positions on the unscaled query."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionLayer

from contracts.skeleton import SINGLE, build, match, randomise
from contracts.skeleton import keys as renames
from dovetail.models.keymap import Rename, Rule
from dovetail.parts.context import Context
from oracles import oracle_for

DIM, HEADS, HIDDEN, GRID, WINDOW = 16, 2, 24, 7, 3
BOTH = ("weight", "bias")


def spec() -> dict[str, Any]:
    """A windowed layer, then one over the whole grid."""
    inner = {"kind": "attention", "heads": HEADS, "bias": "all", "position": "axial"}
    whole = inner | {"position": {"kind": "axial", "height": GRID, "width": GRID}}

    def block(layers: str, mixer: Any) -> dict[str, Any]:
        feedforward = {"kind": "mlp", "hidden": HIDDEN, "activation": "gelu"}
        norm = {"kind": "layer", "eps": 1e-6}
        return {"layers": layers, "kind": "pre", "norm": norm, "mixer": mixer, "feedforward": feedforward}

    windowed = {"kind": "window", "size": WINDOW, "mixer": inner}
    return {"kind": "stack", "depth": 2, "norm": None, "blocks": [block("0", windowed), block("1", whole)]}


class Oracle(nn.Module):
    def __init__(self, implementation: str) -> None:
        super().__init__()
        config = SamVisionConfig(
            hidden_size=DIM, num_attention_heads=HEADS, mlp_dim=HIDDEN, image_size=GRID * 2, patch_size=2,
            num_hidden_layers=2, window_size=WINDOW, use_rel_pos=True, attention_dropout=0.0,
        )  # fmt: skip
        config._attn_implementation = implementation
        self.layers = nn.ModuleList([SamVisionLayer(config, WINDOW), SamVisionLayer(config, 0)])

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (GRID, GRID))
        for layer in self.layers:
            x = layer(x)
        return x.flatten(1, 2)


def rules() -> list[Rule]:
    found: list[Rule] = []
    for i in range(2):
        theirs, ours = f"layers.{i}", f"blocks.{i}"
        mixer = f"{ours}.mixer.mixer" if i == 0 else f"{ours}.mixer"
        found += renames(
            (f"{theirs}.layer_norm1", f"{ours}.norm_mixer"),
            (f"{theirs}.layer_norm2", f"{ours}.norm_feedforward"),
            (f"{theirs}.attn.qkv", f"{mixer}.qkv"),
            (f"{theirs}.attn.proj", f"{mixer}.out"),
            (f"{theirs}.mlp.lin1", f"{ours}.feedforward.up"),
            (f"{theirs}.mlp.lin2", f"{ours}.feedforward.down"),
            kinds=BOTH,
        )
        found.append(Rename(f"{theirs}.attn.rel_pos_h", f"{mixer}.position.rows.weight"))
        found.append(Rename(f"{theirs}.attn.rel_pos_w", f"{mixer}.position.columns.weight"))
    return found


@oracle_for("position", "axial")
@oracle_for("mixer", "window")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_outputs_and_gradients(implementation: str) -> None:
    """A grid of 7 in windows of 3: the last row and column of windows hold padding, which is seen."""
    ours, theirs = build("container", spec(), dim=DIM, causal=False), randomise(Oracle(implementation))
    ctx = Context.on_grid(GRID, GRID, torch.device("cpu"))
    match(ours, theirs, rules(), lambda x: ours(x, ctx), theirs, [torch.randn(2, GRID**2, DIM).double()], tol=SINGLE)
