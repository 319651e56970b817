"""A training step run on fake tensors: shapes, dtypes and lifetimes of the real code, and no memory.

What stands at each moment is counted from the storages that live, so that nothing of a model has to be known: what
autograd keeps, what a backward makes before it lets go, the chunks of the loss. It runs as on a CPU; attention keeps
the same there (queries, keys, values, output, normaliser), gates of feed-forwards keep what they do on the device, mixers
with kernels of their own on CUDA what their plain torch form does.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dovetail.kernels import legs_recurrence
from dovetail.kernels.counted import as_on
from dovetail.objectives.next_token import cross_entropy
from dovetail.parts.containers import StackModule
from dovetail.training.device import autocast
from dovetail.training.fused import partitioned


class Live(TorchDispatchMode):
    """Bytes of the storages that operations have made and that still live: `now`, and the most so far, `peak`."""

    def __init__(self, known: Any = ()):
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = {t.untyped_storage()._cdata for t in known}
        self.counting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.addmm.dtype_out:  # which torch 2.11 cannot run on fake tensors
            return kwargs["out"]
        out = func(*args, **(kwargs or {}))
        if self.counting:
            self.add(out)
        return out

    def add(self, tree: Any) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size

    @contextmanager
    def paused(self, beside: float = 0.0) -> Iterator[None]:
        """Inside, nothing counts but `beside` bytes for the while."""
        self.peak, before = max(self.peak, int(self.now + beside)), self.counting
        self.counting = False
        try:
            yield
        finally:
            self.counting = before


def step_bytes(
    model: nn.Module,
    *,
    batch: int,
    length: int,
    device: str = "cuda",
    precision: str = "none",
    compiled: bool = False,
    again: int = 0,
) -> int:
    """The most bytes that one forward and backward hold beside the weights, gradients among them.

    model: anywhere, the meta device will do; it is left as it is. precision: autocast's, "bf16" or "none". compiled:
    blocks by Inductor's partition of their graphs. again: every how many blocks are checkpointed (0: none). Raises
    whatever the model raises for (batch, length) tokens alone.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _no_tables_kept():
        fake = faked(model).train()
        known = [*fake.parameters(), *fake.buffers()]
        live = Live(known)
        for stack in fake.modules():
            if isinstance(stack, StackModule):
                stack.checkpointing = again
        tokens, labels = (torch.zeros(batch, length, dtype=torch.long) for _ in range(2))
        with live, as_on(device), partitioned(fake, live) if compiled else nullcontext():
            with autocast(precision, torch.device("cpu")):
                h = fake(tokens, logits=False).last_hidden_state
                total = cross_entropy(fake.head, h.flatten(0, -2), labels.flatten(), fused=compiled)[0]
                del h
            (total / labels.numel()).backward()
        return live.peak


@contextmanager
def _no_tables_kept() -> Iterator[None]:
    """Inside, tables that outlive a step are made anew, and so counted; they are fake, and none stays for a real step."""
    legs_recurrence.matrices.cache_clear()
    try:
        yield
    finally:
        legs_recurrence.matrices.cache_clear()


def saved_bytes(run: Any, known: Any = ()) -> int:
    """Bytes of the storages that autograd keeps for the backward of run(), those of `known` tensors not counted."""
    left = {t.untyped_storage()._cdata for t in known}
    kept: dict[int, Any] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in left:
            kept[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = run()
    size = sum(s.nbytes() for s in kept.values())
    del out
    return size


def faked(model: nn.Module) -> Any:
    """A copy of `model` whose tensors are fake ones on the CPU; inside a FakeTensorMode."""
    done: dict[int, Tensor] = {}

    def fake(t: Tensor) -> Tensor:
        if id(t) not in done:
            made = torch.empty(t.shape, dtype=t.dtype, device="cpu")
            done[id(t)] = nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made
        return done[id(t)]

    tensors = {id(t): fake(t) for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        tensors |= {id(t): fake(t) for t in vars(module).values() if isinstance(t, Tensor)}
    return copy.deepcopy(model, tensors)
