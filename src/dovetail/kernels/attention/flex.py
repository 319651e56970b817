"""FlexAttention: any mask rule as block-sparse tiles, on CUDA."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dovetail.kernels.attention.coords import BoundMask


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BoundMask, scale: float) -> Tensor:
    """(B,H,T,Dv). The block mask is made once a forward and shared through the bound mask."""
    if "block" not in mask.memo:
        rows = max(mask.at.q.order.shape[0], mask.at.k.order.shape[0])
        mask.memo["block"] = create_block_mask(
            mask.mod(), rows if rows > 1 else None, None, q.shape[2], k.shape[2], device=str(q.device)
        )
    run = flex_attention if torch.compiler.is_compiling() else _compiled()
    return run(q, k, v, block_mask=mask.memo["block"], scale=scale, enable_gqa=q.shape[1] != k.shape[1])
