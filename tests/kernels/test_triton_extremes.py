"""Triton kernels where numbers get large, or there is nothing: addresses beyond 2^31 entries, grids beyond 65,535 programs
an axis, windows near int32's end, steep decays, no rows and no tokens.

Memory is asked for and hardly touched, which takes none; without a GPU kernels run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.kernels import linear_attention
from dovetail.kernels.attention.coords import Span
from dovetail.kernels.linear_attention import spans
from dovetail.kernels.linear_attention.chunked import Rows

pytest.importorskip("triton")
from dovetail.kernels.attention.triton import content, launch, operator, sizes, split_keys, two_forms
from dovetail.kernels.delta_rule import triton as delta
from dovetail.kernels.gated_linear import triton as gated
from dovetail.kernels.linear_attention import operator as linear
from dovetail.kernels.quantise import triton as packed
from dovetail.kernels.quantise import triton_linear
from dovetail.kernels.ssm_scan import triton as scan

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
MANY = 2**31 - 1
Shape = tuple[int, ...]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short rows have several of them, and several spans."""
    monkeypatch.setattr(sizes, "tiles", lambda *_: sizes.Tiles(16, 16, 4, 2))
    monkeypatch.setattr(linear, "sizes", lambda *_: spans.Sizes(32, 16, 16, 4, 2))
    tile = split_keys.Tiles(64, 16, 4, 2, 2)
    monkeypatch.setattr(split_keys, "NARROW", {64: tile})


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def far(x: Tensor, *strides: int) -> Tensor:
    """x with its entries that far apart."""
    length = 1 + sum((n - 1) * step for n, step in zip(x.shape, strides, strict=True))
    try:
        memory = torch.empty(length, dtype=x.dtype, device=x.device)
    except RuntimeError:
        pytest.skip(f"{length * x.element_size() >> 30} GiB cannot be asked for")
    return memory.as_strided(x.shape, strides).copy_(x)


def gradients(outs: list[Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    up = [torch.linspace(-1, 1, t.numel(), device=DEVICE).view(t.shape).to(t.dtype) for t in outs]
    return torch.autograd.grad(outs, leaves, up)


# Addresses


def test_vectors_and_rows_of_a_product_far_apart() -> None:
    """17 vectors, the last of which begins at 2^31, and of its output too."""
    apart, width, rows = 2**27, 32, 32
    x, codes = (
        random(17, width, dtype=torch.float16),
        torch.randint(-9, 9, (rows, width), dtype=torch.int8, device=DEVICE),
    )
    spread, out = far(x, apart, 1), far(random(17, rows, dtype=torch.float16), apart, 1)
    scale = torch.ones(rows, 1, device=DEVICE)
    triton_linear._product_kernel[(1, 1)](
        spread, codes, scale, None, None, None, out, 17, apart, width, width, apart, width, 1, 1.0,
        32, 32, rows, 32, False, True, 1, num_warps=4,
    )  # type: ignore[arg-type]  # fmt: skip
    torch.testing.assert_close(out[:, :rows], x @ codes.half().T, rtol=2e-3, atol=2e-3)


def test_as_many_codes_as_a_number_of_32_bits_counts() -> None:
    """The last weight of 2^30 bytes is the 2^31st; one program writes its own."""
    codes, levels = torch.randint(0, 256, (1024,), dtype=torch.uint8, device=DEVICE), random(16)
    out = torch.zeros(2048, device=DEVICE)
    packed._packed[(1,)](codes, torch.ones(32, device=DEVICE), levels, out, 2**30, 32, 1024)  # type: ignore[arg-type]
    assert torch.equal(out, levels[torch.stack([codes >> 4, codes & 15], 1).flatten().long()])


@pytest.mark.parametrize("strides", [(1, 2**30, 16, 1), (1, 16, 9 * 2**24, 1)], ids=["heads", "tokens"])
def test_linear_attention_whose_heads_or_tokens_lie_far_apart(strides: Shape) -> None:
    """Queries of three heads that share keys, as gradients add them up; of 16 tokens at a time."""
    T = 33 if strides[1] > strides[2] else 16
    q, k, v = (random(1, heads, T, 16, dtype=torch.float16).requires_grad_() for heads in (3, 1, 1))
    spread = far(q.detach(), *strides).requires_grad_()
    found = []
    for x in (spread, q):
        outs = linear.causal(x, k, v, None, Rows.of(None), None)
        found.append([*outs, *gradients(list(outs), [x, k, v])])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("which", ["heads of queries", "keys", "values"])
def test_few_queries_whose_heads_or_keys_lie_far_apart(which: str) -> None:
    q, k, v = (random(1, heads, n, 16, dtype=torch.float16) for heads, n in ((3, 1), (1, 16), (1, 16)))
    given = [q, k, v]
    at = ["heads of queries", "keys", "values"].index(which)
    given[at] = far(given[at], 1, *((2**30, 1) if at == 0 else (1, 9 * 2**24)), 1)
    ours, theirs = (split_keys.forward(*x, None, None, Span(), 0.3)[0] for x in (given, (q, k, v)))
    assert torch.equal(ours, theirs)


# Grids


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Shape]]:
    """Every kernel that would have run, and on which grid; none runs."""
    if GPU:
        pytest.skip("of the interpreter")
    from triton.runtime.interpreter import InterpretedFunction

    found: list[tuple[str, Shape]] = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *_, grid, **__: found.append((self.fn.__name__, grid)))
    return found


