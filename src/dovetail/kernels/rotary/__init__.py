"""Queries, keys and values of one product, apart, queries and keys turned by their positions (RoPE).

On CUDA the turned heads are read and written once, and so is the gradient of the product: turned back, and side by side
as the product's backward wants it. (Compilers make that one tensor entry by entry, asking of each which part it is in: 163 µs
a layer of Llama-3.2-1B's shape on an H200, where reading and writing it are 48.) Nothing but the tables is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.kernels import twins
from dovetail.kernels.counted import device_type
from dovetail.kernels.installed import TRITON
from dovetail.kernels.plan import Plan
from dovetail.kernels.rotary import reference
from dovetail.kernels.rotary.layout import Heads, Turning
from dovetail.kernels.rotary.reference import turn

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def turned(x: Tensor, heads: Heads, turning: Turning) -> tuple[Tensor, Tensor, Tensor]:
    """x (B,T,Σ) = q|k|v -> q (B,T,H,D), k (B,T,G,D), both turned, and v (B,T,G,E), a view of x. Su et al. 2021, eq. 34.

    On CUDA gradients can be taken once (a second derivative is refused).
    """
    path = plan(device_type(x), x.dtype).path
    if path == "plain" or turning.cos.requires_grad or turning.sin.requires_grad:
        return reference.turned(x, *heads, *turning)
    from dovetail.kernels.rotary import operator

    return operator.turned(x, heads, turning)


def plan(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Plan:
    """The path and why."""
    if twins.asked():
        return Plan("plain", twins.WHY)
    if device != "cuda" or not TRITON or dtype not in _DTYPES:
        why = "not on CUDA" if device != "cuda" else f"{dtype}" if TRITON else "Triton is not installed"
        return Plan("plain", f"{why}: plain torch, differentiated by autograd")
    return Plan("triton", "on CUDA: one pass forward (compiled: fused with its neighbours), one of its own back")


__all__ = ["Heads", "Turning", "plan", "reference", "turn", "turned"]
