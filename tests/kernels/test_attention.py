"""attend and its twins: every path equals the formula written out here, forward and gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dovetail.kernels.attention import (
    BoundMask,
    Content,
    Coords,
    Region,
    Score,
    Side,
    Toeplitz,
    attend,
    attend_lse,
    attend_regions,
    merge,
    plan,
    reference,
    sdpa,
)  # fmt: skip
from dovetail.parts.mask import (
    Band,
    Causal,
    Dilated,
    Document,
    Full,
    Globals,
    Mask,
    Padding,
    Prefix,
    Strided,
    Window,
)  # fmt: skip

RULES: dict[str, Mask] = {
    "full": Full(),
    "causal": Causal(),
    "window": Window(size=3),
    "band": Band(before=2, after=1),
    "causal prefix": Causal() | Prefix(length=3),
    "dilated": Causal() & Dilated(step=2),
    "strided": Causal() & Strided(stride=3),
    "documents": Causal() & Document(),
    "padding": Padding(),
    "nothing": Window(size=2) & Band(before=9, after=-3),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}


def coords(T: int, aligned: bool = False) -> Coords:
    order = torch.arange(T)[None].expand(2, -1)
    segments = torch.tensor([[0] * (T // 2) + [1] * (T - T // 2), [-1, -1] + [0] * (T - 2)])
    side = Side(order, segments, order[..., None])
    return Coords(side, side, aligned)


def tensors(dtype: torch.dtype, T: int = 9, H: int = 4, G: int = 2, D: int = 8, Dv: int = 8) -> list[Tensor]:
    return [torch.randn(2, h, T, d).to(dtype).requires_grad_() for h, d in ((H, D), (G, D), (G, Dv))]


def formula(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, bias: Any = 0.0, cap: Any = None) -> Tensor:
    """softmax(cap(scale·qk + bias)) v in fp64, head by head; a query without keys gives zero."""
    rows = []
    for h in range(q.shape[1]):
        g = h // (q.shape[1] // k.shape[1])
        s = scale * q[:, h].double() @ k[:, g].double().mT + (bias[:, h] if isinstance(bias, Tensor) else bias)
        s = cap * torch.tanh(s / cap) if cap else s
        e = torch.where(seen, torch.exp(s - s.amax(-1, keepdim=True).detach()), 0.0)
        total = e.sum(-1, keepdim=True)
        rows.append(e / torch.where(total > 0, total, 1.0) @ v[:, g].double())
    return torch.stack(rows, 1)


def same(ours: Tensor, theirs: Tensor, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Outputs and gradients agree within the dtype's tolerance, relative to the largest value."""
    weights = torch.randn_like(theirs)
    a = torch.autograd.grad((ours.double() * weights).sum(), inputs, retain_graph=True, allow_unused=True)
    b = torch.autograd.grad((theirs * weights).sum(), inputs, retain_graph=True, allow_unused=True)
    for x, y in zip([ours, *a], [theirs, *b], strict=True):
        if x is None or y is None:
            assert (x is None or x.abs().max() == 0) and (y is None or y.abs().max() == 0)
            continue
        assert torch.isfinite(x).all()
        worst, scale = (x.double() - y.double()).abs().max(), y.abs().max().clamp_min(1.0)
        assert worst <= TOLERANCE[dtype] * scale, f"{worst:.3g} of {scale:.3g}"


