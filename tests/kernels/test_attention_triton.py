"""The own attention kernels against the plain twin in fp64: outputs, normalisers and every gradient, a table's among them.

Without a GPU they run in Triton's interpreter. It multiplies bf16 wrongly, so that fp16 stands for narrow types there;
bench/attention_triton.py checks bf16.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dovetail.kernels.attention import (
    BoundMask,
    Content,
    Coords,
    Distance,
    Region,
    RelativeLogits,
    Score,
    Side,
    Span,
    Toeplitz,
    attend,
    plan,
    reference,
    regions,
    triton,
)
from dovetail.kernels.attention.triton import content, operator, sizes
from dovetail.kernels.plan import Plan
from dovetail.parts.context import Context
from dovetail.parts.init import Normal
from dovetail.parts.mask import Band, Beyond, Causal, Dilated, Document, Full, Globals, Mask, Prefix, Window
from dovetail.parts.position.base import PositionModule
from dovetail.parts.position.biases import Alibi, Kerple, Sandwich
from dovetail.parts.position.relative import T5Buckets
from dovetail.spec import Slot, Spec

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NARROW = torch.bfloat16 if GPU else torch.float16
FP32, H, SCALE = torch.float32, 2, 0.3
SINKS = Causal() & (Window(size=9) | Prefix(length=3))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short rows have several, of which some are seen whole, in part and not at all, near and far."""
    monkeypatch.setattr(sizes, "tiles", lambda *_: sizes.Tiles(16, 16, 4, 2))


def given(T: int, G: int, D: int, E: int, dtype: torch.dtype, S: int | None = None, B: int = 1) -> list[Tensor]:
    """q, k, v as models have them: (B,T,heads,D) seen as (B,heads,T,D)."""
    shapes = ((T, H, D), (S or T, G, D), (S or T, G, E))
    return [torch.randn(B, *s, device=DEVICE).to(dtype).transpose(1, 2).requires_grad_() for s in shapes]


def bound(rule: Mask, T: int) -> BoundMask:
    return Context.of(1, T, torch.device(DEVICE)).bind(rule)


def scores(kind: str | None, T: int) -> tuple[list[Tensor], list[Score | None]]:
    """What the score learns, and scores of it and of an fp64 copy: a table that ends, none, or a function without end."""
    if kind is None:
        return [], [None, None]
    learned = torch.randn(H, 11 if kind == "table" else 1, device=DEVICE).requires_grad_()
    both = [learned, learned.detach().double().requires_grad_()]
    if kind == "table":
        return both, [Score((Toeplitz(w, lambda d: d.clamp(-5, 5) + 5, reach=5),)) for w in both]
    return both, [
        Score((Distance(lambda d, w=w: w.exp()[:, :, None] * -d.abs().sqrt(), inside_scale=True),)) for w in both
    ]


Ends = tuple[int, ...]


def relative(ends: Ends, q: Tensor) -> tuple[list[Tensor], list[Score | None]]:
    """As `scores`: a term by query and distance, that ends so far behind queries and ahead; in units of the product, where
    that is no less than ahead. A third number: and a term by key and distance."""
    back, ahead = ends[:2]
    made = torch.randn(len(ends) - 1, *q.shape[:3], back + ahead + 1, device=DEVICE).to(q.dtype)
    both = [[t.detach().to(dtype).requires_grad_() for t in made] for dtype in (q.dtype, torch.float64)]
    kinds = [[RelativeLogits(t, back, 0, back >= ahead, n > 0) for n, t in enumerate(each)] for each in both]
    return [*both[0], *both[1]], [Score(tuple(terms)) for terms in kinds]


