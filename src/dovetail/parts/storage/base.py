"""How a frozen weight is kept: a storage turns it into codes, and gives it back for every use.

bitsandbytes and torchao have kernels for like formats; nothing here needs them. torch's own are not enough: on a GPU its
int8 product is a plain one in fp32, and its int4 product takes bf16 alone and a layout that only it reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.errors import CheckpointError
from dovetail.kernels import quantise
from dovetail.kernels.linear import linear
from dovetail.kernels.plan import Plan
from dovetail.spec import Spec


class Stored(nn.Module, ABC):
    """A frozen weight as codes and constants, which are buffers: it trains nothing and saves what it holds.

    shape: of the weight, (out, in). dtype: what it had, and what `dense` gives back. It follows `.to(dtype)`; the
    codes and the constants do not, because a constant rounded to bf16 would change every weight of its block.
    """

    def __init__(self, spec: Storage, shape: Sequence[int], dtype: torch.dtype):
        super().__init__()
        self.storage, self.shape, self.dtype = spec, torch.Size(shape), dtype

    @abstractmethod
    def fill(self, weight: Tensor) -> Tensor:
        """Quantises `weight` into the buffers; returns a constant of every block, not finite where its weights are not."""

    @abstractmethod
    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as the codes say it, (out, in), computed in fp32 and rounded once to `dtype`. No gradient."""

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + b in x's dtype (autocast's, where it is on): (..., in) -> (..., out).

        The dense weight lives only while it is multiplied: the backward dequantises it again (Dettmers et al. 2023,
        eq. 5). Gradients reach x and the bias. Without gradients a few vectors are multiplied with the codes themselves,
        where `quantise.plan_linear` has a kernel for that; this is decoding, whose cost is the bytes of the weights.
        """
        kind = x.device.type
        if not x.is_meta and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        if not torch.is_grad_enabled() and self.plan(kind, x).path == "triton":
            return quantise.linear(x, self.rows(), bias)
        if torch.compiler.is_compiling():
            # A compiler dequantises again by itself; under checkpointing torch 2.11 would keep what is inside a Function.
            return linear(x, self.dense(x.dtype), bias)
        return _Linear.apply(x, bias, self)  # type: ignore[no-any-return]

    def plan(self, device: str, x: Tensor) -> Plan:
        """How `linear` multiplies without gradients on such a device, and why."""
        width = self.shape[-1]
        return quantise.plan_linear(device, x.numel() // width, x.dtype, self.group, width)

    @property
    @abstractmethod
    def group(self) -> int | None:
        """Weights of a row that share a constant; None where blocks reach over the ends of rows."""

    @abstractmethod
    def rows(self) -> quantise.Rows:
        """The codes and constants as they lie along the rows of the weight; only where `group` is not None."""

    @property
    def bits_per_weight(self) -> float:
        """Bits of everything that is held, tables too, divided by the number of weights."""
        return 8 * sum(buffer.nbytes for buffer in self.buffers()) / self.shape.numel()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves as `fn` says, and keeps the type of every buffer: `.half()` is for the weight, not for its constants."""
        for name, buffer in self.named_buffers():
            moved = fn(buffer)
            setattr(self, name, moved if moved.dtype == buffer.dtype else buffer.to(moved.device))
        dtype = fn(torch.empty(0, dtype=self.dtype, device=next(self.buffers()).device)).dtype
        self.dtype = dtype if dtype.is_floating_point else self.dtype
        return self

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.storage.kind}, {str(self.dtype).removeprefix('torch.')}"


class Storage(Spec):
    """Base of the storages."""

    def store(self, weight: Tensor) -> Stored:
        """`weight` (out, in), quantised, on its device. What it is made from is not kept and may be freed.

        Raises CheckpointError for a weight that is not floating-point, is empty, or holds NaN or infinity.
        """
        if not weight.is_floating_point() or not weight.numel():
            raise CheckpointError(
                f"a {str(weight.dtype).removeprefix('torch.')} tensor {tuple(weight.shape)} cannot be stored as {self.kind}",
                remedy="quantise floating-point weights that hold something",
            )
        stored = self.empty(weight.shape, weight.dtype, weight.device)
        with torch.no_grad():
            constants = stored.fill(weight.detach())
        if not constants.is_meta and not bool(constants.isfinite().all()):
            raise CheckpointError(
                f"a weight {tuple(weight.shape)} holds NaN or infinity: {self.kind} has no code for it",
                remedy="mend the checkpoint, or leave this weight unquantised",
            )
        return stored

    @abstractmethod
    def empty(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Stored:
        """Room for a weight (out, in) of `dtype`, to be filled by `load_state_dict`. It holds nothing meaningful yet."""


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b over a stored weight. Nothing is saved: dx = dy W and db need only the codes, which stay."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, stored: Stored) -> Tensor:
        ctx.stored = stored
        return F.linear(x, stored.dense(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        dx = dy @ ctx.stored.dense(dy.dtype) if ctx.needs_input_grad[0] else None
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return dx, dbias, None
