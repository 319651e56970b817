"""The Triton kernels of mixed chunk attention against the plain twin in fp64: outputs and every gradient.

Without a GPU these run in Triton's interpreter (see tests/conftest.py).
It multiplies bf16 wrongly, so that fp16 stands for narrow types there.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.kernels import mixed_chunk as kernel
from dovetail.kernels.mixed_chunk import Heads, reference
from dovetail.kernels.plan import Plan
from dovetail.parts.context import Context

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
NARROW = torch.bfloat16 if GPU else torch.float16
runs = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="interpreted where there is no GPU"
)
SCALE = 0.7


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 and 16 tokens, so that chunks have several; slices of 16 values; short spans, so that rows have several."""
    if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
        return
    from dovetail.kernels.mixed_chunk import triton

    tiles = triton.Tiles(32, 16, 16, 4, 2)
    monkeypatch.setattr(triton, "TILES", dict.fromkeys(triton.TILES, tiles))
    monkeypatch.setattr(triton, "DEPTH", 16)
    monkeypatch.setattr(triton, "CUT", 16)


def given(B: int, T: int, D: int, E: int, dtype: torch.dtype) -> tuple[Heads, Tensor]:
    """As the mixer has them: views of two that are stacked, and values beside others."""
    q, k = (torch.randn(B, T, 2, D, device=DEVICE).to(dtype) for _ in range(2))
    v = torch.randn(B, T, 2 * E, device=DEVICE).to(dtype)[..., :E]
    views = (q[:, :, 0], k[:, :, 0], q[:, :, 1], k[:, :, 1])
    return Heads(*(t.requires_grad_() for t in views)), v.requires_grad_()


