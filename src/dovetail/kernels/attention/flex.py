"""FlexAttention: any mask rule as block-sparse tiles, on CUDA."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dovetail.kernels.attention.coords import BoundMask, Coords, Rule, Side

_TILE = 128
_PAIRS = 2**26  # of a query and a key, asked for at a time


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BoundMask, scale: float) -> Tensor:
    """(B,H,T,Dv). The block mask is made once a forward and shared through the bound mask (`blocks`)."""
    if "block" not in mask.memo:
        rows = max(mask.at.q.order.shape[0], mask.at.k.order.shape[0])
        if torch.compiler.is_compiling():
            mask.memo["block"] = create_block_mask(
                mask.mod(), rows if rows > 1 else None, None, q.shape[2], k.shape[2], device=str(q.device)
            )
        else:
            mask.memo["block"] = blocks(mask)
    block, gqa = mask.memo["block"], q.shape[1] != k.shape[1]
    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, block_mask=block, scale=scale, enable_gqa=gqa)  # type: ignore[return-value]
    from torch._dynamo import config  # here: slow to import, and compiling has done so

    # Beyond its limit of graphs for one function, eight, torch would go on with the form that builds all scores.
    with config.patch(recompile_limit=64):
        return _compiled()(q, k, v, block_mask=block, scale=scale, enable_gqa=gqa)


def blocks(mask: BoundMask) -> BlockMask:
    """What torch's create_block_mask makes, in bands of queries: that one holds all T·S pairs at once, at 128k tokens
    137 GB. Where tokens are aligned it depends on the rule and the length alone, and is kept."""
    if not mask.at.aligned:
        return _built(mask, mask.mod())
    return _aligned(mask.rule, mask.at.q.order.shape[1], str(mask.at.q.order.device))


@functools.lru_cache(maxsize=16)
def _aligned(rule: Rule, length: int, device: str) -> BlockMask:
    with torch.inference_mode(False):  # training may read it next
        side = Side(torch.arange(length, device=device)[None])
        return _built(
            BoundMask(rule, Coords(side, side, True)),
            lambda b, h, q, k: rule.allowed(Side(q.long()), Side(k.long())),  # a token's order is its index
        )


def _built(mask: BoundMask, mod: Any) -> BlockMask:
    T, S = mask.at.q.order.shape[1], mask.at.k.order.shape[1]
    band = max(1, _PAIRS // S // _TILE) * _TILE
    counts = []
    for a in range(0, T, band):
        seen = mask.rows(a, min(a + band, T)).dense()[:, 0]
        seen = F.pad(seen, (0, -S % _TILE, 0, -seen.shape[1] % _TILE))
        counts.append(seen.unflatten(2, (-1, _TILE)).sum(-1).unflatten(1, (-1, _TILE)).sum(2))
    count = torch.cat(counts, 1)[:, None]  # (B|1,1,queries/tile,keys/tile): pairs that are seen
    full = count == _TILE**2
    listed = [*_listed((count > 0) & ~full), *_listed(full)]
    return BlockMask.from_kv_blocks(*listed, BLOCK_SIZE=_TILE, mask_mod=mod, seq_lengths=(T, S))


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of each row are true, and the numbers of all, those first: int32."""
    return tiles.sum(-1, dtype=torch.int32), tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(
        torch.int32
    )