def compare(inputs: list[Tensor], mask: BoundMask, kind: str | Ends | None = None) -> None:
    """Output and gradients of q, k, v and what the score learns."""
    q = inputs[0]
    learned, (score, wide_score) = relative(kind, q) if isinstance(kind, tuple) else scores(kind, q.shape[2])
    wide = [t.detach().double().requires_grad_() for t in inputs]
    out = triton.attend(*inputs, mask, score, SCALE)
    plain = reference.attend(*wide, mask, wide_score, SCALE)[0]
    assert out.dtype == inputs[0].dtype
    pull = torch.randn(out.shape, device=DEVICE)
    half = len(learned) // 2
    ours = torch.autograd.grad((out.float() * pull).sum(), [*inputs, *learned[:half]])
    theirs = torch.autograd.grad((plain * pull).sum(), [*wide, *learned[half:]])
    tolerance = 8 * max(torch.finfo(out.dtype).eps, torch.finfo(torch.float32).eps)
    for name, a, b in zip(("out", "dq", "dk", "dv", "dtable", "dkeyed"), (out, *ours), (plain, *theirs), strict=False):
        worst, largest = float((a.double() - b).detach().abs().max()), float(b.detach().abs().max())
        # One number a head is a sum over all pairs, whose terms cancel: what is lost is not told by what is left.
        allowed = tolerance * (4 if kind == "function" and name == "dtable" else 1)
        assert worst <= allowed * max(largest, 0.5), f"{name}: {worst} of {largest}"


@pytest.mark.parametrize(
    ("rule", "kind", "T", "G", "D", "E", "dtype"),
    [
        (Full(), "table", 48, 2, 16, 16, torch.float32),
        (Full(), "function", 37, 2, 16, 20, torch.float32),
        (Causal(), None, 48, 1, 16, 32, NARROW),
        (Causal(), None, 48, 1, 21, 9, NARROW),  # rows of an odd number of entries
        (Causal(), "table", 53, 1, 20, 16, torch.float32),
        (Causal(), "function", 48, 2, 16, 16, NARROW),
        (Causal() & Window(size=20), "table", 64, 2, 16, 16, torch.float32),
        (SINKS, "function", 53, 1, 16, 16, torch.float32),
        (Band(before=4, after=20), None, 53, 1, 16, 16, torch.float32),
        (Beyond(size=18), None, 53, 2, 16, 16, torch.float32),
        (Causal(), "table", 1, 2, 16, 16, torch.float32),
        (Full(), (3, 9), 53, 1, 16, 20, torch.float32),
        (Full(), (30, 20), 70, 2, 16, 16, torch.float32),
        (Causal(), (100, 100), 37, 2, 16, 16, torch.float32),
        (Causal(), (1, 0), 48, 1, 20, 16, NARROW),
        (Band(before=4, after=20), (6, 25), 53, 1, 16, 16, torch.float32),
        (Full(), (0, 4), 1, 2, 16, 16, torch.float32),
        (Full(), (6, 9, 1), 53, 1, 16, 16, torch.float32),
        (SINKS, (20, 0, 1), 53, 1, 16, 16, NARROW),
    ],
    ids=lambda x: getattr(x, "kind", str(x)),
)
def test_kernels_equal_the_plain_twin(
    rule: Mask, kind: str | Ends | None, T: int, G: int, D: int, E: int, dtype: torch.dtype
) -> None:
    compare(given(T, G, D, E, dtype), bound(rule, T), kind)


@pytest.mark.parametrize(
    ("rule", "kind"),
    [
        (Full(), "table"),
        (SINKS, "function"),
        (Full(), (5, 12)),
        (SINKS, (20, 3, 1)),
    ],
    ids=lambda x: getattr(x, "kind", str(x)),
)
def test_documents_and_padding(rule: Mask, kind: str | Ends) -> None:
    """A row of documents that begin anywhere, and one that is padded on the left; both with padding inside."""
    T = 64
    real = torch.ones(2, T, dtype=torch.bool)
    real[1, :7] = False
    real[:, 33:36] = False
    number = torch.zeros(2, T).long()
    number[0, 20:] += 1
    number[0, 60:] += 1
    ctx = Context.of(2, T, torch.device(DEVICE), attention_mask=real.to(DEVICE), segments=number.to(DEVICE))
    compare(given(T, 1, 16, 16, torch.float32, B=2), ctx.bind(rule), kind)


