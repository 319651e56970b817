"""Training steps replayed as CUDA graphs: a small model waits for its host no more.

A step of a small model is a thousand kernels of microseconds each, and the host needs longer to start them than the
device to run them. A graph starts all at once: the same kernels on the same memory. What differs between steps is
copied in before: the batches, what sums are divided by, the rates.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dovetail.errors import UserError

WARM = 3  # steps taken before a graph is captured: kernels are tuned, tables and the optimiser's state made by then

Batch = dict[str, Tensor]
Counts = dict[str, Any]
Take = Callable[[list[Batch], Counts], tuple[Tensor, Tensor]]


class Graph(NamedTuple):
    """What was captured, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batches: list[Batch]
    counts: dict[str, Tensor]
    loss: Tensor
    norm: Tensor


class Graphed:
    """`take` (micro-batches, counts) -> (loss, norm) as one graph for each shape of what it is given.

    take does the same on the device every time, reads nothing back, and leaves no gradients. optimizer: fused; its rates
    become tensors, which `optim.set_rate` fills. The first WARM calls of a shape run `take` as it is, each a step like
    any other. Raises UserError for a step that cannot be captured.
    """

    def __init__(self, take: Take, optimizer: torch.optim.Optimizer, device: torch.device):
        self.take, self.optimizer, self.device = take, optimizer, device
        self.stream = torch.cuda.Stream(device)
        self.pool: Any = None
        self.calls: dict[Hashable, int] = {}
        self.graphs: dict[Hashable, Graph] = {}

    def __call__(self, batches: list[Batch], counts: Counts) -> tuple[Tensor, Tensor]:
        if not self.calls:  # a checkpoint that was restored has brought other groups
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]), device=self.device)
                group["capturable"] = True
        key = tuple((name, t.shape, t.dtype) for batch in batches for name, t in batch.items())
        self.calls[key] = self.calls.get(key, 0) + 1
        if key not in self.graphs:
            if self.calls[key] <= WARM:
                return self._warm(batches, counts)
            self.graphs[key] = self._captured(batches, counts)
        held = self.graphs[key]
        for into, batch in zip(held.batches, batches, strict=True):
            for name, t in batch.items():
                into[name].copy_(t, non_blocking=True)
        for name, count in counts.items():
            held.counts[name].fill_(count)
        held.graph.replay()
        return held.loss.clone(), held.norm.clone()

    def _warm(self, batches: list[Batch], counts: Counts) -> tuple[Tensor, Tensor]:
        """A step off the default stream, as capturing wants of whatever stays from it."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            loss, norm = self.take(_on(batches, self.device), counts)
        here.wait_stream(self.stream)
        return loss.clone(), norm.clone()

    def _captured(self, batches: list[Batch], counts: Counts) -> Graph:
        """Capturing runs nothing: the replay that follows takes the step."""
        static = _on(batches, self.device)
        divisors = {name: torch.tensor(float(count), device=self.device) for name, count in counts.items()}
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # Only this thread's calls are forbidden meanwhile: another one may be pinning memory.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                loss, norm = self.take(static, divisors)
        except RuntimeError as error:
            raise UserError(
                f"this step cannot be captured as a CUDA graph: {str(error).splitlines()[0]}",
                where="train.graph",
                remedy="set it to false",
            ) from error
        return Graph(graph, static, divisors, loss, norm)


def _on(batches: list[Batch], device: torch.device) -> list[Batch]:
    return [{name: t.to(device, non_blocking=True) for name, t in batch.items()} for batch in batches]
