"""The softmax loss and its gradient in plain torch, pass after pass over the logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dovetail.kernels.cross_entropy.reference import IGNORED


def softmax_loss(
    logits: Tensor, labels: Tensor, smoothing: float, z: float, differentiate: bool
) -> tuple[Tensor, Tensor | None]:
    """(3,) sums (loss, nats, hits) of logits (N,V), and d loss / d logits (N,V) in the logits' dtype."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    real = labels != IGNORED
    target = labels.clamp_min(0)[:, None]
    log_p = torch.log_softmax(logits, -1, dtype=wide)
    nll = -log_p.gather(-1, target).squeeze(-1)
    loss = nll
    if smoothing:
        loss = (1 - smoothing) * nll - smoothing * log_p.mean(-1)
    log_z = None
    if z:
        log_z = logits[:, 0].to(wide) - log_p[:, 0]
        loss = loss + z * log_z.square()
    hits = _hits(logits, labels, log_p, nll)
    sums = torch.stack(
        [torch.where(real, loss, 0).sum(), torch.where(real, nll, 0).sum(), (hits & real).sum().to(wide)]
    )
    if not differentiate:
        return sums, None
    grad = log_p.exp_()
    if log_z is not None:
        grad.mul_((1 + 2 * z * log_z)[:, None])
    if smoothing:
        grad.sub_(smoothing / logits.shape[-1])
    if torch.compiler.is_compiling():  # fuses with what stands around it, where a scatter would not
        grad.sub_((1 - smoothing) * (torch.arange(grad.shape[-1], device=grad.device) == target))
    else:
        grad.scatter_add_(-1, target, torch.full_like(target, -(1 - smoothing), dtype=wide))
    return sums, grad.mul_(real[:, None]).to(logits.dtype)


def _hits(logits: Tensor, labels: Tensor, log_p: Tensor, nll: Tensor) -> Tensor:
    """(N,): whether the label's logit is the first of the largest."""
    if torch.compiler.is_compiling() or logits.device.type != "cpu":
        return logits.argmax(-1) == labels
    hits = -nll >= log_p.amax(-1)  # several times faster than argmax on CPU, which rows that tie need
    if isinstance(logits, FakeTensor):  # whose values nobody knows
        return hits
    (rows,) = (hits & (labels != IGNORED)).nonzero(as_tuple=True)
    if 2 * len(rows) > len(hits):
        return logits.argmax(-1) == labels
    for some in rows.split(64):  # a copy of few
        hits[some] = logits[some].argmax(-1) == labels[some]
    return hits