def seen(rule: Mask, at: Coords) -> Tensor:
    """The rule asked one pair at a time."""
    B, T = at.q.order.shape
    out = torch.zeros(B, T, T, dtype=torch.bool)
    for b in range(B):
        for i in range(T):
            for j in range(T):
                one = [Side(s.order[b : b + 1, n], s.segments[b : b + 1, n]) for s, n in ((at.q, i), (at.k, j))]
                out[b, i, j] = rule.allowed(*one).item()
    return out


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "bf16"])
def test_every_rule_on_every_path(rule: Mask, dtype: torch.dtype) -> None:
    at, qkv = coords(9), tensors(dtype)
    mask = BoundMask(rule, at)
    theirs = formula(*qkv, seen(rule, at), 8**-0.5)
    same(attend(*qkv, mask=mask), theirs, qkv, dtype)
    same(reference.attend(*qkv, mask, None, 8**-0.5)[0], theirs, qkv, dtype)
    same(sdpa.attend(*qkv, mask, None, 8**-0.5, 0.0), theirs, qkv, dtype)
    same(reference.attend_tiled(*qkv, mask, None, 8**-0.5, tile=4), theirs, qkv, dtype)


@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (4, 1), (3, 1)])
@pytest.mark.parametrize(("D", "Dv"), [(8, 8), (8, 5), (5, 8), (6, 16), (6, 300)])
def test_groups_and_widths(H: int, G: int, D: int, Dv: int) -> None:
    qkv = tensors(torch.float64, H=H, G=G, D=D, Dv=Dv)
    for aligned in (True, False):
        mask = BoundMask(Causal(), coords(9, aligned))
        same(attend(*qkv, mask=mask), formula(*qkv, torch.ones(9, 9).tril() > 0, D**-0.5), qkv, torch.float64)
    one = [qkv[0][:, :, -1:], qkv[1], qkv[2]]  # a decoding step: one query sees all
    same(attend(*one, mask=None), formula(*one, torch.ones(1, 9) > 0, D**-0.5), qkv, torch.float64)


@pytest.mark.parametrize("rule", [Full(), Causal(), Window(size=3), RULES["nothing"]], ids=lambda r: r.kind)
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "bf16"])
def test_score_terms_and_cap(rule: Mask, cap: float | None, dtype: torch.dtype) -> None:
    """A trainable Toeplitz table outside the scale, a content term inside it, a cap, and a scale of one's own."""
    at, qkv = coords(9), tensors(dtype)
    mask = BoundMask(rule, at)
    table = torch.randn(4, 17, dtype=torch.float64).to(dtype).requires_grad_()
    away = torch.randn(9, 8, dtype=torch.float64).to(dtype).requires_grad_()
    terms = (
        Toeplitz(table, lambda d: d + 8),
        Content(lambda a, b: torch.einsum("bhtd,sd->bhts", qkv[0][:, :, a:b], away), length=9, inside_scale=True),
    )
    score = Score(terms, scale=0.3, cap=cap)
    distance = torch.arange(9)[None, :] - torch.arange(9)[:, None]
    content = torch.einsum("bhtd,sd->bhts", qkv[0].double(), away.double())
    theirs = formula(*qkv, seen(rule, at), 0.3, table.double()[:, distance + 8][None] + 0.3 * content, cap)
    inputs = [*qkv, table, away]
    same(attend(*qkv, mask=mask, score=score), theirs, inputs, dtype)
    same(reference.attend_tiled(*qkv, mask, score, 0.3, tile=4), theirs, inputs, dtype)


