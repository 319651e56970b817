"""Linear attention in chunks, step by step and by two products against its plain twin, gradients too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.kernels import linear_attention as kernel
from dovetail.kernels.linear_attention import chunked, recurrent, reference

B, D, E = 2, 3, 5


def given(T: int, heads: int, groups: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    sizes = ((heads, D), (groups, D), (groups, E))
    return [torch.randn(B, n, T, d).to(dtype).requires_grad_() for n, d in sizes]


def rows(sort: str, T: int) -> Tensor | None:
    """Documents of B rows: none, with padding anywhere, or packed with padding between and inside them."""
    if sort == "plain":
        return None
    hidden = torch.rand(B, T) < 0.2
    hidden[:, 0] = False
    number = (torch.rand(B, T) < 0.1).long().cumsum(1) - 0 if sort == "packed" else torch.zeros(B, T).long()
    number = number - number[:, :1]
    return torch.where(hidden, -1, number)


def same(ours: Tensor, plain: Tensor, inputs: list[Tensor], segments: Tensor | None, tolerance: float = 1e-11) -> None:
    """Equal outputs at real tokens, and equal gradients of one weighted sum of those."""
    real = 1 if segments is None else (segments >= 0)[:, None, :, None]
    weights = torch.randn_like(plain) * real
    _close(ours * real, plain * real, tolerance, "output")
    both = (torch.autograd.grad((y * weights).sum(), inputs, retain_graph=True) for y in (ours, plain))
    for a, b in zip(*both, strict=True):
        _close(a, b, tolerance, "gradient")


def _close(a: Tensor, b: Tensor, tolerance: float, what: str = "") -> None:
    worst, largest = float((a - b).detach().abs().max()), float(b.detach().abs().max())
    assert worst <= tolerance * max(1.0, largest), f"{what}: {worst}"


@pytest.mark.parametrize("sort", ["plain", "padded", "packed"])
@pytest.mark.parametrize("T", [1, 7, 64, 150])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("how", ["plain", "decays", "goes on"])
def test_chunks_equal_the_plain_twin(sort: str, T: int, groups: int, how: str) -> None:
    q, k, v = given(T, 4, groups)
    segments = rows(sort, T)
    decay = None if how == "plain" else -torch.rand(B, groups, T, dtype=torch.float64)
    start = torch.randn(B, groups, D, E, dtype=torch.float64).requires_grad_() if how == "goes on" else None
    known = {"causal": True, "segments": segments, "decay": decay, "start": start}
    ours, end = kernel.linear_attention(q, k, v, **known)
    assert end is not None
    same(ours, reference.linear_attention(q, k, v, **known), [q, k, v, *([] if start is None else [start])], segments)


@pytest.mark.parametrize("sort", ["plain", "packed"])
def test_spans_are_made_again(sort: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three spans of two chunks, each kept by its inputs alone."""
    monkeypatch.setattr(chunked, "CHUNK", 8)
    monkeypatch.setattr(chunked, "SPAN", 16)
    q, k, v = given(45, 2, 2)
    segments = rows(sort, 45)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ours, _ = kernel.linear_attention(q, k, v, causal=True, segments=segments)
    assert max(saved) < 2 * B * 2 * 16 * E, "a matrix of weights is kept"
    same(ours, reference.linear_attention(q, k, v, causal=True, segments=segments), [q, k, v], segments)


@pytest.mark.parametrize("sort", ["plain", "padded", "packed", "interleaved"])
@pytest.mark.parametrize("T", [1, 70])
def test_both_directions_equal_the_plain_twin(sort: str, T: int) -> None:
    q, k, v = given(T, 4, 2)
    segments = torch.arange(T).remainder(3)[None].expand(B, T) if sort == "interleaved" else rows(sort, T)
    ours, end = kernel.linear_attention(q, k, v, causal=False, segments=segments)
    assert end is None
    same(ours, reference.linear_attention(q, k, v, causal=False, segments=segments), [q, k, v], segments)


