"""The gate of a gated feed-forward: act(gate) · up of what one product has made of both.

On CUDA it has a backward of its own, which reads gate, up and the gradient once and writes the gradient of both side by
side, as the products with it want them. (Compilers make that one tensor entry by entry, from either half, and take the
exponential of each gate twice.) It keeps nothing but what it was given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.errors import DataError
from dovetail.kernels import twins
from dovetail.kernels.chunks import autocasts
from dovetail.kernels.counted import device_type
from dovetail.kernels.gate import reference
from dovetail.kernels.installed import TRITON
from dovetail.kernels.linear import fp8, linear
from dovetail.kernels.plan import Plan

ACTIVATIONS = tuple(reference.FORMULAS)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gated(both: Tensor, activation: str) -> Tensor:
    """act(gate) · up (..., h) in the type of both = gate|up (..., 2h); Shazeer 2020, eq. 5-6.

    activation: one of ACTIVATIONS, by the names of the parts. On CUDA both passes compute in fp32 and round what they
    write once; gradients can be taken once there (a second derivative is refused). Elsewhere it is plain torch.

    Raises DataError for an odd width and for an activation that is not known.
    """
    if both.shape[-1] % 2 or activation not in ACTIVATIONS:
        raise DataError(
            f"a gate {activation!r} of width {both.shape[-1]}",
            where="gated",
            remedy=f"give gate and up side by side, of one width, and one of {', '.join(ACTIVATIONS)}",
        )
    if _path(both, activation) == "plain":
        return reference.gated(both, activation)
    from dovetail.kernels.gate import operator

    return operator.gated(both, activation)


def projected(both: Tensor, activation: str, weight: Tensor, in_fp8: bool = False) -> Tensor:
    """gated(both) Wᵀ (..., O) with W (O,h), as autocast would have it. On CUDA the output of the gate is not kept for the
    backward, which writes it once more beside the gradient of both: h numbers a token less. in_fp8: products by
    `linear.fp8`, where gradients are taken.

    Raises DataError as `gated` does.
    """
    in_fp8 = in_fp8 and torch.is_grad_enabled() and not twins.asked()
    if torch.is_grad_enabled() and weight.requires_grad and _path(both, activation) == "triton":
        from dovetail.kernels.gate import operator

        if autocasts(both) and not in_fp8:
            both, weight = (t.to(torch.get_autocast_dtype(both.device.type)) for t in (both, weight))
        return operator.projected(both, activation, weight, in_fp8)
    out = gated(both, activation)
    return fp8.linear(out, weight) if in_fp8 else linear(out, weight)


def plan(activation: str | None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Plan:
    """The path and why. activation: None for one that is more than its name, with parameters or weights."""
    if twins.asked():
        return Plan("plain", twins.WHY)
    if device != "cuda":
        return Plan("plain", "not on CUDA: plain torch, differentiated by autograd")
    if activation not in ACTIVATIONS:
        return Plan("plain", f"the kernels know {', '.join(ACTIVATIONS)}: plain torch, which a compiler fuses")
    if not TRITON or dtype not in _DTYPES:
        return Plan("plain", "Triton is not installed: plain torch" if not TRITON else f"{dtype}: plain torch")
    return Plan("triton", "on CUDA: one pass forward (compiled: fused with its neighbours), one of its own back")


def _path(both: Tensor, activation: str) -> str:
    return plan(activation, device_type(both), both.dtype).path


__all__ = ["ACTIVATIONS", "gated", "plan", "projected", "reference"]
