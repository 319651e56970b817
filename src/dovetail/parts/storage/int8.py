"""int8: eight bits a weight, evenly spaced."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dovetail.kernels import quantise
from dovetail.parts.storage.base import Storage, Stored
from dovetail.spec import register
from dovetail.spec.ranges import Count


@register(
    "storage",
    "int8",
    oracle="bitsandbytes int8_vectorwise_quant, int8_vectorwise_dequant",
    source="Dettmers et al. 2022 (LLM.int8()), section 3.1; Dettmers et al. 2023, eq. 1 and 2",
)
class Int8(Storage):
    """round(127 · w / absmax), absmax over each block of `block` weights, or over each row (None).

    The weights of LLM.int8(); its split of the activations' outliers has no place in a storage, since the product is
    taken in the input's own type.
    """

    block: Count | None = None

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Stored:
        return StoredInt8(self, shape, dtype, device)


class StoredInt8(Stored):
    """codes (M, block) int8, which is (out, in) where a block is a row; absmax (M,) fp32. The last block is filled up."""

    storage: Int8
    codes: Tensor
    absmax: Tensor

    def __init__(self, spec: Int8, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None):
        super().__init__(spec, shape, dtype)
        self.block = spec.block or self.shape[-1]
        blocks = -(-self.shape.numel() // self.block)
        self.register_buffer("codes", torch.empty(blocks, self.block, dtype=torch.int8, device=device))
        self.register_buffer("absmax", torch.empty(blocks, dtype=torch.float32, device=device))

    def fill(self, weight: Tensor) -> Tensor:
        codes, self.absmax = quantise.quantise_int8(weight.reshape(-1), self.block)
        self.codes = codes.view(-1, self.block)
        return self.absmax

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        flat = quantise.dequantise_int8(self.codes.flatten(), self.absmax, self.block, dtype or self.dtype)
        return flat[: self.shape.numel()].view(self.shape)

    @property
    def group(self) -> int | None:
        return self.block if self.shape[-1] % self.block == 0 else None

    def rows(self) -> quantise.Rows:
        out, width = self.shape
        return quantise.Rows(self.codes.view(out, width), self.absmax.view(out, -1), self.block, factor=1 / 127)
