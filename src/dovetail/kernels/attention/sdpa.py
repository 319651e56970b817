"""torch's fused attention: cuDNN or flash on CUDA, flash on CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dovetail.kernels.attention.coords import BoundMask
from dovetail.kernels.attention.score import Score

_WIDTH = 128  # of heads that every fused operator takes
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BoundMask | None, score: Score | None, scale: float, dropout: float
) -> Tensor:
    """(B,H,T,Dv). Value width is padded to the key width where the fused operators want them equal; values far wider
    than keys, as of a gated attention unit, go a slice at a time, each with the scores anew."""
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
        out = F.scaled_dot_product_attention(folded, k, v, bias, dropout, scale=scale).reshape(B, H, 1, -1)
    elif q.is_cuda:
        with sdpa_kernel(_BACKENDS, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, bias, dropout, causal, scale=scale, enable_gqa=grouped)
    else:
        out = F.scaled_dot_product_attention(q, k, v, bias, dropout, causal, scale=scale, enable_gqa=grouped)
    if mask is not None and score is not None and len(score.terms) and not mask.full:
        # A float bias of -inf everywhere is NaN in some backends; an empty row is zero by contract.
        out = torch.where(mask.dense().any(-1, keepdim=True), out, torch.zeros_like(out))
    return out[..., :Dv] if Dv < D else out