def test_more_keys_than_queries() -> None:
    q, k, v = given(20, 1, 24, 16, torch.float32, S=37)
    order = [torch.arange(n, device=DEVICE)[None] for n in (20, 37)]
    compare([q, k, v], BoundMask(Full(), Coords(Side(order[0]), Side(order[1]))))


@pytest.mark.parametrize("sort", ["prefix", "packed"])
def test_regions_are_one_softmax(sort: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near and far keys, whose queries and keys differ, in one kernel, and a prefix by itself; the backward goes by what
    all give together. Packed: in documents, with padding."""
    T, prefixed = 40, sort == "prefix"
    inputs = [*given(T, 1, 20, 16, torch.float32), *given(T, 1, 20, 16, torch.float32)[:2]]
    if prefixed:
        inputs += [torch.randn(1, 1, 5, D, device=DEVICE).requires_grad_() for D in (20, 16)]
    number = (torch.arange(T, device=DEVICE) > 22).long()[None]
    real = torch.arange(T, device=DEVICE)[None] < 37
    ctx = Context.of(1, T, inputs[0].device, **({} if prefixed else {"attention_mask": real, "segments": number}))
    masks = [ctx.narrowed(ctx.bind(Causal()), rule) for rule in (Window(size=12), Beyond(size=12))]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        q, k, v, other, turned, *own = tensors
        parts = [*([Region(*own)] if own else []), Region(k, v, masks[0]), Region(turned, v, masks[1], q=other)]
        out = regions.attend_regions(parts, q, SCALE)
        return [out, *torch.autograd.grad(out.double().square().sum(), tensors)]

    plain = run([t.detach().double().requires_grad_() for t in inputs])
    monkeypatch.setattr(regions, "_own", lambda triples, masks: all(triton.kind(m, None, 20, FP32) for m in masks))
    calls = []
    monkeypatch.setattr(triton, "pair", lambda *a, pair=triton.pair: calls.append(a) or pair(*a))
    for ours, theirs in zip(run(inputs), plain, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("rule", "T"),
    [(Causal() & Window(size=20) & Dilated(step=2), 41), (Dilated(step=3) & Band(before=9, after=13), 42)],
    ids=["causal", "band"],
)
def test_every_nth_token(rule: Mask, T: int) -> None:
    mask = bound(rule, T)
    assert triton.kind(mask, None, 16, torch.float32) == "dilated"
    compare(given(T, 1, 16, 16, torch.float32), mask)
    assert triton.kind(bound(Dilated(step=3) & Band(before=9, after=1), 41), None, 16, torch.float32) is None


def test_normalisers_have_gradients_and_empty_rows_are_zero() -> None:
    q, k, v = given(24, 1, 16, 16, torch.float32)
    out, lse = operator.attend(q, k, v, None, Span(after=-3), SCALE)
    assert (out[:, :, :3] == 0).all() and torch.isneginf(lse[:, :, :3]).all() and torch.isfinite(lse[:, :, 3:]).all()
    wide = [t.detach().double().requires_grad_() for t in (q, k)]
    s = (wide[0] @ wide[1].mT * SCALE).masked_fill(~bound(Beyond(size=3), 24).dense(), -torch.inf)
    theirs = torch.autograd.grad(s[:, :, 3:].logsumexp(-1).square().sum(), wide)
    ours = torch.autograd.grad(lse[:, :, 3:].square().sum(), (q, k), retain_graph=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    for gradient in torch.autograd.grad(out.sum() + out.square().sum(), (q, k, v)):
        assert torch.isfinite(gradient).all()


def test_nothing_of_the_future() -> None:
    q, k, v = (t.detach() for t in given(48, 1, 16, 16, torch.float32))
    spoilt = k.clone()
    spoilt[:, :, 20:] *= 1e6  # beyond 1e9 a fused multiply-add leaves more of s - max(s) than exp2 can take
    plain, ours = (operator.attend(q, keys, v, None, Span(after=0), SCALE)[0] for keys in (k, spoilt))
    assert torch.equal(ours[:, :, :20], plain[:, :, :20]) and torch.isfinite(ours).all()


def test_compiled_is_the_same() -> None:
    q, k, v = given(20, 1, 16, 12, torch.float32)
    table = torch.randn(H, 9, device=DEVICE).requires_grad_()

    def step(*inputs: Tensor) -> list[Tensor]:
        out, lse = operator.attend(*inputs, Span(after=0), SCALE)
        return [out.transpose(1, 2).flatten(-2), lse]

    compiled, inputs = torch.compile(step, fullgraph=True, backend="aot_eager"), (q, k, v, table)
    for ours, theirs in zip(compiled(*inputs), step(*inputs), strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
    both = [torch.autograd.grad(sum(t.square().sum() for t in f(*inputs)), inputs) for f in (compiled, step)]  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_the_operation_keeps_its_promises() -> None:
    """Shapes and strides under a compiler, and what is differentiated: torch's own check."""
    q, k, v = given(16, 1, 16, 16, torch.float32)
    for table in (None, torch.randn(H, 9, device=DEVICE).requires_grad_()):
        torch.library.opcheck(
            operator._forward.op,
            (q, k, v, table, None, None, None, 0, 0, SCALE),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_the_operation_with_rows_keeps_its_promises() -> None:
    q, k, v = given(16, 1, 16, 16, torch.float32)
    values, keyed = (t.requires_grad_() for t in torch.randn(2, 1, H, 16, 6, device=DEVICE))
    torch.library.opcheck(
        content._forward.op,
        (q, k, v, values, keyed, None, None, None, 0, 0, SCALE, 5, SCALE),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )

    def step(*inputs: Tensor) -> list[Tensor]:
        return list(content.attend(*inputs, 5, True, Span(after=0), SCALE))

    both, inputs = [], (q, k, v, values, keyed)
    for run in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        outs = run(*inputs)
        both.append([*outs, *torch.autograd.grad(sum(t.square().sum() for t in outs), inputs)])  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


SPANS: list[tuple[Mask, Span | None]] = [
    (Full(), Span()),
    (Causal() & Document(), Span(after=0, apart=True)),
    (Causal() & Window(size=4), Span(3, 0)),
    (Window(size=4) & Beyond(size=2), Span(3, -2)),
    (Band(before=5, after=2) & Window(size=9), Span(5, 0)),
    (SINKS, Span(8, 0, 3)),
    (SINKS & Window(size=12), None),
    (SINKS & Beyond(size=2), Span(8, -2, 3)),
    (Causal() | Prefix(length=3), None),
    (Window(size=3) | Window(size=5), Span(4, 0)),
    (Causal() & Dilated(step=2), Span(after=0, step=2)),
    (Dilated(step=4) & Dilated(step=6), Span(step=12)),
    (Dilated(step=2) | Causal(), None),
    (Causal() & (Window(size=3) | Globals(length=2)), None),
]


@pytest.mark.parametrize(("rule", "span"), SPANS, ids=lambda x: str(x.to_dict()) if isinstance(x, Mask) else "")
def test_spans_are_what_rules_show(rule: Mask, span: Span | None) -> None:
    assert rule.span() == span
    if span is not None:
        i, j = torch.arange(20)[:, None], torch.arange(20)[None]
        before, after = (99 if bound is None else bound for bound in span[:2])
        seen = (j - i <= after) & ((i - j <= before) | (j < span.sinks)) & ((i - j) % span.step == 0)
        assert torch.equal(seen, rule.allowed(Side(i), Side(j)).expand(20, 20))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "position", [T5Buckets(buckets=8, max_distance=12), Alibi(), Kerple(), Kerple(form="power"), Sandwich(width=6)]
)
def test_positions_are_functions_of_the_distance(position: Spec, causal: bool) -> None:
    """What they tabulate is what they add, to what they learn too."""
    T, heads = 30, 2
    module = position.build(Slot(dim=16, heads=heads, head_dim=8, causal=causal, init=Normal()))
    assert isinstance(module, PositionModule) and module.tabled
    for p in module.parameters():
        torch.nn.init.normal_(p)
    ctx, q = Context.of(1, T, torch.device("cpu")), torch.zeros(1, T, heads, 8)
    score = module.score(q, q, ctx.coords, ctx, lambda *_: None)
    dense, line = score.bias(ctx.coords, 0.3), score.along(T, 0.3, q.device)
    reach = line.shape[1] // 2
    assert dense is not None and score.tabled and reach == (12 if position.kind == "t5_buckets" else T - 1)
    distance = ctx.coords.distance()[0]
    if causal:
        dense, distance = dense.tril(), distance.clamp_max(0)
    ours = line[:, distance.clamp(-reach, reach) + reach]
    ours = ours.tril() if causal else ours
    torch.testing.assert_close(ours, dense[0], rtol=1e-5, atol=1e-5)
    learned, pull = list(module.parameters()), torch.randn_like(ours)
    if learned:
        found = [torch.autograd.grad((x * pull).sum(), learned) for x in (ours, dense[0])]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_plan_says_when(monkeypatch: pytest.MonkeyPatch) -> None:
    table, mixed = scores("table", 8)[1][0], Score((Content(lambda a, b: torch.zeros(1), 8),))
    ctx = Context.of(2, 64, torch.device("cpu"))
    padded = Context.of(2, 64, torch.device("cpu"), attention_mask=torch.ones(2, 64))
    later = Coords(padded.side, Side(*(torch.arange(64)[None],) * 2))
    elsewhere = Context.of(2, 64, torch.device("cpu"), positions=torch.arange(64)[None] * 2)

    def path(ctx: Context, rule: Mask, score: Score | None, device: str = "cuda", width: int = 64) -> str:
        known = {"device": device, "dtype": torch.bfloat16, "queries": 64, "width": width}
        return plan(**known, mask=ctx.bind(rule), score=score).path  # type: ignore[arg-type]

    assert path(ctx, Causal(), table) == path(ctx, Full(), table) == path(ctx, SINKS, None) == "triton"
    assert path(padded, Causal(), table) == "triton"
    for other in (
        (ctx, Causal(), None),
        (ctx, Causal(), mixed),
        (padded, Causal(), None),
        (elsewhere, Causal(), table),
    ):
        assert path(*other) == "sdpa"
    assert triton.kind(padded.bind(Causal()), None, 64, NARROW) == "documents"
    assert triton.kind(BoundMask(Causal(), later), table, 64, NARROW) is None
    assert path(ctx, Causal(), table, device="cpu") == path(ctx, Causal(), table, width=256) == "sdpa"
    assert path(ctx, Causal(), Score(table.terms, cap=2.0)) == "tiled"  # type: ignore[union-attr]
    assert path(ctx, Causal() & Window(size=30) & Dilated(step=2), None) == "triton"
    rows = Score((RelativeLogits(torch.zeros(2, H, 64, 9), 4),))
    assert path(ctx, Causal(), rows) == path(padded, SINKS, rows) == "triton"
    assert path(elsewhere, Causal(), rows) == path(ctx, Causal(), Score(rows.terms * 2)) == "sdpa"
    assert path(ctx, Causal(), Score(rows.terms, cap=2.0)) == "tiled"
    monkeypatch.setattr(triton, "OWN", ())
    assert path(ctx, Causal(), table) == path(ctx, SINKS, None) == "sdpa"


def test_attend_goes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = given(20, 1, 16, 16, torch.float32)
    mask, score = bound(Causal(), 20), scores("function", 20)[1][0]
    expected = reference.attend(q, k, v, mask, score, SCALE)[0]
    monkeypatch.setattr("dovetail.kernels.attention.plan", lambda **_: Plan("triton", "asked for"))
    torch.testing.assert_close(attend(q, k, v, mask=mask, score=score, scale=SCALE), expected, rtol=1e-4, atol=1e-5)
