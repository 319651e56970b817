"""Mixed chunk attention in tiles, by cuts and step by step against its plain twin, gradients too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dovetail.kernels import mixed_chunk as kernel
from dovetail.kernels.mixed_chunk import Heads, Past, mixed_chunk, reference
from dovetail.parts.context import Context

CPU = torch.device("cpu")
B, D, E, CHUNK, SCALE = 2, 3, 5, 4, 0.7


def given(T: int, rows: int = B, dtype: torch.dtype = torch.float64) -> tuple[Heads, Tensor]:
    made = [torch.randn(rows, T, n).to(dtype).requires_grad_() for n in (D, D, D, D, E)]
    return Heads(*made[:4]), made[4]


def context(sort: str, T: int) -> Context:
    """Whole rows, rows with padding anywhere, or documents of any length with padding between and inside them."""
    hidden = torch.rand(B, T) < 0.25
    if sort == "padded":
        return Context.of(B, T, CPU, attention_mask=~hidden)
    if sort == "packed":
        number = (torch.rand(B, T) < 0.15).long().cumsum(1)
        return Context.of(B, T, CPU, segments=number, attention_mask=~hidden)
    return Context.of(B, T, CPU)


def same(ours: Tensor, plain: Tensor, inputs: list[Tensor], real: Tensor | int = 1, tolerance: float = 1e-11) -> None:
    """Equal outputs at real tokens, and equal gradients of one weighted sum of those."""
    weights = torch.randn_like(plain) * real
    close(ours * real, plain * real, tolerance)
    both = (torch.autograd.grad((y * weights).sum(), inputs, materialize_grads=True) for y in (ours, plain))
    for a, b in zip(*both, strict=True):
        close(a, b, tolerance)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    worst, largest = float((a - b).detach().abs().max()), float(b.detach().abs().max())
    assert worst <= tolerance * max(1.0, largest), worst


@pytest.mark.parametrize("sort", ["plain", "padded", "packed"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("T", [1, 3, 4, 5, 17, 40])
def test_tiles_equal_the_plain_twin(T: int, causal: bool, sort: str) -> None:
    heads, v = given(T)
    ctx = context(sort, T)
    known = {"chunk": CHUNK, "causal": causal, "scale": SCALE, "order": ctx.order, "segments": ctx.segments}
    ours, past = mixed_chunk(heads, v, **known, plain=ctx.aligned)
    assert past is None
    real = 1 if ctx.segments is None else (ctx.segments >= 0)[..., None]
    same(ours, reference.mixed_chunk(*heads, v, **known), [*heads, v], real)
    if ctx.aligned:  # the general path gives what the plain one does
        close(mixed_chunk(heads, v, **known)[0], ours)


def test_interleaved_documents_see_both_ways() -> None:
    heads, v = given(20)
    segments = torch.arange(20).remainder(3)[None].expand(B, -1)
    order = (torch.arange(20) // 3)[None].expand(B, -1)
    known = {"chunk": CHUNK, "causal": False, "scale": SCALE, "order": order, "segments": segments}
    same(mixed_chunk(heads, v, **known)[0], reference.mixed_chunk(*heads, v, **known), [*heads, v])


@pytest.mark.parametrize(
    "cuts", [[1] * 22, [22], [3, 1, 4, 14], [4, 4, 1, 13], [9, 1, 1, 1, 10], [11, 11]], ids=lambda c: f"{len(c)} cuts"
)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@torch.no_grad()
def test_any_cut_goes_on(cuts: list[int], padded: bool) -> None:
    """Rows go on from what was kept, whatever is padding among what comes: real tokens give what they give alone."""
    heads, v = given(sum(cuts))
    mask = torch.rand(B, sum(cuts)) > 0.3 if padded else torch.ones(B, sum(cuts), dtype=torch.bool)
    if padded:
        mask[0, :7], mask[1, 5:9] = False, False
    past = Past(
        torch.zeros(B, D, E).double(), torch.zeros(B, D, E).double(), v.new_zeros(B, CHUNK, D), v.new_zeros(B, CHUNK, E)
    )
    length, start, out = torch.zeros(B, dtype=torch.long), 0, []
    for n in cuts:
        some = mask[:, start : start + n]
        ctx = Context.of(B, n, CPU, attention_mask=some if padded else None, start=length)
        part = Heads(*(t[:, start : start + n] for t in heads))
        y, after = mixed_chunk(
            part, v[:, start : start + n], chunk=CHUNK, causal=True, scale=SCALE, order=ctx.order,
            segments=ctx.segments, past=past,
        )  # fmt: skip
        assert after is not None and [t.shape for t in after] == [t.shape for t in past]
        past, start, length = after, start + n, length + some.sum(1)
        out.append(y)
    for b in range(B):
        alone = [t[b : b + 1, mask[b]] for t in (*heads, v)]
        n = alone[0].shape[1]
        plain = reference.mixed_chunk(*alone, chunk=CHUNK, causal=True, scale=SCALE, order=torch.arange(n)[None])
        close(torch.cat(out, 1)[b, mask[b]], plain[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sort", ["plain", "packed"])
def test_low_precision(dtype: torch.dtype, sort: str) -> None:
    heads, v = given(40, dtype=dtype)
    ctx = context(sort, 40)
    known = {"chunk": CHUNK, "causal": True, "scale": SCALE, "order": ctx.order, "segments": ctx.segments}
    ours = mixed_chunk(heads, v, **known, plain=ctx.aligned)[0]
    assert ours.dtype == torch.float32
    real = 1 if ctx.segments is None else (ctx.segments >= 0)[..., None]
    exact = reference.mixed_chunk(*(t.double() for t in heads), v.double(), **known)
    close(ours * real, exact * real, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("sort", ["plain", "packed"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
def test_under_autocast(causal: bool, sort: str) -> None:
    """Products in bf16, sums over chunks in fp32: forward and backward."""
    heads, v = given(40, dtype=torch.float32)
    ctx = context(sort, 40)
    known = {"chunk": CHUNK, "causal": causal, "scale": SCALE, "order": ctx.order, "segments": ctx.segments}
    real = 1 if ctx.segments is None else (ctx.segments >= 0)[..., None]
    exact = reference.mixed_chunk(*heads, v, **known) * real
    with torch.autocast("cpu", torch.bfloat16):
        ours = mixed_chunk(heads, v.to(torch.bfloat16), **known, plain=ctx.aligned)[0] * real
    close(ours, exact, 3e-2)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), [*heads, v]) for y in (ours, exact)), strict=True):
        close(a, b, 6e-2)


@pytest.mark.parametrize("sort", ["plain", "packed"])
def test_memory_is_linear(sort: str) -> None:
    """What is kept for the backward grows with the tokens, not with their square (of the number of chunks, little)."""
    kept, chunk = [], 16
    for T in (64, 256):
        heads, v = given(T)
        ctx = context(sort, T)
        saved: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.update({t.data_ptr(): t.numel()}), t)[1], lambda t: t
        ):
            mixed_chunk(
                heads, v, chunk=chunk, causal=True, scale=SCALE, order=ctx.order, segments=ctx.segments,
                plain=ctx.aligned,
            )  # fmt: skip
        kept.append(max(saved.values()))
    assert kept[1] <= 4.5 * kept[0]


def test_plans() -> None:
    assert kernel.plan(1, chunk=4, causal=True, segments=False, state=True).path == "recurrent"
    assert "neighbours" in kernel.plan(9, chunk=4, causal=True, segments=True, state=False).why
    assert "one matrix" in kernel.plan(9, chunk=4, causal=False, segments=False, state=False).why
