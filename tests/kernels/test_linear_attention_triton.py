"""The Triton kernel of causal linear attention against the plain twin in fp64: outputs, states and every gradient.

Without a GPU these run in Triton's interpreter, which multiplies bf16 wrongly, so that fp16 stands for narrow types.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.kernels import linear_attention as kernel
from dovetail.kernels.linear_attention import operator, reference, spans
from dovetail.kernels.linear_attention.chunked import Rows

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NARROW = torch.bfloat16 if GPU else torch.float16
runs = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
B = 2


@pytest.fixture(autouse=True)
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of two tiles, so that short rows have several; states of 16 columns, so that wide ones are split."""
    cut = lambda rows, tokens, widest, dtype: spans.Sizes(32, 16, 16, 4, 2)  # noqa: E731
    monkeypatch.setattr(operator, "sizes", cut)


def given(T: int, H: int, G: int, D: int, E: int, dtype: torch.dtype, positive: bool = False) -> list[Tensor]:
    """q, k, v as models have them: (B,T,heads,D) seen as (B,heads,T,D)."""
    found = [torch.randn(B, T, n, d, device=DEVICE) for n, d in ((H, D), (G, D), (G, E))]
    if positive:
        found[:2] = [t.exp() for t in found[:2]]
    return [t.to(dtype).transpose(1, 2).requires_grad_() for t in found]


def documents(sort: str, T: int) -> Tensor | None:
    """(B,T): none, padding anywhere but at first, or documents with padding between and inside them."""
    if sort == "plain":
        return None
    hidden = torch.rand(B, T) < 0.2
    hidden[:, 0] = False
    number = (torch.rand(B, T) < 0.1).long().cumsum(1) if sort == "packed" else torch.zeros(B, T).long()
    return torch.where(hidden, -1, number - number[:, :1]).to(DEVICE)


def compare(inputs: list[Tensor], segments: Tensor | None, least: float | None = None, **more: Any) -> None:
    """Output, last state and the gradients of both, with respect to q, k, v and the first state, in one."""
    q, k, v = inputs
    start, decay = more.get("start"), more.get("decay")
    known = [*inputs, *([] if start is None else [start])]
    out, end = operator.causal(q, k, v, decay, Rows.of(segments), start, least)
    assert out.dtype == q.dtype and end.dtype == torch.float32
    real = torch.ones(B, 1, q.shape[2], 1, device=DEVICE) if segments is None else (segments >= 0)[:, None, :, None]
    of_out, of_end = torch.randn(out.shape, device=DEVICE) * real, torch.randn_like(end)
    ours = torch.autograd.grad((out.float() * of_out).sum() + (end * of_end).sum(), known)

    wide = [t.detach().double().requires_grad_() for t in known]
    values = wide[2] if least is None else torch.cat([wide[2], torch.ones_like(wide[2][..., :1])], -1)
    first = wide[3] if start is not None else None
    also = {"causal": True, "segments": segments, "start": first}
    also["decay"] = None if decay is None else decay.double()
    plain, last = reference.linear_attention(wide[0], wide[1], values, **also), state(wide[1], values, **also)
    if least is not None:
        plain = plain[..., :-1] / plain[..., -1:].clamp_min(least)
    theirs = torch.autograd.grad((plain * real * of_out).sum() + (last * of_end).sum(), wide)

    tolerance = 8 * max(torch.finfo(q.dtype).eps, torch.finfo(torch.float32).eps)
    names = ("out", "end", "dq", "dk", "dv", "dstart")
    for name, a, b in zip(names, (out * real, end, *ours), (plain * real, last, *theirs), strict=False):
        worst, largest = float((a.double() - b).detach().abs().max()), float(b.detach().abs().max())
        assert worst <= tolerance * largest, f"{name}: {worst} of {largest}"


def state(
    k: Tensor, v: Tensor, segments: Tensor | None, decay: Tensor | None, start: Tensor | None, causal: bool
) -> Tensor:
    """The last state, read out of the twin: what queries of each feature alone would see after the last token."""
    D = k.shape[3]
    T, more = k.shape[2], lambda t, n: torch.cat([t, t.new_zeros(*t.shape[:2], D, n)], 2)
    if segments is not None:
        final = segments.clamp_min(0).cummax(1).values[:, -1:]
        segments = torch.cat([segments, final.expand(-1, D)], 1)
    if decay is not None:
        decay = torch.cat([decay, decay.new_zeros(*decay.shape[:2], D)], 2)
    unit = torch.eye(D, dtype=k.dtype, device=k.device).expand(*k.shape[:2], D, D)
    q = torch.cat([torch.zeros_like(k), unit], 2)
    known = {"causal": causal, "segments": segments, "decay": decay, "start": start}
    return reference.linear_attention(q, more(k, D), more(v, v.shape[3]), **known)[:, :, T:]


@runs
@pytest.mark.parametrize("least", [None, 1e-6], ids=["sums", "means"])
@pytest.mark.parametrize(
    ("dtype", "sort", "T", "H", "G", "D", "E", "decays", "goes_on"),
    [
        (NARROW, "plain", 64, 1, 1, 16, 16, False, False),
        (NARROW, "packed", 40, 2, 1, 12, 20, True, True),
        (NARROW, "plain", 40, 1, 1, 21, 9, False, False),  # rows of an odd number of entries
        (torch.float32, "packed", 70, 2, 1, 20, 12, True, True),
        (torch.float32, "padded", 40, 1, 1, 16, 24, False, True),
        (torch.float32, "plain", 5, 1, 1, 16, 1, False, False),
    ],
)
def test_kernel_equals_the_plain_twin(
    dtype: torch.dtype,
    sort: str,
    T: int,
    H: int,
    G: int,
    D: int,
    E: int,
    decays: bool,
    goes_on: bool,
    least: float | None,
) -> None:
    inputs = given(T, H, G, D, E, dtype, least is not None)
    decay = -torch.rand(B, G, T, device=DEVICE) if decays else None
    start = torch.rand(B, G, D, E + (least is not None), device=DEVICE).requires_grad_() if goes_on else None
    compare(inputs, documents(sort, T), least, decay=decay, start=start)


