"""Next-token prediction: cross-entropy from hidden states, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dovetail.errors import DataError
from dovetail.kernels import twins
from dovetail.objectives.base import IGNORED, Batch, Loss, Objective, Term, check_direction
from dovetail.spec import register

# Logits held at a time: rows enough for full matmul speed, far below (B,T,V). 8 MB in fp32 stay in a CPU's cache and
# in pages that it has; a GPU wants fewer, larger kernels, since each adds a gradient of the whole head to their sum.
_CHUNK = {"cpu": 2**21, "cuda": 2**27}
_ROWS = 128  # a GPU's tile of a product: rows come in whole ones


@register(
    "objective",
    "next_token",
    default=True,
    oracle="torch.nn.functional.cross_entropy",
    source="Radford et al. 2018, eq. 1; z-loss: Chowdhery et al. 2022 (PaLM), section 5; smoothing: Szegedy et al. 2016",
    causal=True,
)
class NextToken(Objective):
    """−log p(label), summed over the labels that are not -100.

    batch["labels"] (B,T) stands beside the token that predicts it: labels[b, t] is the target of the hidden
    state at t (already shifted). smoothing: share of the target spread evenly over the vocabulary.
    z: weight of (log Z)², which keeps logits from drifting (PaLM uses 1e-4).
    Metrics: "nats" (cross-entropy without smoothing or z) and "correct" (top-1 hits).
    """

    smoothing: float = 0.0
    z: float = 0.0

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"next_token": int((batch["labels"] != IGNORED).sum())}

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """Raises DataError when the labels do not stand beside the hidden states."""
        h, labels = hidden_states(model, batch, self.kind), batch["labels"]
        fused = isinstance(model, torch._dynamo.OptimizedModule)
        total, nats, correct = cross_entropy(
            model.head, h.flatten(0, -2), labels.flatten(), self.smoothing, self.z, fused=fused
        )
        count = (labels != IGNORED).sum()
        return Loss({"next_token": Term(total, count)}, metrics={"nats": (nats, count), "correct": (correct, count)})


def hidden_states(model: Any, batch: Batch, what: str) -> Tensor:
    """The model's last hidden states (B,T,C), beside batch["labels"] (B,T). what: the objective that asks.

    Raises SpecError for a model that looks the wrong way, DataError when the states do not stand beside the labels, or
    the model returns losses that nobody would add.
    """
    check_direction(what, model)
    inputs = {name: value for name, value in batch.items() if name not in ("tokens", "labels")}
    out = model(batch["tokens"], **inputs, logits=False)
    if out.aux:
        raise DataError(f"the model returns {', '.join(out.aux)}, for which {what} has no term")
    h, labels = out.last_hidden_state, batch["labels"]
    if h.shape[:-1] != labels.shape:
        raise DataError(f"labels {tuple(labels.shape)} do not stand beside hidden states {tuple(h.shape[:-1])}")
    return h


def cross_entropy(
    head: Callable[[Tensor], Tensor],
    h: Tensor,
    labels: Tensor,
    smoothing: float = 0.0,
    z: float = 0.0,
    *,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum to minimise, Σ nats, hits) of hidden states h (N,C) against labels (N,), in fp32 (fp64 if h is).

    fused: compile the passes over the logits, as goes with a compiled model.
    """
    if twins.asked():
        return plain_cross_entropy(head(h), labels, smoothing, z)
    differentiate = torch.is_grad_enabled()
    one = _compiled_softmax_loss() if fused else softmax_loss

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        return one(logits, labels[rows], smoothing, z, differentiate)

    total, nats, hits = through_head(head, h, loss, fused=fused)
    return total, nats, hits


def plain_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float, z: float) -> tuple[Tensor, Tensor, Tensor]:
    """The plain twin of `cross_entropy`: torch's own over all logits (N,V) at once, differentiated by autograd."""
    logits, real = logits.to(torch.promote_types(logits.dtype, torch.float32)), labels != IGNORED
    known: dict[str, Any] = {"ignore_index": IGNORED, "reduction": "sum"}
    total = F.cross_entropy(logits, labels, label_smoothing=smoothing, **known)
    if z:
        total = total + z * torch.logsumexp(logits[real], -1).square().sum()
    hits = ((logits.argmax(-1) == labels) & real).sum()
    return total, F.cross_entropy(logits.detach(), labels, **known), hits