def empty(*shape: int) -> Tensor:
    return torch.empty(shape)


def _linear(rows: int, T: int) -> None:
    q, k, v = (empty(rows, 1, T, 1).requires_grad_() for _ in range(3))
    outs = linear.causal(q, k, v, None, Rows.of(None), None, 1e-6)
    torch.autograd.grad(outs, [q, k, v], [t.detach() for t in outs])


def _delta(rows: int, T: int) -> None:
    q, k, v, start = *(empty(rows, 1, T, 1) for _ in range(3)), empty(rows, 1, 1, 1)
    beta = empty(rows, 1, T)
    out, end, *kept = delta._forward(q, k, v, beta, None, start, None, 1.0)
    if T == 16:  # of long rows sums would take much memory
        delta._backward(out, end, q, k, v, beta, None, start, None, *kept, 1.0)


def _gated(rows: int, T: int) -> None:
    q, k, v, g = (empty(rows, 1, T, 1) for _ in range(4))
    out, end = gated._run(q, k, v, g, None, None, 1.0)
    gated._run_backward(q, k, v, g, None, None, 1.0, out, end)


def _scan(rows: int, T: int) -> None:
    x, dt, a, b, c, start = (
        empty(*n) for n in ((rows, T, 1), (rows, T, 1), (1, 1), (rows, T, 1), (rows, T, 1), (rows, 1, 1))
    )
    given = [t.requires_grad_() for t in (x, dt, a, b, c, start)]
    outs = scan.selective_scan(*given, None)
    torch.autograd.grad(outs, given, outs)


def _attention(rows: int, T: int) -> None:
    q, places = empty(rows, 1, T, 16), torch.empty(rows, 2, T, dtype=torch.int32)
    launch.forward(q, q, q, None, (places, places), Span(), 1.0)


@pytest.mark.parametrize(
    ("run", "rows", "T"),
    [(_linear, 66_000, 33), (_delta, 66_000, 16), (_delta, 1, 64 * 66_000), (_gated, 1, 32 * 66_000), (_scan, 66_000, 2), (_attention, 66_000, 16)],
    ids=["linear", "delta", "delta long", "gated long", "scan", "attention"],
)  # fmt: skip
def test_grids_of_many_rows_or_chunks_are_long_in_their_first_axis(
    run: Callable[[int, int], None], rows: int, T: int, launches: list[tuple[str, Shape]]
) -> None:
    run(rows, T)
    assert launches
    for name, grid in launches:
        assert max(grid[1:], default=1) <= 65_535, (name, grid)


def test_many_rows_are_scanned_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ((3, 5, 2), (3, 5, 2), (2, 4), (3, 5, 4), (3, 5, 4), (3, 2, 4))
    given = [random(*n).abs() * sign for n, sign in zip(sizes, (1, 1, -1, 1, 1, 1), strict=True)]
    given, first = [t.requires_grad_() for t in given], torch.rand(3, 5, device=DEVICE) < 0.2
    found = []
    for at_a_time in (65_535, 2):
        monkeypatch.setattr(scan, "ROWS", at_a_time)
        outs = list(scan.selective_scan(*given, first))
        found.append([*outs, *gradients(outs, given)])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts)


