"""Windows: a wrapper around a mixer that runs it inside square pieces of the grid."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.errors import BuildError, DataError
from dovetail.parts.attention.softmax import Attention
from dovetail.parts.context import Context, refuse_memory
from dovetail.parts.position.base import refuse_text
from dovetail.parts.position.relative import RelativeBias2d
from dovetail.spec import Slot, Spec, register
from dovetail.spec.categories import MixerPart
from dovetail.spec.ranges import Count, Natural


@register(
    "mixer",
    "window",
    oracle="transformers swin, sam",
    source="Liu et al. 2021 (Swin), section 3.2; Li et al. 2022 (ViTDet), section 3",
    bidirectional=True,
    causal=False,
    grid=True,
)
class WindowMixer(Spec):
    """Another mixer run inside windows of size x size tokens of the grid.

    shift: rows and columns by which the grid is rolled first; what was not adjacent before is kept apart by
    segments. The grid is padded with zeros to whole windows, before the mixer's projections and seen by them.
    small: what happens on a grid whose shorter side is at most `size`: "pad" it like any other (SAM), or "shrink"
    the window to that side, without a shift (Swin).
    """

    size: Count
    shift: Natural = 0
    small: Literal["pad", "shrink"] = "pad"
    mixer: MixerPart = Attention(position=RelativeBias2d())

    def build(self, slot: Slot) -> nn.Module:
        if not 0 <= self.shift < self.size:
            raise BuildError(
                f"a window of {self.size} shifted by {self.shift}",
                where=slot.path,
                remedy="shift by less than the size",
            )
        if slot.causal:
            raise BuildError(
                "a window mixer in a causal place: windows of a grid have no past",
                where=slot.path,
                remedy="use it in an encoder; for text, give an attention the mask {kind: window, size: ...}",
            )
        refuse_text(slot, "a window mixer")
        if slot.memory_dim is not None:
            raise BuildError("a window mixer does not read an encoder", where=slot.path, remedy="use attention")
        return WindowModule(self, slot)


class WindowModule(nn.Module):
    def __init__(self, spec: WindowMixer, slot: Slot):
        super().__init__()
        self.size, self.shift, self.shrinks, self.path = spec.size, spec.shift, spec.small == "shrink", slot.path
        self.mixer = slot.build(spec.mixer, "mixer", grid=(spec.size, spec.size), on_grid=True)

    def forward(
        self, x: Tensor, ctx: Context, state: Any = None, *, keys: Tensor | None = None, values: Tensor | None = None
    ) -> Tensor:
        """(B,N,C) -> (B,N,C'), N = height · width of `ctx.grid`."""
        refuse_memory(keys, values, self.path)
        if ctx.segments is not None:
            raise DataError("windows over padded or packed images", where=self.path, remedy="give images of one size")
        height, width = ctx.needs_grid(self.path)
        size, shift = self.size, self.shift
        if self.shrinks and min(height, width) <= size:
            size, shift = min(height, width), 0
        x = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, -width % size, 0, -height % size))
        x = x.roll((-shift, -shift), (1, 2)) if shift else x
        B, H, W, _ = x.shape
        inner = ctx.once(("window", size, shift, B, H, W), lambda: _inner(size, shift, B, H, W, x.device))
        y = _whole(self.mixer(_windows(x, size), inner), B, H, W, size)
        y = y.roll((shift, shift), (1, 2)) if shift else y
        return y[:, :height, :width].flatten(1, 2)


def _windows(x: Tensor, size: int) -> Tensor:
    """(B,H,W,C) -> (B·windows, size², C), windows row by row."""
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)  # (B, H/s, W/s, s, s, C)
    return x.flatten(3, 4).flatten(0, 2)


def _whole(x: Tensor, B: int, H: int, W: int, size: int) -> Tensor:
    """(B·windows, size², C) -> (B,H,W,C)."""
    x = x.unflatten(1, (size, size)).unflatten(0, (B, H // size, W // size))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _inner(size: int, shift: int, B: int, H: int, W: int, device: torch.device) -> Context:
    """The context inside the windows; after a shift, segments keep apart what the roll brought together."""
    if not shift:
        return Context.on_grid(size, size, device)

    def region(length: int) -> Tensor:
        at = torch.arange(length, device=device)
        return (at >= length - size).long() + (at >= length - shift).long()

    regions = region(H)[:, None] * 3 + region(W)
    segments = _windows(regions[None, :, :, None], size)[..., 0].repeat(B, 1)
    return Context.on_grid(size, size, device, segments)
