"""torch's fused attention: cuDNN or flash on CUDA, flash on CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dovetail.kernels.attention.coords import BoundMask, Coords
from dovetail.kernels.attention.score import RelativeLogits, Score

_WIDTH = 128  # of heads that every fused operator takes
_CUDNN = SDPBackend.CUDNN_ATTENTION
_OTHERS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
_LONG = 4096  # queries from which cuDNN gains more than its plan costs


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BoundMask | None, score: Score | None, scale: float, dropout: float
) -> Tensor:
    """(B,H,T,Dv). Value width is padded to the key width where the fused operators want them equal; values far wider
    than keys, as of a gated attention unit, go a slice at a time, each with the scores anew."""
    if score is not None and score.gridded:
        assert mask is not None
        q, k, score = *_widened(q, k, score.gridded, mask.at, scale), None
    Dv, D = v.shape[-1], q.shape[-1]
    if Dv > max(D, _WIDTH) and not dropout:  # which every slice would draw for itself
        slices = v.split(max(D, _WIDTH), -1)
        return torch.cat([attend(q, k, part, mask, score, scale, dropout) for part in slices], -1)
    causal = mask is not None and mask.causal
    bias: Tensor | None = None
    if mask is not None and not mask.full and not causal:
        bias = mask.dense()
    if score is not None and len(score.terms):
        assert mask is not None
        terms = score.bias(mask.at, scale)
        assert terms is not None
        hidden = mask.dense() if causal else bias
        causal = False
        bias = terms.to(q.dtype)
        if hidden is not None:
            bias = bias.masked_fill(~hidden, float("-inf"))
    if Dv < D:
        v = F.pad(v, (0, D - Dv))
    elif Dv > D:
        q, k = F.pad(q, (0, Dv - D)), F.pad(k, (0, Dv - D))
    grouped = q.shape[1] != k.shape[1]
    alike = not causal and (bias is None or bias.shape[1] == 1)
    if grouped and q.shape[2] == 1 and alike:
        # All heads of one query see the same keys: those of a group become rows, and no key is repeated.
        B, H, _, D = q.shape
        folded = q.reshape(B, k.shape[1], H // k.shape[1], D)
        out = _fused(folded, k, v, attn_mask=bias, dropout_p=dropout, scale=scale).reshape(B, H, 1, -1)
    else:
        given: dict[str, Any] = {"attn_mask": bias, "dropout_p": dropout, "is_causal": causal}
        out = _fused(q, k, v, **given, scale=scale, enable_gqa=grouped)
    if mask is not None and score is not None and len(score.terms) and not mask.full:
        # A float bias of -inf everywhere is NaN in some backends; an empty row is zero by contract.
        out = torch.where(mask.dense().any(-1, keepdim=True), out, torch.zeros_like(out))
    return out[..., :Dv] if Dv < D else out


def _widened(
    q: Tensor, k: Tensor, terms: tuple[RelativeLogits, ...], at: Coords, scale: float
) -> tuple[Tensor, Tensor]:
    """Queries that hold their terms, one for each place, beside them, and keys that hold a one at their own: the product
    adds them up. O(T · places) numbers where a bias has T · T; widths are multiples of 8, as fused operators want them."""
    assert at.q.positions is not None and at.k.positions is not None
    queries, keys = [q], [k]
    for t in terms:
        places = torch.arange(t.places or 0, device=q.device)
        index = (places - at.q.positions[:, None, :, t.axis, None] + t.back).clamp(0, t.values.shape[3] - 1)
        own = t.values.gather(-1, index.expand(*q.shape[:3], -1))
        queries.append((own if t.inside_scale else own / scale).to(q.dtype))
        key = ("ones", t.axis, t.places, k.dtype)
        if key not in at.memo:
            at.memo[key] = (at.k.positions[:, None, :, t.axis, None] == places).to(k.dtype)
        keys.append(at.memo[key].expand(*k.shape[:3], -1))
    beyond = -sum(x.shape[-1] for x in queries) % 8
    wide = (torch.cat(x, -1) for x in (queries, keys))
    return tuple(F.pad(x, (0, beyond)) if beyond else x for x in wide)  # type: ignore[return-value]


def _fused(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
    """torch's own, by the first operator that can. On CUDA cuDNN is the fastest, but makes a plan for every new shape, which
    takes the host tens of milliseconds: not for keys that grow by a token a step, nor for prompts of any length."""
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, **given)
    lasting = torch.is_grad_enabled() or torch.compiler.is_compiling() or q.shape[2] >= _LONG
    first = [_CUDNN, *_OTHERS] if lasting else [*_OTHERS, _CUDNN]
    with sdpa_kernel([*first, SDPBackend.MATH], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, **given)
