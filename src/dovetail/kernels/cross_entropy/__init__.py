"""The softmax loss over a vocabulary: sums over rows of logits, and the gradient with respect to them made at once.

−log p(label) with label smoothing (Szegedy et al. 2016, section 7) and z · (log Z)² (Chowdhery et al. 2022, section 5).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.kernels.cross_entropy import plain, reference
from dovetail.kernels.cross_entropy.plan import plan
from dovetail.kernels.cross_entropy.reference import IGNORED
from dovetail.kernels.installed import TRITON


def softmax_loss_(logits: Tensor, labels: Tensor, smoothing: float, z: float, differentiate: bool) -> Tensor:
    """(3,) sums (loss, nats, hits) in fp32 of logits (N,V) of any row stride, which become d loss / d logits if
    `differentiate`: the path "triton" of `plan`.

    labels (N,): ids, or IGNORED for rows that cost and ask nothing. A label that is no id costs NaN. A row is a hit
    where its label's logit is the first of the largest: what is chosen greedily.
    """
    return _rows(logits, labels, smoothing, z, differentiate).sum(1)


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x · factor () in `dtype`, rounded once, with nothing beside x and the result.

    torch's own product takes an entry at a time where it also casts, at half of what memory gives.
    """
    if x.device.type == "cuda" and TRITON and x.dtype == torch.float32 != dtype and x.is_contiguous():
        from dovetail.kernels.cross_entropy import triton

        return triton.scaled(x, factor, dtype)
    return torch.mul(x, factor.to(x.dtype), out=torch.empty_like(x, dtype=dtype))


@torch.library.custom_op("dovetail::softmax_loss_", mutates_args=("logits",))
def _rows(logits: Tensor, labels: Tensor, smoothing: float, z: float, differentiate: bool) -> Tensor:
    """(3,N): what each row adds to the sums."""
    from dovetail.kernels.cross_entropy import triton

    return triton.softmax_loss_(logits, labels, smoothing, z, differentiate)


@_rows.register_fake
def _(logits, labels, smoothing, z, differentiate):  # type: ignore[no-untyped-def]
    return logits.new_empty(3, len(logits), dtype=torch.float32)


__all__ = ["IGNORED", "plain", "plan", "reference", "scaled", "softmax_loss_"]
