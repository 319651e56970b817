"""Next-token prediction: cross-entropy from hidden states, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dovetail.errors import DataError
from dovetail.kernels import twins
from dovetail.kernels.counted import device_type
from dovetail.kernels.cross_entropy import plain, plan, reference, scaled, softmax_loss_
from dovetail.kernels.linear.accumulate import add_product
from dovetail.objectives.base import IGNORED, Batch, Loss, Objective, Term, check_direction
from dovetail.spec import register
from dovetail.spec.ranges import Chance

# Logits held at a time: rows enough for full matmul speed, far below (B,T,V). 8 MB in fp32 stay in a CPU's cache and
# in pages that it has; a GPU wants fewer, larger kernels, since each adds a gradient of the whole head to their sum. Twice
# as many where their gradient is written over them.
_CHUNK = {"cpu": 2**21, "cuda": 2**27}
_ROWS = 128  # a GPU's tile of a product: rows come in whole ones
_FORGETFUL = {"MmBackward0", "AddmmBackward0", "AddBackward0", "MulBackward0", "ToCopyBackward0"}


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

    smoothing: Chance = 0.0
    z: Annotated[float, Field(ge=0)] = 0.0

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

    fused: compile what passes over the logits there are in plain torch, as goes with a compiled model.
    """
    path = plan(device_type(h), h.dtype).path
    if path == "reference":
        return reference.cross_entropy(head(h), labels, smoothing, z)
    differentiate, in_place = torch.is_grad_enabled(), path == "triton"
    one = _compiled_softmax_loss() if fused else plain.softmax_loss

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        if not in_place:
            return one(logits, labels[rows], smoothing, z, differentiate)
        return softmax_loss_(logits, labels[rows], smoothing, z, differentiate), logits if differentiate else None

    total, nats, hits = through_head(head, h, loss, in_place=in_place)
    return total, nats, hits


def rows_at_once(rows: int, vocab: int, device: str, in_place: bool) -> int:
    """Rows of logits that live at a time, of `rows`. in_place: nothing of their size lives beside them."""
    if twins.asked():
        return rows
    most = _CHUNK.get(device, _CHUNK["cuda"]) * (2 if in_place else 1) // vocab
    return max(64, most // _ROWS * _ROWS if most >= _ROWS else most)


def through_head(
    head: Callable[[Tensor], Tensor],
    h: Tensor,
    loss: Callable[[Tensor, slice], tuple[Tensor, Tensor | None]],
    *,
    in_place: bool = False,
) -> list[Tensor]:
    """Sums over the logits of hidden states h (N,C), the first of which can be differentiated.

    loss(logits (n,V) of those rows, rows of h): ((k,) sums, gradient of the first with respect to the logits (n,V), or
    None without gradients). in_place: it writes the gradient over the logits. Logits live one chunk of rows at a time.
    Their gradient is pulled back through `head` (whatever that is: tied, adapted, biased) at once, and kept as (N,C) and
    in the shape of the head's parameters until the backward asks for it: nothing is computed twice.
    """
    differentiate, device = torch.is_grad_enabled(), device_type(h)
    first = h[:1].detach().requires_grad_(differentiate)
    probe = head(first)
    leaves = [leaf for leaf in _leaves(probe) if leaf is not first]
    rows = rows_at_once(h.shape[0], probe.shape[-1], device, in_place)
    # Where the head is a product and nothing else, that of the gradients adds up the weight's. One chunk has no sum.
    product = rows < h.shape[0] and _is_product(probe, first)
    sums: Tensor | None = None
    d_h = torch.empty_like(h) if differentiate else h
    d_leaves: list[Tensor] = []

    def chunk(start: int) -> Tensor:
        """Sums of the rows from `start` on; what has their logits' size is gone after it."""
        nonlocal d_leaves
        span = slice(start, start + rows)
        x = h[span].detach().requires_grad_(differentiate)
        logits = head(x)
        apart = in_place and differentiate and not _forgets(logits)
        part, d_logits = loss(logits.detach().clone() if apart else logits.detach(), span)
        if d_logits is None:
            return part
        d_h[span], *d_part = torch.autograd.grad(logits, [x] if product else [x, *leaves], d_logits)
        if product:
            before = d_leaves[0] if d_leaves else None
            d_leaves = [add_product(before, d_logits, x.detach().to(d_logits.dtype), device)]
            return part
        if not start:
            d_leaves = d_part
            return part
        if start == rows:  # sums are wide and of their own; one chunk needs neither
            d_leaves = [d.to(torch.promote_types(d.dtype, torch.float32), copy=True) for d in d_leaves]
        if d_leaves:
            torch._foreach_add_(d_leaves, d_part)
        return part

    for start in range(0, h.shape[0], rows):
        part = chunk(start)
        sums = part if sums is None else sums + part
    assert sums is not None
    total, *rest = sums.unbind()
    if differentiate:
        total = _Deliver.apply(total, 1 + len(leaves), h, *leaves, d_h, *d_leaves)
    return [total, *rest]  # type: ignore[list-item]


@cache
def _compiled_softmax_loss() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return torch.compile(plain.softmax_loss)


def _is_product(y: Tensor, x: Tensor) -> bool:
    """Whether y (n,O) is x Wᵀ of a parameter W that learns, and nothing else, as autograd has seen it made; casts, as
    autocast's, do not count."""
    made = y.grad_fn
    if made is None or made.name() != "MmBackward0":
        return False
    (left, _), (right, _) = made.next_functions
    if _leaf(left) is not x or right is None or right.name() != "TBackward0":
        return False
    weight = _leaf(right.next_functions[0][0])
    return isinstance(weight, nn.Parameter) and weight.shape == (y.shape[1], x.shape[1])


def _leaf(node: Any) -> Tensor | None:
    while node is not None and node.name() == "ToCopyBackward0":
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def _forgets(y: Tensor) -> bool:
    """Whether what made y does not need it again to be differentiated (as tanh would), so that it may be written over."""
    return y.grad_fn is not None and y.grad_fn.name() in _FORGETFUL


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
        given = [scaled(d, grads[0], dtype) for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (None, None, *given, *[None] * len(given))
