"""int4: four bits a weight, evenly spaced, a scale and a zero for each group of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dovetail.kernels import quantise
from dovetail.parts.storage.base import Storage, Stored
from dovetail.spec import register


@register(
    "storage",
    "int4",
    oracle="torch's aten::_weight_int4pack_mm_for_cpu; the formula in fp64",
    source="Jacob et al. 2018, section 2.1, eq. 1; its grid by groups of a row: Frantar et al. 2023 (GPTQ)",
)
class Int4(Storage):
    """w = (code - zero) · scale, code = clamp(round(w/scale) + zero, 0, 15), in groups of `block` weights of a row.

    scale = (max − min)/15 and zero = round(−min/scale), min and max taken with 0: the asymmetric min-max grid that
    GPTQ and AWQ start from, here with every weight rounded to the nearest. Scales are bf16, zeros bytes:
    4 + 24/block bits a weight, 4.1875 at 128. A row that does not fill its last group is filled up with zeros, which
    are kept and counted too.
    """

    block: Annotated[int, Field(ge=2, multiple_of=2)] = 128

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Stored:
        return StoredInt4(self, shape, dtype, device)


class StoredInt4(Stored):
    """codes (out, G · block/2) uint8, two to a byte, the first in the high half; scale (out, G) bf16, zero (out, G) uint8;
    G = ceil(in/block)."""

    storage: Int4
    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, spec: Int4, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None):
        super().__init__(spec, shape, dtype)
        out, groups = self.shape[0], -(-self.shape[1] // spec.block)
        self.register_buffer("codes", torch.empty(out, groups * spec.block // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(out, groups, dtype=torch.bfloat16, device=device))
        self.register_buffer("zero", torch.empty(out, groups, dtype=torch.uint8, device=device))

    def fill(self, weight: Tensor) -> Tensor:
        codes, self.scale, self.zero = quantise.quantise_int4(weight, self.storage.block)
        self.codes = quantise.pack(codes.flatten()).view_as(self.codes)
        return self.scale

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return quantise.dequantise_rows(self.rows(), self.shape[1], dtype or self.dtype)

    @property
    def group(self) -> int:
        return self.storage.block

    def rows(self) -> quantise.Rows:
        return quantise.Rows(self.codes, self.scale, self.storage.block, self.zero)
