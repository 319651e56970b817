"""Own kernels in bf16 over every pair of widths that differ in a tile, forward and backward, against fp64, on a GPU.

What a compiler makes of a kernel goes by the widths of its tiles, and by which of them are full: one pair says nothing of
another. The interpreter, which multiplies bf16 wrongly, has nothing to find here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.kernels.attention import BoundMask, Coords, Side, attend
from dovetail.kernels.attention import reference as attention_plain
from dovetail.kernels.delta_rule import delta_rule
from dovetail.kernels.delta_rule import reference as delta_plain
from dovetail.kernels.gated_linear import gated_linear
from dovetail.kernels.gated_linear import reference as gated_plain
from dovetail.kernels.linear_attention import linear_attention
from dovetail.kernels.linear_attention import reference as linear_plain
from dovetail.kernels.mixed_chunk import Heads, mixed_chunk
from dovetail.kernels.mixed_chunk import reference as mixed_plain
from dovetail.parts.mask import Causal, Window

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels as compiled for a GPU")
WIDTHS = (8, 9, 16, 24, 40, 64, 80, 128, 200, 256)
B, H, T = 1, 2, 150


def given(D: int, E: int) -> list[Tensor]:
    """q, k (of length one) and v in bf16."""
    q, k, v = (torch.randn(B, H, T, d, device="cuda") for d in (D, D, E))
    return [t.to(torch.bfloat16).requires_grad_() for t in (q / D**0.5, F.normalize(k, dim=-1), v)]


def agree(ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Outputs and gradients within what bf16 rounds by, a few times over, of the largest."""
    wide = [t.detach().double().requires_grad_() for t in inputs]
    out, right = ours(*inputs), plain(*wide)
    up = torch.randn_like(right)
    found = (out, *torch.autograd.grad(out, inputs, up.to(out.dtype)))
    for name, a, b in zip("oqkv", found, (right, *torch.autograd.grad(right, wide, up)), strict=True):
        worst, largest = (a.double() - b).abs().max().item(), b.abs().max().item()
        assert worst <= 0.04 * largest, f"{name}: {worst} of {largest}"


@pytest.mark.parametrize("E", WIDTHS)
@pytest.mark.parametrize("D", WIDTHS)
def test_delta_rule(D: int, E: int) -> None:
    beta, decay = torch.rand(B, H, T, device="cuda"), -0.1 * torch.rand(B, H, T, device="cuda")
    rates = beta.double(), decay.double()
    agree(
        lambda q, k, v: delta_rule(q, k, v, beta, log_decay=decay, scale=1.0)[0],
        lambda q, k, v: delta_plain.delta_rule(q, k, v, *rates, v.new_zeros(B, H, D, E), None)[0],
        given(D, E),
    )


@pytest.mark.parametrize("E", WIDTHS)
@pytest.mark.parametrize("D", WIDTHS)
def test_linear_attention(D: int, E: int) -> None:
    decay = -0.1 * torch.rand(B, H, T, device="cuda")
    agree(
        lambda q, k, v: linear_attention(q, k, v, causal=True, decay=decay)[0],
        lambda q, k, v: linear_plain.linear_attention(q, k, v, causal=True, decay=decay.double()),
        given(D, E),
    )


@pytest.mark.parametrize("E", WIDTHS)
@pytest.mark.parametrize("D", WIDTHS)
def test_gated_linear(D: int, E: int) -> None:
    decay = -0.1 * torch.rand(B, H, T, D, device="cuda")
    agree(
        lambda q, k, v: gated_linear(q, k, v, decay, scale=1.0)[0],
        lambda q, k, v: gated_plain.gated_linear(q, k, v, decay.double(), v.new_zeros(B, H, D, E), None)[0],
        given(D, E),
    )


@pytest.mark.parametrize("E", WIDTHS)
@pytest.mark.parametrize("D", WIDTHS)
def test_mixed_chunks(D: int, E: int) -> None:
    order, more = torch.arange(T, device="cuda")[None], {"chunk": 64, "causal": True, "scale": 1.0}

    def of(call: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda q, k, v: call(
            Heads(q[:, 0], k[:, 0], q[:, 1], k[:, 1]), v[:, 0], **more, order=order, plain=True
        )[0]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mixed_plain.mixed_chunk(q[:, 0], k[:, 0], q[:, 1], k[:, 1], v[:, 0], **more, order=order)

    agree(of(mixed_chunk), plain, given(D, E))


@pytest.mark.parametrize("E", [w for w in WIDTHS if w <= 128])
@pytest.mark.parametrize("D", [w for w in WIDTHS if w <= 128])
def test_attention_in_a_window(D: int, E: int) -> None:
    order = torch.arange(T, device="cuda")[None]
    mask = BoundMask(Causal() & Window(size=70), Coords(Side(order), Side(order)))
    agree(
        lambda q, k, v: attend(q, k, v, mask=mask, scale=D**0.5),
        lambda q, k, v: attention_plain.attend(q, k, v, mask, None, D**0.5)[0],
        given(D, E),
    )