def test_parallel_recurrent_and_chunkwise_agree() -> None:
    """A retention's three forms (Sun et al. 2023, eq. 5-7), and the state that each ends with."""
    T = 90
    q, k, v = given(T, 2, 2)
    decay = torch.log(1 - torch.tensor([0.2, 0.01], dtype=torch.float64))[None, :, None].expand(B, 2, T)
    start = torch.zeros(B, 2, D, E, dtype=torch.float64)
    one, end = recurrent.linear_attention(q, k, v, decay, None, start)
    _close(one, reference.linear_attention(q, k, v, causal=True, decay=decay), 1e-11, "recurrent")
    state, out = start, []
    for a, b in ((0, 33), (33, 34), (34, 90)):
        y, state = kernel.linear_attention(
            q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], causal=True, decay=decay[..., a:b], start=state
        )
        out.append(y)
    _close(torch.cat(out, 2), one, 1e-11, "in pieces")
    assert state is not None
    _close(state, end, 1e-11, "state")


def test_narrow_inputs_have_a_wide_state() -> None:
    q, k, v = given(200, 2, 2, torch.bfloat16)
    ours, end = kernel.normalised(q.exp(), k.exp(), v, causal=True)
    assert end is not None and ours.dtype == torch.bfloat16 and end.dtype == torch.float32
    wide = [t.detach().double() for t in (q.exp(), k.exp(), v)]
    plain = reference.linear_attention(*wide, causal=True)
    total = reference.linear_attention(wide[0], wide[1], torch.ones_like(wide[2]), causal=True)
    torch.testing.assert_close(ours.double(), plain / total, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-5)


def test_running_maxima() -> None:
    x = torch.randn(2, 3, 37)
    document = torch.tensor([0] * 5 + [1] * 20 + [2] * 12)[None].expand(2, -1)
    start = torch.tensor([[1.5, -9.0, 0.0], [0.0, 0.5, 9.0]])
    ours = kernel.running_max(x, document, start)
    for t in range(37):
        first = int((document[0] == document[0, t]).nonzero()[0])
        plain = x[:, :, first : t + 1].amax(-1)
        assert torch.equal(ours[:, :, t], torch.maximum(plain, start) if first == 0 else plain)
    apart = torch.arange(37).remainder(3)[None].expand(2, -1)
    whole = kernel.document_max(x, apart)
    for n in range(3):
        assert (whole[..., n::3] == x[..., n::3].amax(-1, keepdim=True)).all()


def test_an_empty_sum_gives_zero() -> None:
    q, k, v = (t.detach() for t in given(4, 2, 2))
    assert (kernel.normalised(q, k * 0, v, causal=True)[0] == 0).all()


def test_plans() -> None:
    assert kernel.plan(1, causal=True, segments=False, state=True).path == "recurrent"
    assert kernel.plan(9, causal=True, segments=True, state=True).path == "chunked"
    assert kernel.plan(9, causal=False, segments=True, state=False).path == "chunked"
    assert kernel.plan(9, causal=False, segments=False, state=False).path == "products"


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("call", [kernel.linear_attention, kernel.normalised])
def test_autocast_does_not_reach_its_products(causal: bool, call: Any) -> None:
    q, k, v = (t.detach().abs().requires_grad_() for t in given(150, 4, 2, torch.float32))
    exact = call(q.double(), k.double(), v.double(), causal=causal)[0]
    with torch.autocast("cpu", torch.bfloat16):
        ours = call(q, k, v, causal=causal)[0]
    assert ours.dtype == torch.float32
    same(ours, exact, [q, k, v], None, 1e-5)


def test_what_comes_after_a_steep_decay_is_remembered() -> None:
    """A step that forgets all, of a document's first keys say, costs later pairs no digits; nor does one of padding."""
    q, k, v = given(40, 2, 2, torch.float32)
    decay = -torch.rand(B, 2, 40)
    decay[:, :, 5], decay[:, :, 20] = -1e6, -torch.inf
    segments = torch.zeros(B, 40).long()
    segments[:, 20] = -1
    ours = kernel.linear_attention(q, k, v, causal=True, segments=segments, decay=decay)[0]
    capped = decay.double().clamp_min(-80)
    plain = reference.linear_attention(q.double(), k.double(), v.double(), causal=True, segments=segments, decay=capped)
    same(ours, plain, [q, k, v], segments, 2e-5)
