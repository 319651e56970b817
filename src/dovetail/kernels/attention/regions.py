"""Attention over disjoint regions as a merge of plain attentions, exact forward and backward.

Forward: each region gives (out, lse); they merge by their log-sum-exp. Backward: each region is
differentiated with the *merged* out and lse, so that P = exp(s - lse) is the share of the whole
softmax. Merging by a detached lse instead would give wrong dq and dk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dovetail.errors import BuildError
from dovetail.kernels.attention import reference, triton
from dovetail.kernels.attention.coords import BoundMask
from dovetail.kernels.attention.reference import Region
from dovetail.kernels.chunks import without_autocast
from dovetail.kernels.installed import TRITON

Triple = tuple[Tensor, Tensor, Tensor]  # q, k, v of one region


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(out, lse) of the union from (out (B,H,T,Dv), lse (B,H,T)) of disjoint parts."""
    lse = torch.logsumexp(torch.stack([part for _, part in parts]), dim=0)
    safe = torch.where(torch.isfinite(lse), lse, torch.zeros_like(lse))
    out = sum(torch.exp(part - safe)[..., None].to(lse.dtype) * o.to(lse.dtype) for o, part in parts)
    assert isinstance(out, Tensor)
    return out, lse


class _Merged(torch.autograd.Function):
    """Inputs: scale, tile, masks, places, then the tensors; places say which are q, k, v of every region.

    A tensor that several regions use comes once, because compilers refuse the same input twice.
    """

    @staticmethod
    def forward(
        ctx: Any, scale: float, tile: int, masks: list[BoundMask | None], places: list[int], *tensors: Tensor
    ) -> Tensor:
        triples = _triples([tensors[i] for i in places])
        ctx.own = _own(triples, masks)
        if ctx.own:
            parts = _own_parts(triples, masks, _together(places, masks), scale)
        else:
            parts = [_bands(q, k, v, m, scale, tile) for (q, k, v), m in zip(triples, masks, strict=True)]
        out, lse = parts[0] if len(parts) == 1 else merge(parts)
        out = out.to(tensors[0].dtype) if ctx.own else out  # what the kernels' backward reads
        ctx.save_for_backward(out, lse, *tensors)
        ctx.scale, ctx.tile, ctx.masks, ctx.places = scale, tile, masks, places
        return out.to(tensors[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        out, lse, *tensors = ctx.saved_tensors
        dout = grads[0].to(out.dtype)
        triples = _triples([tensors[i] for i in ctx.places])
        if ctx.own:
            parts = _own_gradients(triples, ctx.masks, _together(ctx.places, ctx.masks), dout, out, lse, ctx.scale)
        else:
            delta = (dout * out).sum(-1)
            parts = [
                _backward(q, k, v, mask, dout, delta, lse, ctx.scale, ctx.tile)
                for (q, k, v), mask in zip(triples, ctx.masks, strict=True)
            ]
        result: list[Any] = [None] * len(tensors)
        for i, part in zip(ctx.places, [part for three in parts for part in three], strict=True):
            if part is not None:
                result[i] = part if result[i] is None else result[i] + part
        return None, None, None, None, *result


def attend_regions(regions: Sequence[Region], q: Tensor, scale: float, tile: int = 256) -> Tensor:
    """One softmax over disjoint regions, (B,H,T,Dv). Memory O(tile·S); scores with terms use the definition."""
    if any(r.score is not None and r.score.value_terms is not None for r in regions):
        raise BuildError(
            "value terms in an attention over regions",
            remedy="use a position without them beside one that splits the keys (a prefix, rerope)",
        )
    if any(r.score is not None and not r.score.plain for r in regions):
        return reference.attend_regions(regions, q, scale)[0]
    once: list[Tensor] = []
    places: list[int] = []
    for t in [t for r in regions for t in (q if r.q is None else r.q, r.k, r.v)]:
        known = [i for i, other in enumerate(once) if other is t]
        places.append(known[0] if known else len(once))
        if not known:
            once.append(t)
    with without_autocast(q):  # its sums and normalisers are wider than the factors, which the backward counts on
        return _Merged.apply(scale, tile, [r.mask for r in regions], places, *once)  # type: ignore[no-any-return]


def _own(triples: Sequence[tuple[Tensor, Tensor, Tensor]], masks: Sequence[BoundMask | None]) -> bool:
    """Whether own kernels run every region: where the plan may give them any (`triton.OWN`), on CUDA."""
    if not TRITON or "regions" not in triton.OWN or not triples[0][0].is_cuda:
        return False
    served = [
        triton.kind(mask, None, max(q.shape[-1], v.shape[-1]), q.dtype)
        for (q, _, v), mask in zip(triples, masks, strict=True)
    ]
    return None not in served and "dilated" not in served


def _together(places: Sequence[int], masks: Sequence[BoundMask | None]) -> list[tuple[int, ...]]:
    """The regions by number, neighbours over the same values and tokens as one, which a kernel walks one after the other."""
    found: list[tuple[int, ...]] = []
    for n, mask in enumerate(masks):
        last = found[-1][-1] if found and len(found[-1]) == 1 else None
        if last is not None and places[3 * last + 2] == places[3 * n + 2] and triton.pairs(masks[last], mask):
            found[-1] = (last, n)
        else:
            found.append((n,))
    return found


def _own_parts(
    triples: Sequence[Triple], masks: Sequence[BoundMask | None], groups: Sequence[tuple[int, ...]], scale: float
) -> list[tuple[Tensor, Tensor]]:
    """(out, lse) of each of `groups` by own kernels."""
    parts = []
    for n, *second in groups:
        (q, k, v), mask = triples[n], masks[n]
        if second:
            (q2, k2, _), other = triples[second[0]], masks[second[0]]
            assert mask is not None and other is not None
            parts.append(triton.pair(q, k, q2, k2, v, (mask, other), scale))
        else:
            parts.append(triton.region(q, k, v, mask, scale))
    return parts


def _own_gradients(
    triples: Sequence[Triple],
    masks: Sequence[BoundMask | None],
    groups: Sequence[tuple[int, ...]],
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> list[tuple[Tensor | None, ...]]:
    """Gradients of each region's q, k and v; the values that two share get theirs once, with the first of them."""
    parts: list[tuple[Tensor | None, ...]] = []
    for n, *second in groups:
        (q, k, v), mask = triples[n], masks[n]
        if second:
            (q2, k2, _), other = triples[second[0]], masks[second[0]]
            assert mask is not None and other is not None
            d_q, d_k, d_q2, d_k2, d_v = triton.pair_backward(dout, q, k, q2, k2, v, (mask, other), out, lse, scale)
            parts.extend([(d_q, d_k, d_v), (d_q2, d_k2, None)])
        else:
            parts.append(triton.region_backward(dout, q, k, v, mask, out, lse, scale))
    return parts


def _triples(tensors: Sequence[Tensor]) -> list[Triple]:
    return [(tensors[i], tensors[i + 1], tensors[i + 2]) for i in range(0, len(tensors), 3)]


def _reach(mask: BoundMask | None, queries: int, keys: int, tile: int) -> list[tuple[int, int, int, int]]:
    """(a, b, start, stop): bands of queries, and the keys between the first and the last tile that each sees any of.

    In short rows, and while compiling, all keys: what is hidden is a matter of data, and asking costs a synchronisation.
    """
    bands = [(a, min(a + tile, queries)) for a in range(0, queries, tile)]
    if mask is None or mask.full or len(bands) <= 2 or torch.compiler.is_compiling():
        return [(a, b, 0, keys) for a, b in bands]
    if "reach" not in mask.memo:
        mask.memo["reach"] = [[i for i, any in enumerate(row) if any] for row in mask.tiles(tile).any(0).tolist()]
    return [
        (a, b, tile * seen[0], min(tile * (seen[-1] + 1), keys)) if seen else (a, b, 0, 1)
        for (a, b), seen in zip(bands, mask.memo["reach"], strict=True)
    ]


def _bands(q: Tensor, k: Tensor, v: Tensor, mask: BoundMask | None, scale: float, tile: int) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for a, b, start, stop in _reach(mask, q.shape[2], k.shape[2], tile):
        part = None if mask is None else mask.rows(a, b, start, stop)
        p, lse = reference.softmax_lse(reference.scores(q[:, :, a:b], k[:, :, start:stop], part, None, scale))
        outs.append(p @ _wide(v[:, :, start:stop], p.dtype, q.shape[1]))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BoundMask | None,
    dout: Tensor,
    delta: Tensor,
    lse: Tensor,
    scale: float,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one region given the merged out (through delta = dout·out) and lse."""
    H, G = q.shape[1], k.shape[1]
    wide = lse.dtype
    K, V = _wide(k, wide, H), _wide(v, wide, H)
    dq, dK, dV = [], torch.zeros_like(K), torch.zeros_like(V)
    for a, b, start, stop in _reach(mask, q.shape[2], k.shape[2], tile):
        part = None if mask is None else mask.rows(a, b, start, stop)
        row_lse = lse[:, :, a:b, None]
        s = reference.scores(q[:, :, a:b], k[:, :, start:stop], part, None, scale)
        p = torch.where(torch.isfinite(row_lse), torch.exp(s - row_lse), torch.zeros_like(s))
        ds = p * (dout[:, :, a:b] @ V[:, :, start:stop].transpose(-1, -2) - delta[:, :, a:b, None]) * scale
        dq.append(ds @ K[:, :, start:stop])
        dK[:, :, start:stop] += ds.transpose(-1, -2) @ q[:, :, a:b].to(wide)
        dV[:, :, start:stop] += p.transpose(-1, -2) @ dout[:, :, a:b]

    def grouped(t: Tensor) -> Tensor:
        return t.unflatten(1, (G, H // G)).sum(2)

    return torch.cat(dq, 2).to(q.dtype), grouped(dK).to(k.dtype), grouped(dV).to(v.dtype)


def _wide(t: Tensor, dtype: torch.dtype, heads: int) -> Tensor:
    return t.to(dtype).repeat_interleave(heads // t.shape[1], dim=1)
