"""From pixels to tokens on a grid, and from a grid to a coarser one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.errors import DataError
from dovetail.parts.context import Context
from dovetail.parts.norm import LayerNorm
from dovetail.parts.weights import Linear
from dovetail.spec import Slot, Spec, register
from dovetail.spec.categories import NormPart
from dovetail.spec.ranges import Count


@register(
    "image_embedding",
    "patch",
    default=True,
    oracle="transformers swin SwinPatchEmbeddings",
    source="Dosovitskiy et al. 2020 (ViT), eq. 1",
)
class PatchEmbedding(Spec):
    """A linear map of each size x size patch. Images are padded with zeros to whole patches. norm: of the tokens."""

    size: Count
    channels: Count = 3
    bias: bool = True
    norm: NormPart | None = None

    def build(self, slot: Slot) -> nn.Module:
        return PatchEmbeddingModule(self, slot)


class PatchEmbeddingModule(nn.Module):
    def __init__(self, spec: PatchEmbedding, slot: Slot):
        super().__init__()
        self.size, self.channels, self.path = spec.size, spec.channels, slot.path
        self.linear = Linear(spec.channels * spec.size**2, slot.dim, slot=slot, bias=spec.bias)
        self.norm = None if spec.norm is None else slot.build(spec.norm, "norm")

    def forward(self, images: Tensor) -> tuple[Tensor, Context]:
        """(B,channels,H,W) -> tokens (B,N,C) row by row, and the context of their grid."""
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise DataError(
                f"images have shape {tuple(images.shape)}",
                where=self.path,
                remedy=f"give (batch, {self.channels}, height, width)",
            )
        s = self.size
        images = F.pad(images, (0, -images.shape[3] % s, 0, -images.shape[2] % s))
        patches = images.unflatten(3, (-1, s)).unflatten(2, (-1, s))  # (B, channels, h, s, w, s)
        height, width = patches.shape[2], patches.shape[4]
        x = self.linear(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        x = x if self.norm is None else self.norm(x)
        return x, Context.on_grid(height, width, images.device)


@register(
    "resample",
    "merge",
    default=True,
    oracle="transformers swin SwinPatchMerging",
    source="Liu et al. 2021 (Swin), section 3.1",
)
class PatchMerge(Spec):
    """Four neighbours become one token of `factor` times the width: concatenate, norm, linear without bias.

    The neighbours come in the order (0,0), (1,0), (0,1), (1,1) of (row, column); an odd grid is padded with zeros.
    """

    factor: Count = 2
    norm: NormPart = LayerNorm()

    def build(self, slot: Slot) -> nn.Module:
        return PatchMergeModule(self, slot)

    def width(self, dim: int) -> int:
        """The width after merging tokens of width `dim`."""
        return self.factor * dim


class PatchMergeModule(nn.Module):
    def __init__(self, spec: PatchMerge, slot: Slot):
        super().__init__()
        self.path = slot.path
        self.norm = slot.build(spec.norm, "norm", dim=4 * slot.dim)
        self.linear = Linear(4 * slot.dim, slot.width_out, slot=slot)

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        """(B,N,C) on `ctx.grid` -> (B,N',C') and the context of the halved grid."""
        height, width = ctx.needs_grid(self.path)
        x = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, width % 2, 0, height % 2))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        coarse = Context.on_grid(x.shape[1], x.shape[2], x.device)
        return self.linear(self.norm(x.flatten(1, 2))), coarse