def test_value_terms() -> None:
    """Shaw's second half: probabilities times relative vectors join the output."""
    at, qkv = coords(9), tensors(torch.float64)
    away = torch.randn(9, 9, 8, dtype=torch.float64, requires_grad=True)
    score = Score(value_terms=lambda p, a, b: torch.einsum("bhts,tsd->bhtd", p, away[a:b]))
    p = torch.softmax((qkv[0] @ qkv[1].repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(
        ~(torch.ones(9, 9).tril() > 0), -math.inf), -1)  # fmt: skip
    theirs = p @ qkv[2].repeat_interleave(2, 1) + torch.einsum("bhts,tsd->bhtd", p, away)
    mask = BoundMask(Causal(), at)
    same(attend(*qkv, mask=mask, score=score), theirs, [*qkv, away], torch.float64)
    same(reference.attend_tiled(*qkv, mask, score, 8**-0.5, tile=4), theirs, [*qkv, away], torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_rows_without_keys_are_zero_with_finite_gradients(dtype: torch.dtype) -> None:
    qkv = tensors(dtype)
    hidden = BoundMask(Padding(), Coords(coords(9).q, Side(torch.arange(9)[None], torch.full((1, 9), -1))))
    for score in (None, Score((Toeplitz(torch.randn(4, 17).to(dtype).requires_grad_(), lambda d: d + 8),))):
        at = coords(9)
        mask = hidden if score is None else BoundMask(RULES["nothing"], at)
        out = attend(*qkv, mask=mask, score=score)
        empty = ~mask.dense().any(-1, keepdim=True).expand_as(out)
        assert empty.any() and (out[empty] == 0).all()
        for g in torch.autograd.grad(out.float().sum(), qkv):
            assert torch.isfinite(g).all()


def test_lse_is_fp32_natural_and_minus_infinite_for_empty_rows() -> None:
    at, (q, k, v) = coords(9), tensors(torch.bfloat16)
    mask = BoundMask(Causal() & Document(), at)
    out, lse = attend_lse(q, k, v, mask=mask)
    assert lse.dtype == torch.float32 and lse.shape == (2, 4, 9) and not lse.requires_grad and not out.requires_grad
    s = q.double() @ k.double().repeat_interleave(2, 1).mT * 8**-0.5
    theirs = torch.logsumexp(s.masked_fill(~mask.dense(), -math.inf), -1)
    assert torch.equal(torch.isinf(lse), torch.isinf(theirs)) and torch.isinf(lse[1, :, :2]).all()
    real = torch.isfinite(theirs)
    assert torch.allclose(lse[real].double(), theirs[real].detach(), atol=1e-5)
    assert attend_lse(q.double(), k.double(), v.double())[1].dtype == torch.float64


def _regions(qkv: list[Tensor], extra: list[Tensor], at: Coords) -> list[Region]:
    """Near keys, far keys against another q, and a prefix of its own: disjoint."""
    _, k, v = qkv
    pk, pv, far_q = extra
    near, far = BoundMask(Window(size=3), at), BoundMask(Causal() & Band(before=99, after=-3), at)
    return [Region(k, v, near), Region(k, v, far, q=far_q), Region(pk, pv)]


def test_regions_equal_their_definition_with_gradients() -> None:
    at, qkv = coords(7), tensors(torch.float64, T=7, D=4, Dv=3)
    extra = [torch.randn(2, 2, 3, d, dtype=torch.float64, requires_grad=True) for d in (4, 3)]
    extra.append(torch.randn(2, 4, 7, 4, dtype=torch.float64, requires_grad=True))
    inputs = [*qkv, *extra]
    ours = attend_regions(_regions(qkv, extra, at), qkv[0], scale=0.5)
    theirs, _ = reference.attend_regions(_regions(qkv, extra, at), qkv[0], 0.5)
    same(ours, theirs, inputs, torch.float64)
    from dovetail.kernels.attention.regions import attend_regions as tiled

    same(tiled(_regions(qkv, extra, at), qkv[0], 0.5, tile=3), theirs, inputs, torch.float64)

    def run(*t: Tensor) -> Tensor:
        return attend_regions(_regions(list(t[:3]), list(t[3:]), at), t[0], scale=0.5)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    once = torch.autograd.grad(run(*inputs).square().sum(), inputs[:1], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


def test_a_region_that_nobody_sees_changes_nothing() -> None:
    at, qkv = coords(7), tensors(torch.float64, T=7)
    hidden = Region(qkv[1], qkv[2], BoundMask(RULES["nothing"], at))
    ours = attend_regions([Region(qkv[1], qkv[2], BoundMask(Causal(), at)), hidden], qkv[0])
    same(ours, formula(*qkv, torch.ones(7, 7).tril() > 0, 8**-0.5), qkv, torch.float64)
    alone = attend_regions([hidden], qkv[0])
    assert (alone == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(alone.sum(), qkv))


def test_merging_by_a_detached_lse_would_be_wrong() -> None:
    """Why attend_regions exists: the naive merge has the right output and wrong dq and dk."""
    at, qkv = coords(7), tensors(torch.float64, T=7, G=4)
    masks = [BoundMask(Window(size=3), at), BoundMask(Causal() & Band(before=99, after=-3), at)]
    right = formula(*qkv, torch.ones(7, 7).tril() > 0, 8**-0.5)
    parts = [reference.attend(*qkv, m, None, 8**-0.5) for m in masks]
    naive, _ = merge([(out, lse.detach()) for out, lse in parts])
    assert torch.allclose(naive, right)
    a, b = (torch.autograd.grad(x.square().sum(), qkv[:2], retain_graph=True) for x in (naive, right))
    assert all((x - y).norm() > 0.05 * y.norm() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_mask_mod_and_tiles_are_the_dense_mask(rule: Mask) -> None:
    mask = BoundMask(rule, coords(9))
    dense = mask.dense()[:, 0]
    assert torch.equal(dense.expand(2, -1, -1), seen(rule, mask.at))
    mod = mask.mod()
    b, i, j = (t.flatten() for t in torch.meshgrid(torch.arange(2), torch.arange(9), torch.arange(9), indexing="ij"))
    assert torch.equal(mod(b, torch.zeros_like(b), i, j).view(2, 9, 9), dense.expand(2, -1, -1))
    tiles = mask.tiles(4)
    padded = nn.functional.pad(dense, (0, 3, 0, 3))
    assert torch.equal(tiles, padded.unflatten(-1, (3, 4)).unflatten(-3, (3, 4)).any(-1).any(-2))
    assert torch.equal(mask.rows(2, 6).dense()[:, 0], dense[:, 2:6])


def test_static_facts_are_true() -> None:
    """A mask may claim to be full or causal only when it is: on aligned coordinates, by the dense mask."""
    side = Side(torch.arange(6)[None])
    for rule in RULES.values():
        mask = BoundMask(rule, Coords(side, side, aligned=True))
        assert not mask.full or mask.dense().all()
        assert not mask.causal or torch.equal(mask.dense()[0, 0], torch.ones(6, 6).tril() > 0)
    assert BoundMask(Causal(), Coords(side, side, True)).causal and not BoundMask(Causal(), Coords(side, side)).causal


def test_the_plan_says_why() -> None:
    side = Side(torch.arange(200)[None])
    causal = BoundMask(Causal(), Coords(side, side, aligned=True))
    window = BoundMask(Window(size=3), Coords(side, side, aligned=True))
    longformer = BoundMask(Window(size=3) | Globals(length=2), Coords(side, side, aligned=True))
    term = Score((Toeplitz(torch.zeros(1, 1), lambda d: 0 * d),))
    values = Score(value_terms=lambda p, a, b: p)
    for device, mask, score, path, word in [
        ("cpu", None, None, "sdpa", "nothing is masked"),
        ("cpu", causal, None, "sdpa", "is_causal"),
        ("cpu", window, None, "sdpa", "booleans"),
        ("cuda", window, None, "triton", "a band of distances"),
        ("cuda", longformer, None, "flex", "skips the empty tiles"),
        ("cpu", causal, term, "sdpa", "bias"),
        ("cpu", causal, Score(cap=5.0), "tiled", "not additive"),
        ("cuda", causal, values, "tiled", "probabilities"),
    ]:
        queries = 2048 if device == "cuda" else 200
        chosen = plan(device=device, dtype=torch.float32, queries=queries, mask=mask, score=score)
        assert chosen.path == path and word in chosen.why
    # Short rows, and those that no training asks for again, are not worth the compilation.
    with torch.no_grad():
        assert plan(device="cuda", dtype=torch.float32, queries=2048, mask=longformer, score=None).path == "sdpa"
    assert plan(device="cuda", dtype=torch.float32, queries=200, mask=longformer, score=None).path == "sdpa"


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize(("T", "H", "G", "D", "Dv"), [(70, 4, 2, 8, 8), (300, 2, 1, 8, 5), (300, 3, 3, 5, 16)])
def test_bands_are_the_formula(rule: Mask, T: int, H: int, G: int, D: int, Dv: int, monkeypatch: Any) -> None:
    """bf16 on CPU: bands of queries, here over several bands, and a row of the batch at a time."""
    from dovetail.kernels.attention import bands

    monkeypatch.setattr(bands, "_SCORES", 1000)
    at, qkv = coords(T), tensors(torch.bfloat16, T, H, G, D, Dv)
    mask = BoundMask(rule, at)
    assert plan(device="cpu", dtype=torch.bfloat16, queries=T, mask=mask, score=None).path == "bands"
    theirs = formula(*qkv, mask.dense()[:, 0], 0.3)
    same(attend(*qkv, mask=mask, scale=0.3), theirs, qkv, torch.bfloat16)
    side = Side(torch.arange(T)[None])
    aligned = BoundMask(rule, Coords(side, side, aligned=True)) if rule == Causal() else mask
    same(attend(*qkv, mask=aligned, scale=0.3), formula(*qkv, aligned.dense()[:, 0], 0.3), qkv, torch.bfloat16)


def test_bands_compile_whole_and_nest_in_threads() -> None:
    """One opaque operator to a compiler, and threads do not share its scratch."""
    from concurrent.futures import ThreadPoolExecutor

    from dovetail.kernels.attention import bands

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return bands._attend(q, k, v, None, None, True, 0.3).float().square().sum()

    qkv = tensors(torch.bfloat16, T=130)
    plain = torch.autograd.grad(step(*qkv), qkv)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(compiled(*qkv), qkv), plain, strict=True))
    many = [tensors(torch.bfloat16, T=130) for _ in range(4)]
    alone = [step(*x) for x in many]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(lambda x: step(*x), many), alone, strict=True))
    torch.library.opcheck(bands._attend.op, (*(t.detach() for t in qkv), None, None, True, 0.3))
    lone = [t.detach()[:1].transpose(1, 2).contiguous().transpose(1, 2) for t in qkv]  # as a projection gives it
    known = ("test_schema", "test_faketensor")
    torch.library.opcheck(bands._backward.op, (lone[0], *lone, None, None, True, 0.3), test_utils=known)


def test_dropout_keeps_the_mean() -> None:
    q, k, v = (t.detach() for t in tensors(torch.float32, T=6))
    mask = BoundMask(Causal(), Coords(Side(torch.arange(6)[None]), Side(torch.arange(6)[None]), True))
    plain = attend(q, k, v, mask=mask)
    for score in (None, Score(cap=50.0)):
        mean = torch.stack([attend(q, k, v, mask=mask, score=score, dropout=0.3) for _ in range(600)]).mean(0)
        assert (mean - plain).abs().max() < 0.35 and (mean - plain).abs().mean() < 0.05


@pytest.mark.slow
def test_flex_attention_is_the_formula() -> None:
    """FlexAttention runs on CPU for inference only, and compiles: slow here, the CUDA path otherwise."""
    from dovetail.kernels.attention import flex

    with torch.no_grad():
        at, qkv = coords(128), [t.detach() for t in tensors(torch.float32, T=128, D=16, Dv=16)]
        rule = Causal() & Document() & Window(size=20)
        ours = flex.attend(*qkv, BoundMask(rule, at), 0.25)
        theirs = formula(*qkv, BoundMask(rule, at).dense()[:, 0], 0.25)
        assert torch.allclose(ours.double(), theirs, atol=1e-5)