# Windows


@pytest.mark.parametrize("placed", [False, True], ids=["aligned", "placed"])
@pytest.mark.parametrize(
    ("span", "same"),
    [
        (Span(MANY, MANY), Span()),
        (Span(MANY, 0), Span(None, 0)),
        (Span(3, 0, MANY), Span(None, 0)),
        (Span(None, -MANY), Span(None, -100)),
        (Span(-MANY, None), Span(-100, None)),
    ],
    ids=["both", "behind", "sinks", "nothing behind", "nothing ahead"],
)
def test_a_window_near_the_end_of_int32_hides_what_none_does(span: Span, same: Span, placed: bool) -> None:
    q, k, v = (random(1, 2, 40, 16).requires_grad_() for _ in range(3))
    line = torch.stack([torch.arange(40), torch.arange(40) // 25])[None].int().to(DEVICE)
    places = (line, line) if placed else None
    found = []
    for asked in (span, same):
        out, lse = operator.attend(q, k, v, None, asked, 0.3, places)
        found.append([out, lse, *gradients([out], [q, k, v])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_windows_of_two_forms_near_the_end_of_int32() -> None:
    given = [random(1, 2, 40, 16) for _ in range(5)]
    ours, theirs = (
        two_forms.attend(*given, (Span(4, 0), far), 0.3, None)[0] for far in (Span(MANY, -5), Span(None, -5))
    )
    torch.testing.assert_close(ours, theirs)


# Nothing


def compare_states(outs: list[Tensor], leaves: list[Tensor], start: Tensor | None) -> None:
    """No tokens or no rows: the last state is the first, and its gradient that of the first; all others are empty."""
    out, end = outs
    assert not out.numel()
    assert torch.equal(end, torch.zeros_like(end) if start is None else start.detach())
    up = torch.randn_like(end)
    known = leaves if start is None else [*leaves, start]
    found = torch.autograd.grad([out, end], known, [torch.zeros_like(out), up])
    assert [g.shape for g in found] == [t.shape for t in known]
    for g in found[: len(leaves)]:
        assert not g.any()
    if start is not None:
        assert torch.equal(found[-1], up)


nothing = pytest.mark.parametrize(("B", "T"), [(0, 20), (2, 0)], ids=["no rows", "no tokens"])
started = pytest.mark.parametrize("begins", [False, True], ids=["from zero", "from a state"])


@nothing
@started
@pytest.mark.parametrize("least", [None, 1e-6], ids=["sums", "means"])
def test_linear_attention_of_nothing(B: int, T: int, begins: bool, least: float | None) -> None:
    q, k, v = (random(B, n, T, 16).requires_grad_() for n in (2, 1, 1))
    start = random(B, 1, 16, 16 + (least is not None)).requires_grad_() if begins else None
    decay = -torch.rand(1, 1, T, device=DEVICE)
    compare_states(list(linear.causal(q, k, v, decay, Rows.of(None), start, least)), [q, k, v], start)


@nothing
@started
def test_gated_linear_attention_of_nothing(B: int, T: int, begins: bool) -> None:
    q, k, v, g = (random(B, 2, T, 16).requires_grad_() for _ in range(4))
    start = random(B, 2, 16, 16).requires_grad_() if begins else None
    reset = torch.ones(B, T, dtype=torch.bool, device=DEVICE)
    compare_states(list(gated.gated_linear(q, k, v, g, start, reset, 1.0)), [q, k, v, g], start)


@nothing
@started
def test_the_delta_rule_of_nothing(B: int, T: int, begins: bool) -> None:
    q, k, v = (random(B, 2, T, 16).requires_grad_() for _ in range(3))
    beta, decay = (random(B, 2, T).requires_grad_() for _ in range(2))
    start = random(B, 2, 16, 16).requires_grad_() if begins else None
    compare_states(list(delta.delta_rule(q, k, v, beta, decay, start, None, 1.0)), [q, k, v, beta, decay], start)


@nothing
def test_a_scan_of_nothing(B: int, T: int) -> None:
    leaves = [random(*n).requires_grad_() for n in ((B, T, 3), (B, T, 3), (3, 4), (B, T, 4), (B, T, 4))]
    start = random(B, 3, 4).requires_grad_()
    first = torch.ones(B, T, dtype=torch.bool, device=DEVICE)
    compare_states(list(scan.selective_scan(*leaves, start, first)), leaves, start)
    y, _ = scan.selective_scan(*leaves, start, first)  # and where nothing comes from the last state
    for g, t in zip(torch.autograd.grad(y.sum(), [*leaves, start]), [*leaves, start], strict=True):
        assert g.shape == t.shape and not g.any()


@pytest.mark.parametrize(("B", "T", "S"), [(0, 20, 20), (2, 0, 20), (2, 20, 0)], ids=["rows", "queries", "keys"])
@pytest.mark.parametrize("kind", ["plain", "table", "rows"])
def test_attention_of_nothing(B: int, T: int, S: int, kind: str) -> None:
    """Queries that see no key give zero, as where a mask hides all."""
    q, k, v = (random(B, heads, n, 16).requires_grad_() for heads, n in ((4, T), (2, S), (2, S)))
    more: list[Tensor] = []
    if kind == "rows":
        more = [random(B, 4, n, 9).requires_grad_() for n in (T, S)]
        out, lse = content.attend(q, k, v, *more, 4, False, Span(None, 0), 0.3)
    else:
        more = [random(4, 9).requires_grad_()] if kind == "table" else []
        out, lse = operator.attend(q, k, v, more[0] if more else None, Span(None, 0), 0.3)
    assert out.shape == (B, 4, T, 16) and lse.shape == (B, 4, T)
    assert not out.any() and (lse == -torch.inf).all()
    leaves = [q, k, v, *more]
    for g, t in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
        assert g.shape == t.shape and g.dtype == t.dtype and not g.any()


def test_two_forms_of_nothing() -> None:
    q, k, v = random(2, 4, 0, 16), random(2, 2, 0, 16), random(2, 2, 0, 16)
    spans = (Span(4, 0), Span(None, -5))
    out, lse = two_forms.attend(q, k, q, k, v, spans, 0.3, None)
    found = two_forms.backward(out, q, k, q, k, v, out, lse, spans, 0.3, None)
    assert [g.shape for g in found] == [t.shape for t in (q, k, q, k, v)]


# Rows and decays


def test_one_rows_documents_are_those_of_all() -> None:
    q, k, v = (random(2, 1, 70, 16) for _ in range(3))
    beta, reset = torch.rand(2, 1, 70, device=DEVICE), torch.zeros(1, 70, dtype=torch.bool, device=DEVICE)
    reset[:, [20, 66]] = True
    ours, theirs = (delta.delta_rule(q, k, v, beta, None, None, r, 0.3) for r in (reset, reset.repeat(2, 1)))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("steep", [-80.0, -1e6, -torch.inf])
def test_linear_attention_remembers_what_came_after_a_steep_decay(steep: float, dtype: torch.dtype) -> None:
    """Sums of decays grow large, and what lies between later tokens is a small difference of two."""
    given: list[Any] = [random(1, 1, 32, 16, dtype=dtype) for _ in range(3)]
    decay = -0.05 * torch.rand(1, 1, 32, device=DEVICE)
    decay[..., :8] = steep
    ours = [t.clone().requires_grad_() for t in given]
    theirs = [t.double().requires_grad_() for t in given]
    outs = linear.causal(*ours, decay, Rows.of(None), None)
    twins = linear_attention.reference.linear_attention(*theirs, causal=True, decay=decay.double().clamp(min=-1e4))
    up = random(1, 1, 32, 16)
    grads = (torch.autograd.grad(o, g, up.to(o.dtype)) for o, g in ((outs[0], ours), (twins, theirs)))
    bound = {torch.float32: 2e-6, torch.float16: 2e-3}[dtype] * (5 if GPU else 1)
    for a, b in zip([outs[0], *next(grads)], [twins, *next(grads)], strict=True):
        assert (a.double() - b).abs().max() <= bound * b.abs().max()
