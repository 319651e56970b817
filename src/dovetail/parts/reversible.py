"""Reversible layers: two streams, from whose end every layer's input can be computed back.

y1 = x1 + mixer(norm(x2)); y2 = x2 + feedforward(norm(y1)). The backward keeps the last layer's output alone and
walks back, so that activation memory does not grow with depth (Gomez et al. 2017, section 3; Kitaev et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree

from dovetail.errors import BuildError
from dovetail.parts.block import Block, BlockModule
from dovetail.parts.context import Context
from dovetail.spec import Slot, register


@register(
    "block",
    "reversible",
    oracle="transformers reformer",
    source="Gomez et al. 2017 (RevNet), eq. 8; Kitaev et al. 2020 (Reformer), eq. 9",
    streams=2,
)
class Reversible(Block):
    """y1 = x1 + mixer(norm(x2)), y2 = x2 + feedforward(norm(y1)): for a stack of two streams, side by side in x."""

    def build(self, slot: Slot) -> nn.Module:
        if self.feedforward is None or self.cross is not None:
            raise BuildError(
                "a reversible block has two branches, a mixer and a feed-forward",
                where=slot.path,
                remedy="give feedforward, and leave cross out",
            )
        return ReversibleModule(self, slot)


class ReversibleModule(BlockModule):
    norm_mixer: nn.Module
    norm_feedforward: nn.Module

    def forward(self, x: Tensor, ctx: Context, state: dict[str, Any] | None = None) -> Tensor:
        """(B,T,2C) -> (B,T,2C)."""
        own = None if state is None else state["mixer"]
        a, b = x.chunk(2, -1)
        a = a + self.mix(b, ctx, own)
        return torch.cat([a, b + self.feed(a)], -1)

    def mix(self, b: Tensor, ctx: Context, state: Any = None) -> Tensor:
        return self.dropout(self.branch("mixer", self.norm_mixer(b), ctx, state))

    def feed(self, a: Tensor) -> Tensor:
        return self.dropout(self.branch("feedforward", self.norm_feedforward(a)))


def run_reversible(blocks: Sequence[nn.Module], x: Tensor, ctx: Context) -> Tensor:
    """x (B,T,2C) through reversible blocks, (B,T,2C), with the backward that recomputes from the end.

    Where the context itself needs a gradient, plain autograd runs instead: only x and the parameters are followed.
    So it does under torch.compile, which chooses by itself what to keep.
    """
    followed = any(t.requires_grad for t in _pytree.tree_leaves(ctx) if isinstance(t, Tensor))
    if followed or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        for block in blocks:
            x = block(x, ctx)
        return x
    parameters = {id(p): p for block in blocks for p in block.parameters() if p.requires_grad}
    return _Reversible.apply(list(blocks), ctx, x, *parameters.values())  # type: ignore[no-any-return]


class _Reversible(torch.autograd.Function):
    """Inputs: the blocks, the context, x, then every parameter that wants a gradient, once each."""

    @staticmethod
    def forward(fn: Any, blocks: list[ReversibleModule], ctx: Context, x: Tensor, *parameters: Tensor) -> Tensor:
        fn.blocks, fn.ctx, fn.parameters, fn.autocast = blocks, ctx, parameters, _autocast(x.device.type)
        fn.rng = []
        a, b = x.chunk(2, -1)
        for block in blocks:
            mixing = _rng(x)
            a = a + block.mix(b, ctx)
            fn.rng.append((mixing, _rng(x)))
            b = b + block.feed(a)
        y = torch.cat([a, b], -1)
        fn.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(fn: Any, *grads: Tensor) -> Any:
        (y,) = fn.saved_tensors
        total: dict[int, Tensor] = {}
        (a, b), (da, db) = y.chunk(2, -1), grads[0].chunk(2, -1)
        for block, (mixing, feeding) in zip(reversed(fn.blocks), reversed(fn.rng), strict=True):
            with _replayed(feeding, fn.autocast, y):
                f, dx = _pull(block.feed, a, db, block, total)
            b, da = b - f, da + dx
            with _replayed(mixing, fn.autocast, y):
                g, dx = _pull(lambda x, block=block: block.mix(x, fn.ctx), b, da, block, total)
            a, db = a - g, db + dx
        return None, None, torch.cat([da, db], -1), *(total.get(id(p)) for p in fn.parameters)


def _pull(
    branch: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, block: nn.Module, total: dict[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """branch(x) and dy pulled back to x; the parameters' gradients are added to `total` by id."""
    followed = [p for p in block.parameters() if p.requires_grad]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = branch(x)
    dx, *rest = torch.autograd.grad(y, [x, *followed], dy.to(y.dtype), allow_unused=True)
    for p, g in zip(followed, rest, strict=True):
        if g is not None:
            total[id(p)] = g if id(p) not in total else total[id(p)] + g
    return y.detach(), torch.zeros_like(x) if dx is None else dx


def _rng(x: Tensor) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(x.device)] if x.is_cuda else [])]


def _autocast(device: str) -> dict[str, Any]:
    if not torch.amp.is_autocast_available(device):  # meta: there is nothing to replay
        return {"device_type": "cpu", "enabled": False}
    return {
        "device_type": device,
        "enabled": torch.is_autocast_enabled(device),
        "dtype": torch.get_autocast_dtype(device),
    }


@contextmanager
def _replayed(rng: list[Tensor], autocast: dict[str, Any], x: Tensor) -> Iterator[None]:
    """The random numbers and the autocast that the forward had, for the length of a block."""
    with torch.random.fork_rng([x.device] if x.is_cuda else []), torch.autocast(**autocast):
        torch.set_rng_state(rng[0])
        if x.is_cuda:
            torch.cuda.set_rng_state(rng[1], x.device)
        yield