@runs
def test_one_decay_for_all_rows_and_heads_apart() -> None:
    decay = torch.log1p(-torch.tensor([0.2, 0.01], dtype=torch.float64, device=DEVICE))[None, :, None].expand(1, 2, 40)
    compare(given(40, 2, 2, 16, 16, torch.float32), documents("packed", 40), decay=decay)


@runs
def test_a_document_ends_at_a_span() -> None:
    """Documents that begin with spans and with tiles; the last row of padding alone behind its first token."""
    segments = torch.tensor([[0] * 32 + [1] * 16 + [2] * 32, [0] + [-1] * 79], device=DEVICE)
    start = torch.randn(B, 2, 16, 16, device=DEVICE).requires_grad_()
    compare(given(80, 2, 2, 16, 16, torch.float32), segments, start=start)


@runs
def test_nothing_of_the_future_and_of_other_documents() -> None:
    q, k, v = (t.detach() for t in given(48, 1, 1, 16, 16, torch.float32))
    segments = torch.arange(48, device=DEVICE).ge(40).long()[None].expand(B, -1)
    spoilt = k.clone()
    spoilt[:, :, 20:40] = torch.nan
    out, _ = operator.causal(q, spoilt, v, None, Rows.of(None), None)
    assert torch.equal(out[:, :, :16], operator.causal(q, k, v, None, Rows.of(None), None)[0][:, :, :16])
    mine, end = operator.causal(q, k * 1e30, v, None, Rows.of(torch.where(segments == 0, -1, segments)), None)
    plain = reference.linear_attention(q, k * 1e30, v, causal=True, segments=torch.where(segments == 0, -1, segments))
    torch.testing.assert_close(mine[:, :, 40:], plain[:, :, 40:], rtol=1e-5, atol=1e25)
    torch.testing.assert_close(end, (k[:, :, 40:] * 1e30).mT @ v[:, :, 40:], rtol=1e-5, atol=1e25)


@runs
def test_a_query_that_no_key_answers() -> None:
    q, k, v = given(20, 1, 1, 16, 16, torch.float32, True)
    out, _ = operator.causal(q, k * 0, v, None, Rows.of(None), None, 1e-6)
    assert (out == 0).all() and all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, v)))


@runs
def test_the_state_alone_has_gradients() -> None:
    q, k, v = given(40, 1, 1, 16, 16, torch.float32)
    _, end = operator.causal(q, k, v, None, Rows.of(None), None)
    weigh = torch.randn_like(end)
    ours = torch.autograd.grad((end * weigh).sum(), (q, k, v))
    for a, b in zip(ours, (torch.zeros_like(q), v @ weigh.mT, k @ weigh), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@runs
def test_compiled_is_the_same() -> None:
    inputs = given(40, 2, 1, 16, 16, torch.float32)
    segments = documents("packed", 40)

    def step(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        out, end = operator.causal(q, k, v, None, Rows.of(segments), None, None)
        return [out.transpose(1, 2).flatten(-2), end]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(*inputs), step(*inputs), strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
    both = [torch.autograd.grad(sum(t.square().sum() for t in f(*inputs)), inputs) for f in (compiled, step)]  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@runs
def test_the_operation_keeps_its_promises() -> None:
    """Shapes and strides under a compiler, and what is differentiated: torch's own check."""
    q, k, v = given(20, 2, 1, 16, 16, torch.float32)
    start = torch.randn(B, 1, 16, 16, device=DEVICE).requires_grad_()
    for more in ((start, None), (torch.zeros(B, 1, 16, 17, device=DEVICE), 1e-6)):
        torch.library.opcheck(
            operator._forward.op,
            (q, k, v, None, None, None, *more),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_plan_says_when() -> None:
    known = {"causal": True, "segments": False, "state": False, "device": "cuda"}
    pytest.importorskip("triton")
    assert kernel.plan(64, widest=256, **known).path == "triton"
    assert kernel.plan(64, widest=257, **known).path == "chunked"
    assert kernel.plan(64, widest=64, dtype=torch.float64, **known).path == "chunked"
    assert kernel.plan(64, widest=64, **known | {"causal": False}).path == "products"
    assert kernel.plan(1, widest=64, **known | {"state": True}).path == "recurrent"


def test_sizes_keep_a_gpu_busy() -> None:
    for rows, tokens in ((512, 2048), (128, 8192), (32, 32768), (16, 131072)):
        cut = spans.sizes(rows, tokens, 128, torch.bfloat16)
        assert rows * -(-tokens // cut.span) >= spans.BUSY and cut.span % cut.tile == 0
    assert spans.sizes(8, 1000, 128, torch.bfloat16).span == 256


@runs
def test_a_mask_that_lies_token_by_token() -> None:
    """Kernels read documents row by row, however they are given."""
    inputs, segments = given(70, 2, 1, 16, 16, torch.float32), documents("packed", 70)
    assert segments is not None
    compare(inputs, segments.t().contiguous().t())