def context(sort: str, T: int) -> Context:
    """A whole row; two rows padded on the left; or documents of any length, with padding between and inside them."""
    if sort == "plain":
        return Context.of(1, T, DEVICE)
    if sort == "padded":
        hidden = torch.arange(T, device=DEVICE) < torch.tensor([[T // 2], [3]], device=DEVICE)
        return Context.of(2, T, DEVICE, attention_mask=~hidden)
    hidden, number = torch.rand(2, T, device=DEVICE) < 0.2, (torch.rand(2, T, device=DEVICE) < 0.06).long().cumsum(1)
    return Context.of(2, T, DEVICE, segments=number, attention_mask=~hidden)


def ours(heads: Heads, v: Tensor, ctx: Context, chunk: int, causal: bool) -> Tensor:
    from dovetail.kernels.mixed_chunk import triton

    return triton.mixed_chunk(heads, v, chunk, causal, SCALE, ctx.order, ctx.segments, ctx.aligned, v.dtype)


@runs
@pytest.mark.parametrize(
    ("dtype", "sort", "T", "chunk", "D", "E", "causal"),
    [
        (NARROW, "plain", 32, 16, 16, 32, True),  # whole tiles
        (NARROW, "plain", 40, 32, 16, 16, False),
        (torch.float32, "plain", 97, 48, 12, 20, True),  # a tail; tiles that cut neither the chunk nor the values
        (torch.float32, "plain", 40, 10, 16, 16, True),  # chunks that no tile divides lie across spans
        (torch.float32, "plain", 30, 20, 20, 16, False),
        (torch.float32, "plain", 9, 64, 16, 5, True),  # shorter than a chunk
        (torch.float32, "packed", 48, 16, 20, 12, True),
        (NARROW, "padded", 72, 20, 16, 16, True),
        (NARROW, "plain", 40, 16, 21, 9, True),  # rows of an odd number of entries
    ],
)
def test_kernels_equal_the_plain_twin(
    dtype: torch.dtype, sort: str, T: int, chunk: int, D: int, E: int, causal: bool
) -> None:
    B, ctx = 1 if sort == "plain" else 2, context(sort, T)
    heads, v = given(B, T, D, E, dtype)
    out = ours(heads, v, ctx, chunk, causal)
    assert out.dtype == dtype and out.shape == v.shape
    real = 1 if ctx.segments is None else (ctx.segments >= 0)[..., None]
    up = torch.randn(out.shape, device=DEVICE) * real
    found = (out * real, *torch.autograd.grad((out.float() * up).sum(), [*heads, v]))
    wide = [t.detach().double().requires_grad_() for t in (*heads, v)]
    plain = reference.mixed_chunk(
        *wide, chunk=chunk, causal=causal, scale=SCALE, order=ctx.order.expand(B, T), segments=ctx.segments
    )
    expected = (plain * real, *torch.autograd.grad((plain * up).sum(), wide))
    tolerance = 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    for name, a, b in zip(("out", "dq", "dk", "dq'", "dk'", "dv"), found, expected, strict=True):
        worst, largest = float((a.double() - b).detach().abs().max()), float(b.detach().abs().max())
        assert worst <= tolerance * largest, f"{name}: {worst} of {largest}"


@runs
def test_padding_is_never_read() -> None:
    """Nor are other documents: what is in them changes nothing."""
    heads, v = given(2, 40, 16, 16, torch.float32)
    segments = torch.tensor([[0] * 20 + [-1] * 3 + [1] * 17, [-1] * 23 + [1] * 17], device=DEVICE)
    ctx = Context.of(2, 40, DEVICE, segments=segments)
    out = ours(heads, v, ctx, 16, True).detach()
    spoilt = [torch.cat([t[:, :23] * 1e6, t[:, 23:]], 1).detach() for t in (*heads, v)]
    again = ours(Heads(*spoilt[:4]), spoilt[4], ctx, 16, True)
    assert torch.equal(again[:, 23:], out[:, 23:])


@runs
def test_a_mask_that_lies_token_by_token() -> None:
    heads, v = given(2, 40, 16, 16, torch.float32)
    ctx = context("packed", 40)
    assert ctx.segments is not None
    turned = Context.of(2, 40, DEVICE, segments=ctx.segments.t().contiguous().t())
    assert turned.segments is not None and turned.segments.stride(0) == 1
    assert torch.equal(ours(heads, v, turned, 16, True), ours(heads, v, ctx, 16, True))


@runs
def test_compiled_is_the_same() -> None:
    heads, v = given(2, 12, 16, 16, torch.float32)
    ctx = context("packed", 12)

    def step(*inputs: Tensor) -> Tensor:
        return ours(Heads(*inputs[:4]), inputs[4], ctx, 16, True).square()

    compiled, inputs = torch.compile(step, fullgraph=True, backend="aot_eager"), (*heads, v)
    both = [(y := f(*inputs), *torch.autograd.grad(y.sum(), inputs)) for f in (compiled, step)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@runs
def test_the_operation_keeps_its_promises() -> None:
    """Shapes and strides under a compiler, and what is differentiated: torch's own check."""
    from dovetail.kernels.mixed_chunk import triton

    heads, v = given(1, 20, 16, 16, torch.float32)
    torch.library.opcheck(
        triton._run.op,
        (*heads, v, None, None, None, 16, True, SCALE),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_plan_says_when() -> None:
    pytest.importorskip("triton")

    def chosen(tokens: int = 64, causal: bool = True, segments: bool = False, state: bool = False, **more: Any) -> Plan:
        known = {"device": "cuda", "width": 128} | more
        return kernel.plan(tokens, chunk=256, causal=causal, segments=segments, state=state, **known)

    assert chosen().path == chosen(causal=False).path == chosen(segments=True).path == "triton"
    assert chosen(state=True).path == "triton"  # a prompt
    assert chosen(tokens=1, state=True).path == "recurrent"
    refused: list[tuple[dict[str, Any], str]] = [
        ({"dropout": True}, "dropout"),
        ({"segments": True, "causal": False}, "documents both ways"),
        ({"segments": True, "state": True}, "go on"),
        ({"width": 257}, ""),
        ({"dtype": torch.float64}, ""),
        ({"device": "cpu"}, ""),
    ]
    for more, why in refused:
        found = chosen(**more)
        assert found.path == "chunked" and why in found.why
