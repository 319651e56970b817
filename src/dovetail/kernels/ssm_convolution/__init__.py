"""Long causal convolutions, and the kernels of state spaces that they run with.

x (B,T,D) and one kernel a channel (D,T) -> y (B,T,D), y_t = Σ_{s <= t} kernel_{t-s} x_s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.kernels import twins
from dovetail.kernels.plan import Plan
from dovetail.kernels.ssm_convolution import products, reference
from dovetail.kernels.ssm_convolution.krylov import dense_kernel
from dovetail.kernels.ssm_convolution.vandermonde import diagonal_kernel

# Tokens up to which products are taken. They cost T multiplications and additions a token, channel and row, transforms
# about a hundred bytes read and written whatever T is: at fp32 rates (40 TFLOP/s, 3.5 TB/s) equal near T = 1,100 on CUDA,
# a guess that has not been measured. On CPU measured: see docs/performance-log.md.
PRODUCTS = {"cuda": 1024, "cpu": 128}


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """y (B,T,D), in the dtype of x, which must be fp32 or wider."""
    path = plan(x.shape[1], x.device.type).path
    if path == "reference":
        return reference.convolve(x, kernel)
    return products.convolve(x, kernel) if path == "products" else transforms(x, kernel)


def transforms(x: Tensor, kernel: Tensor) -> Tensor:
    """As `convolve`, by Fourier. They mix all times: what a row takes from its future is not 0 but its rounding."""
    T = x.shape[1]
    n = 2 * T  # zeros behind, so that the end does not come round to the beginning
    product = torch.fft.rfft(x, n=n, dim=1) * torch.fft.rfft(kernel, n=n, dim=1).transpose(0, 1)
    return torch.fft.irfft(product, n=n, dim=1)[:, :T]


def plan(length: int, device: str) -> Plan:
    """The path of a convolution over `length` tokens, and why."""
    if twins.asked():
        return Plan("reference", twins.WHY)
    most = PRODUCTS.get(device, PRODUCTS["cpu"])
    if length <= most:
        return Plan("products", f"rows of at most {most} tokens: Toeplitz matrices by blocks, exactly causal")
    return Plan("fft", "O(T log T) by fast Fourier transforms, fp32")


__all__ = ["convolve", "dense_kernel", "diagonal_kernel", "plan", "products", "reference", "transforms"]