def rows_at_once(rows: int, vocab: int, device: str, fused: bool) -> int:
    """Rows of logits that live at a time, of `rows`. fused: passes that are compiled hold half as much of each."""
    if twins.asked():
        return rows
    most = _CHUNK.get(device, _CHUNK["cuda"]) * (2 if fused and device != "cpu" else 1) // vocab
    return max(64, most // _ROWS * _ROWS if most >= _ROWS else most)


@contextmanager
def as_on(device: str) -> Iterator[None]:
    """Inside, a CPU cuts logits as `device` does: a step whose memory is only counted runs on none. Passes are not fused
    then, and as many bytes of half as many rows are counted."""
    before = _CHUNK["cpu"]
    _CHUNK["cpu"] = _CHUNK.get(device, _CHUNK["cuda"])
    try:
        yield
    finally:
        _CHUNK["cpu"] = before


def through_head(
    head: Callable[[Tensor], Tensor],
    h: Tensor,
    loss: Callable[[Tensor, slice], tuple[Tensor, Tensor | None]],
    *,
    fused: bool = False,
) -> list[Tensor]:
    """Sums over the logits of hidden states h (N,C), the first of which can be differentiated.

    loss(logits (n,V) of those rows, rows of h): ((k,) sums, gradient of the first with respect to the logits (n,V), or
    None without gradients). Logits live one chunk of rows at a time. Their gradient is pulled back through `head`
    (whatever that is: tied, adapted, biased) at once, and kept as (N,C) and in the shape of the head's parameters
    until the backward asks for it: nothing is computed twice.
    """
    differentiate = torch.is_grad_enabled()
    probe = head(h[:1].detach())
    leaves = _leaves(probe) if differentiate else []
    rows = rows_at_once(h.shape[0], probe.shape[-1], h.device.type, fused)
    sums: Tensor | None = None
    d_h = torch.empty_like(h) if differentiate else h
    d_leaves: list[Tensor] = []
    for start in range(0, h.shape[0], rows):
        span = slice(start, start + rows)
        x = h[span].detach().requires_grad_(differentiate)
        logits = head(x)
        part, d_logits = loss(logits.detach(), span)
        sums = part if sums is None else sums + part
        if d_logits is None:
            continue
        d_h[span], *d_part = torch.autograd.grad(logits, [x, *leaves], d_logits)
        if not start:
            d_leaves = d_part
            continue
        if start == rows:  # sums are wide and of their own; one chunk needs neither
            d_leaves = [d.to(torch.promote_types(d.dtype, torch.float32), copy=True) for d in d_leaves]
        if d_leaves:
            torch._foreach_add_(d_leaves, d_part)
    assert sums is not None
    total, *rest = sums.unbind()
    if differentiate:
        total = _Deliver.apply(total, 1 + len(leaves), h, *leaves, d_h, *d_leaves)
    return [total, *rest]  # type: ignore[list-item]


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
    hits = -nll >= log_p.amax(-1)  # several times faster than argmax on CPU
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


@cache
def _compiled_softmax_loss() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return torch.compile(softmax_loss)


def _leaves(x: Tensor) -> list[Tensor]:
    """The parameters that x was computed from."""
    found: dict[int, Tensor] = {}
    seen, nodes = set(), [x.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable  # type: ignore[attr-defined]
        nodes.extend(before for before, _ in node.next_functions)
    return list(found.values())


class _Deliver(torch.autograd.Function):
    """Hands over gradients that are known already: forward(total, n, n tensors, their n gradients) -> total."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, n: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[n:])
        ctx.dtypes = [t.dtype for t in tensors[:n]]
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # Written in the type that is asked for: no wide copy beside all that the backward still needs.
        given = [torch.empty_like(d, dtype=dtype) for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        for out, d in zip(given, ctx.saved_tensors, strict=True):
            torch.mul(d, grads[0].to(d.dtype), out=out)
        return (None, None, *given, *[None] * len(given))
