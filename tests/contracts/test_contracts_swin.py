"""Swin: stages on coarser grids, windows with a shift, a table over two distances, patch merging."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import SwinConfig, SwinModel

from contracts.skeleton import TIGHT, build, close, joined, keys, match, randomise
from dovetail.errors import BuildError, DataError
from dovetail.models.keymap import Rename, Reshape, Rule
from dovetail.parts.context import Context
from dovetail.spec import Slot, Spec
from oracles import oracle_for

DIM, WINDOW, PATCH, DEPTHS, HEADS = 8, 3, 2, (2, 2), (2, 4)
BOTH = ("weight", "bias")


def spec(small: str = "shrink") -> dict[str, Any]:
    def stage(depth: int, heads: int, width: int) -> dict[str, Any]:
        def block(layers: str, shift: int) -> dict[str, Any]:
            inner = {"kind": "attention", "heads": heads, "bias": "all", "position": "relative_bias_2d"}
            mixer = {"kind": "window", "size": WINDOW, "shift": shift, "small": small, "mixer": inner}
            feedforward = {"kind": "mlp", "hidden": 2 * width, "activation": "gelu"}
            return {"layers": layers, "kind": "pre", "norm": "layer", "mixer": mixer, "feedforward": feedforward}

        return {"kind": "stack", "depth": depth, "norm": None, "blocks": [block("::2", 0), block("1::2", WINDOW // 2)]}

    stages = [stage(d, h, DIM * 2**i) for i, (d, h) in enumerate(zip(DEPTHS, HEADS, strict=True))]
    return {"kind": "stages", "stages": stages, "between": "merge"}


class Skeleton(nn.Module):
    """Patches, then the stages."""

    def __init__(self, small: str = "shrink") -> None:
        super().__init__()
        self.patches = build("image_embedding", {"kind": "patch", "size": PATCH, "norm": "layer"}, dim=DIM)
        self.encoder = build("container", spec(small), dim=DIM, causal=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(*self.patches(images))


def oracle(size: int) -> SwinModel:
    config = SwinConfig(
        image_size=size, patch_size=PATCH, num_channels=3, embed_dim=DIM, depths=list(DEPTHS), num_heads=list(HEADS),
        window_size=WINDOW, mlp_ratio=2.0, drop_path_rate=0.0, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, layer_norm_eps=1e-5,
    )  # fmt: skip
    return randomise(SwinModel(config, add_pooling_layer=False))  # type: ignore[return-value]


def rules(theirs: nn.Module) -> list[Rule]:
    named = dict(theirs.named_parameters())
    projection = "embeddings.patch_embeddings.projection"
    flat, stored = (DIM, 3 * PATCH**2), (DIM, 3, PATCH, PATCH)
    found: list[Rule] = [
        Reshape(f"{projection}.weight", "patches.linear.weight", stored_shape=stored, our_shape=flat),
        Rename(f"{projection}.bias", "patches.linear.bias"),
    ]
    found += keys(("embeddings.norm", "patches.norm"), ("layernorm", "encoder.norm"), kinds=BOTH)
    found += keys(("encoder.layers.0.downsample.norm", "encoder.between.0.norm"), kinds=BOTH)
    found += keys(("encoder.layers.0.downsample.reduction", "encoder.between.0.linear"))
    for s, depth in enumerate(DEPTHS):
        for i in range(depth):
            theirs_, ours = f"encoder.layers.{s}.blocks.{i}", f"encoder.stages.{s}.blocks.{i}"
            prefix = next(n for n in named if n.startswith(f"{theirs_}.attention") and "relative" in n)
            found.append(Rename(prefix, f"{ours}.mixer.mixer.position.table.weight"))
            maps = [
                n.removesuffix(".weight")
                for n in named
                if n.startswith(f"{theirs_}.attention") and n.endswith("weight")
            ]
            q, k, v, out = maps
            found += joined([q, k, v], f"{ours}.mixer.mixer.qkv", [DIM * 2**s] * 3, BOTH)
            up, down = (
                n.removesuffix(".weight") for n in named if n.startswith(f"{theirs_}.mlp") and n.endswith("weight")
            )
            found += keys(
                (out, f"{ours}.mixer.mixer.out"),
                (f"{theirs_}.layernorm_before", f"{ours}.norm_mixer"),
                (f"{theirs_}.layernorm_after", f"{ours}.norm_feedforward"),
                (up, f"{ours}.feedforward.up"),
                (down, f"{ours}.feedforward.down"),
                kinds=BOTH,
            )
    return found


@oracle_for("mixer", "window")
@oracle_for("position", "relative_bias_2d")
@oracle_for("container", "stages")
@oracle_for("resample", "merge")
@oracle_for("image_embedding", "patch")
@pytest.mark.parametrize("shape", [(24, 24), (27, 18), (29, 33)], ids=str)
def test_outputs_and_gradients(shape: tuple[int, int]) -> None:
    """Whole windows, then grids that are padded for patches, windows and merging; every second layer is shifted."""
    ours, theirs = Skeleton(), oracle(24)
    images = torch.randn(2, 3, *shape, dtype=torch.float64)
    match(
        ours, theirs, rules(theirs), ours, lambda x: theirs(x, interpolate_pos_encoding=True).last_hidden_state, [images], tol=TIGHT
    )  # fmt: skip


def test_features_of_every_stage() -> None:
    ours, theirs = Skeleton(), oracle(24)
    match(
        ours, theirs, rules(theirs), ours, lambda x: theirs(x).last_hidden_state, [torch.randn(1, 3, 24, 24).double()]
    )
    x = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    found = ours.encoder.features(*ours.patches(x))
    stem, width = theirs.embeddings(x)
    wanted = theirs.encoder(stem, width, output_hidden_states=True, output_hidden_states_before_downsampling=True)
    assert [at.grid for _, at in found] == [(12, 12), (6, 6)]
    for (mine, _), other in zip(found, wanted.reshaped_hidden_states[1:], strict=True):
        close(mine, other.flatten(2).transpose(1, 2), TIGHT, "stage")


def test_a_window_that_covers_the_grid_is_plain_attention() -> None:
    slot = {"dim": DIM, "causal": False}
    inner = {"kind": "attention", "heads": 2, "position": {"kind": "relative_bias_2d", "height": 3, "width": 3}}
    plain = build("mixer", inner, **slot)
    wrapped = build("mixer", {"kind": "window", "size": 3, "shift": 1, "small": "shrink", "mixer": inner}, **slot)
    wrapped.mixer.load_state_dict(plain.state_dict())
    x, ctx = torch.randn(2, 9, DIM, dtype=torch.float64), Context.on_grid(3, 3, torch.device("cpu"))
    close(wrapped(x, ctx), plain(x, ctx), 1e-12, "one window")


def test_refusals() -> None:
    window = Spec.parse("mixer", {"kind": "window", "size": 3})
    with pytest.raises(BuildError, match="causal place"):
        window.build(Slot(dim=DIM))
    with pytest.raises(BuildError, match="shifted by 3"):
        window.replace(shift=3).build(Slot(dim=DIM, causal=False))
    with pytest.raises(BuildError, match="size of its grid"):
        build("mixer", {"kind": "attention", "position": "relative_bias_2d"}, dim=DIM, causal=False)
    ours = Skeleton()
    with pytest.raises(DataError, match="images have shape"):
        ours(torch.zeros(2, 1, 8, 8))
    with pytest.raises(BuildError, match="without a grid"):
        ours.encoder(torch.zeros(1, 9, DIM).double(), Context.of(1, 9, torch.device("cpu")))


def test_a_grid_beyond_the_tables_is_refused() -> None:
    for position in ("relative_bias_2d", "axial"):
        inner = {"kind": "attention", "position": {"kind": position, "height": 3, "width": 3}}
        mixer = build("mixer", inner, dim=DIM, causal=False)
        with pytest.raises(DataError, match="a grid of 2 x 4 tokens, and position tables for 3 x 3"):
            mixer(torch.zeros(1, 8, DIM).double(), Context.on_grid(2, 4, torch.device("cpu")))
