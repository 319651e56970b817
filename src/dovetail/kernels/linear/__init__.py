"""y = x Wᵀ + b. torch's own, save for one vector: on several cores of a CPU, whose matrix library leaves it to one, and
on CUDA (`vector`) with a tall W, the logits of a decoded token, or, in a captured step, with any (no bias, no autocast).

On a CPU a column-major W (I,O) is cut along I: each core sums its own columns, as a batch of products, and the shares
are added. Measured on two cores in fp32: 1.7 to 2.0 times the whole product, from 256 x 256 to 8192 x 256. In a compiled
step it is written as sums along the rows of W as they lie: the compiler shares the rows among the cores, and reads W as it
is kept, in bf16 or in codes, as it sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.kernels import twins
from dovetail.kernels.chunks import autocasts
from dovetail.kernels.installed import TRITON
from dovetail.kernels.plan import Plan

_LEAST = 64  # columns worth a core
TALL = 32_768  # rows of W that keep every multiprocessor of a GPU reading
_stepping = False


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., I), W (O,I), b (O) -> (..., O)."""
    width = weight.shape[1]
    if x.shape[-1] != width:
        return F.linear(x, weight, bias)  # which says what is wrong
    if _by_vector(x, weight, bias):
        from dovetail.kernels.linear import vector

        return vector.product(x.reshape(-1), weight).view(*x.shape[:-1], -1)
    if _along_rows(x, weight):
        wide = torch.promote_types(x.dtype, torch.float32)
        y = (weight.to(wide) * x.reshape(-1).to(wide)).sum(-1)
        return (y if bias is None else y + bias.to(wide)).to(x.dtype).view(*x.shape[:-1], -1)
    if x.numel() == width and weight.stride(0) == 1 and x.device.type == "cpu" and not torch.is_grad_enabled():
        cores = 1 if twins.asked() else min(_threads(), width // _LEAST)
        if cores > 1 and width % cores == 0 and weight.stride(1) == weight.shape[0] and x.dtype == weight.dtype:
            shares = torch.bmm(x.reshape(cores, 1, -1), weight.t().view(cores, width // cores, -1))
            y = shares.sum(0).view(*x.shape[:-1], -1)
            return y if bias is None else y + bias
    return F.linear(x, weight, bias)


@contextmanager
def stepping() -> Iterator[None]:
    """Inside, one vector is multiplied by own kernels however few rows W has, on a CPU by the compiler's sums: for steps that
    are compiled and captured (`sampling.captured`), where what stands beside a product is taken in, and a call costs the
    host nothing. It holds for the whole process: one step at a time."""
    global _stepping
    before, _stepping = _stepping, True
    try:
        yield
    finally:
        _stepping = before


def plan(device: str, dtype: torch.dtype, rows: int, bias: bool = False, step: bool = True) -> Plan:
    """The path of one vector without gradients, for W of so many rows, and why. step: inside `stepping`."""
    if twins.asked():
        return Plan("torch", twins.WHY)
    if device == "cpu" and step:
        return Plan(
            "rows", "one vector in a compiled step on a CPU: the compiler's sums along rows, shared among the cores"
        )
    if device != "cuda" or not TRITON or dtype == torch.float64 or bias:
        why = "not on CUDA" if device != "cuda" else "a bias" if bias else f"{dtype}" if TRITON else "no Triton"
        return Plan("torch", f"{why}: torch's own product")
    if rows < TALL and not step:
        return Plan("torch", f"fewer than {TALL} rows, in no captured step: torch's own product, the shorter call")
    beside = ", and takes in an RMS norm, a gate or a sum beside it" if step else ""
    return Plan("vector", f"one vector on CUDA: an own kernel, which reads the weight once{beside}")


def _by_vector(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `vector` serves it: as planned, a weight that stands, as the kernel asks, and no copy made for this call."""
    if torch.is_grad_enabled() or x.device.type != "cuda" or x.numel() != weight.shape[1]:
        return False
    fits = isinstance(weight, nn.Parameter) and x.dtype == weight.dtype and weight.stride(1) == 1 and not autocasts(x)
    return fits and plan("cuda", x.dtype, weight.shape[0], bias is not None, _stepping).path == "vector"


def _along_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether a compiler is to sum along the rows of W: in a step on a CPU, for one vector."""
    if not (_stepping and torch.compiler.is_compiling()) or torch.is_grad_enabled() or x.device.type != "cpu":
        return False
    fits = x.numel() == weight.shape[1] and x.dtype == weight.dtype and not autocasts(x)
    return fits and plan("cpu", x.dtype, weight.shape[0]).path == "rows"


def _threads() -> int:
    """A compiler takes what it is when it looks."""
    return torch.get_num_threads()


# torch.compiler.assume_constant_result, which says no more, imports the whole compiler: two seconds of every start.
_threads._dynamo_marked_constant = True  # type: ignore[attr-defined]
