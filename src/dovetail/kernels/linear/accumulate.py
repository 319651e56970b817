"""The gradient of a weight over several pieces of its rows: Σ yᵀ x, added up by the products themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.kernels.chunks import without_autocast


def add_product(total: Tensor | None, y: Tensor, x: Tensor, device: str) -> Tensor:
    """total + yᵀ x (O,I), of y (n,O) and x (n,I) of one dtype, in fp32 (fp64 if they are), written into `total`; a new one
    if that is None. device: the type of the one whose way is taken.

    On CUDA 16-bit factors are added up in fp32 in the product itself, and no product stands beside the sum. A CPU rounds
    each product to their type once, before it is added.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = y.t()
    with without_autocast(x):
        if x.dtype == wide:
            return y @ x if total is None else total.addmm_(y, x)
        if device != "cuda":
            return (y @ x).to(wide) if total is None else total.add_(y @ x)
        if total is None:
            return torch.mm(y, x, out_dtype=wide)
        return torch.addmm(total, y, x, out_dtype=wide, out=total)
