"""NF4: four bits a weight, at the quantiles of a normal distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from dovetail.kernels import quantise
from dovetail.parts.storage.base import Storage, Stored
from dovetail.spec import register
from dovetail.spec.ranges import Count


@register(
    "storage",
    "nf4",
    oracle="bitsandbytes quantize_4bit, dequantize_4bit",
    source="Dettmers et al. 2023 (QLoRA), section 3, eq. 4 and appendix E",
)
class Nf4(Storage):
    """Blocks of `block` weights, each divided by its absolute maximum and rounded to one of 16 quantiles of N(0, 1).

    double: the maxima, less their mean, are themselves kept in 8 bits (dynamic tree values, Dettmers et al. 2022,
    section 1.3), in blocks of `double_block` with an fp32 constant each: 4.127 bits a weight instead of 4.5.
    The layout is bitsandbytes': rows one after the other, two codes to a byte, the first in the high half.
    """

    block: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    double: bool = True
    double_block: Count = 256

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Stored:
        return StoredNf4(self, shape, dtype, device)


class StoredNf4(Stored):
    """codes (N/2,) uint8, N the number of weights filled up to whole blocks; levels (16,) fp32.

    Plain: absmax (M,) fp32, M = N/block. Double: absmax (M,) uint8, absmax_scale fp32, one for double_block maxima,
    absmax_mean () fp32, absmax_levels (256,) fp32.
    """

    storage: Nf4
    codes: Tensor
    levels: Tensor
    absmax: Tensor
    absmax_scale: Tensor
    absmax_mean: Tensor
    absmax_levels: Tensor

    def __init__(self, spec: Nf4, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None):
        super().__init__(spec, shape, dtype)
        blocks = -(-self.shape.numel() // spec.block)
        self.register_buffer("codes", torch.empty(blocks * spec.block // 2, dtype=torch.uint8, device=device))
        self.register_buffer("levels", torch.tensor(quantise.NF4, dtype=torch.float32, device=device))
        kept = torch.uint8 if spec.double else torch.float32
        self.register_buffer("absmax", torch.empty(blocks, dtype=kept, device=device))
        if spec.double:
            scales = -(-blocks // spec.double_block)
            self.register_buffer("absmax_scale", torch.empty(scales, dtype=torch.float32, device=device))
            self.register_buffer("absmax_mean", torch.empty((), dtype=torch.float32, device=device))
            self.register_buffer("absmax_levels", torch.tensor(quantise.DYNAMIC, dtype=torch.float32, device=device))

    def fill(self, weight: Tensor) -> Tensor:
        codes, absmax = quantise.quantise_levels(weight.reshape(-1), self.levels, self.storage.block)
        self.codes = quantise.pack(codes)
        if not self.storage.double:
            self.absmax = absmax
            return absmax
        self.absmax_mean = absmax.mean()
        codes, self.absmax_scale = quantise.quantise_levels(
            absmax - self.absmax_mean, self.absmax_levels, self.storage.double_block
        )
        self.absmax = codes[: len(absmax)].clone()
        return absmax

    def constants(self) -> Tensor:
        """The absolute maximum of every block, (M,) fp32, as `dense` uses it."""
        if not self.storage.double:
            return self.absmax
        block = self.storage.double_block
        codes = F.pad(self.absmax, (0, -len(self.absmax) % block))
        found = quantise.dequantise_levels(codes, self.absmax_scale, self.absmax_levels, block)
        return found[: len(self.absmax)] + self.absmax_mean

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        flat = quantise.dequantise_packed(
            self.codes, self.constants(), self.levels, self.storage.block, dtype or self.dtype
        )
        return flat[: self.shape.numel()].view(self.shape)

    @property
    def group(self) -> int | None:
        return self.storage.block if self.shape[-1] % self.storage.block == 0 else None

    def rows(self) -> quantise.Rows:
        codes, constants = self.codes.view(self.shape[0], -1), self.constants().view(self.shape[0], -1)
        return quantise.Rows(codes, constants, self.storage.block, levels=self.levels)
