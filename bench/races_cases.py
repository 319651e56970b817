"""What bench/races.py runs: for each folder of kernels, small inputs through every kernel, with the tiles that are shipped.

A case makes its inputs and gives a function that runs forward and backward on them and returns what comes out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.kernels import contrastive as losses
from dovetail.kernels import legs_recurrence as legs
from dovetail.kernels.attention import Both, BoundMask, Coords, Distance, RelativeLogits, Score, Side, Toeplitz
from dovetail.kernels.linear_attention import operator as linear_operator
from dovetail.kernels.linear_attention.chunked import Rows
from dovetail.kernels.mixed_chunk import Heads
from dovetail.parts.context import Context
from dovetail.parts.mask import Beyond, Causal, Dilated, Full, Mask, Prefix, Window
from dovetail.parts.state import FAR
from dovetail.parts.storage.int4 import Int4
from dovetail.parts.storage.int8 import Int8
from dovetail.parts.storage.nf4 import Nf4

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
NARROW = torch.bfloat16 if GPU else torch.float16  # the interpreter has no bf16 of its own
FP32 = torch.float32
SHORT = 1 if GPU else 8  # the interpreter is slow: by this much rows are shorter there
Run = Callable[[], list[Tensor]]


def heads(T: int, H: int, D: int, dtype: torch.dtype, B: int = 2) -> Tensor:
    return torch.randn(B, T, H, D, device=DEVICE).to(dtype).transpose(1, 2).requires_grad_()


def context(T: int, packed: bool) -> Context:
    if not packed:
        return Context.of(2, T, DEVICE)
    n = torch.arange(T, device=DEVICE)
    real = (n < torch.tensor([[T], [T * 2 // 3]], device=DEVICE)) & (n % 50 != 49)
    return Context.of(2, T, DEVICE, attention_mask=real, segments=(n > T // 2).long().expand(2, -1))


def differentiated(outs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    up = [torch.ones_like(out) for out in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, up, allow_unused=True, materialize_grads=True)]


def attention(
    dtype: torch.dtype, rule: Mask, score: str = "", packed: bool = False, D: int = 64, E: int = 64, T: int = 300
) -> Run:
    from dovetail.kernels.attention import triton

    torch.manual_seed(0)
    T //= SHORT
    q, k, v = heads(T, 4, D, dtype), heads(T, 2, D, dtype), heads(T, 2, E, dtype)
    learned = torch.randn(4, 33, device=DEVICE).requires_grad_()
    scores = {
        "": None,
        "table": Score((Toeplitz(learned, lambda d: d.clamp(-16, 16) + 16, reach=16),)),
        "function": Score((Distance(lambda d: learned[:, :1, None] * d.abs().to(dtype=FP32).sqrt()),)),
    }
    mask, leaves = context(T, packed).bind(rule), [q, k, v, *([learned] if score else [])]
    return lambda: differentiated([triton.attend(q, k, v, mask, scores[score], 0.1)], leaves)


def by_row(rule: Mask, packed: bool = False, back: int = 16, ahead: int = 16, D: int = 64, keyed: bool = False) -> Run:
    """Scores with a term by query and distance; keyed: and with one by key and distance."""
    from dovetail.kernels.attention import triton

    torch.manual_seed(0)
    T = 300 // SHORT
    q, k, v = heads(T, 4, D, NARROW), heads(T, 2, D, NARROW), heads(T, 2, D, NARROW)
    made = torch.randn(1 + keyed, 2, 4, T, back + ahead + 1, device=DEVICE).to(NARROW)
    values, mask = [t.requires_grad_() for t in made], context(T, packed).bind(rule)
    score = Score(tuple(RelativeLogits(t, back, by_key=n > 0) for n, t in enumerate(values)))
    return lambda: differentiated([triton.attend(q, k, v, mask, score, 0.1)], [q, k, v, *values])


def two_forms(dtype: torch.dtype, packed: bool) -> Run:
    from dovetail.kernels.attention import triton

    torch.manual_seed(0)
    T = 600 // SHORT
    q, k, q2, k2, v = (t.detach() for t in (heads(T, n, 128, dtype) for n in (4, 2, 4, 2, 2)))
    whole = context(T, packed).bind(Causal())
    near, far = (BoundMask(Both(whole.rule, rule), whole.at) for rule in (Window(size=T // 3), Beyond(size=T // 3)))

    def run() -> list[Tensor]:
        out, lse = triton.pair(q, k, q2, k2, v, (near, far), 0.1)
        up = torch.ones_like(out)
        return [out, *triton.pair_backward(up, q, k, q2, k2, v, (near, far), out, lse, 0.1)]

    return run


def few_queries(dtype: torch.dtype, filled: int | None = None) -> Run:
    """filled: slots of a state that hold tokens; None for plain keys."""
    from dovetail.kernels.attention import Span
    from dovetail.kernels.attention.triton import few_queries

    torch.manual_seed(0)
    q, k, v = heads(1, 8, 128, dtype), *(heads(3000 // SHORT, 2, 128, dtype) for _ in range(2))
    q, k, v = (t.detach() for t in (q, k, v))

    def run() -> list[Tensor]:
        mask, span = None, Span()
        if filled is not None:
            n = torch.arange(k.shape[2], device=DEVICE)[None]
            at = Coords(Side(torch.full((1, 1), filled - 1, device=DEVICE)), Side(torch.where(n < filled, n, FAR)))
            mask, span = BoundMask(Causal(), at), Span(after=0)  # anew, for it remembers what it was asked
        return list(few_queries.attend(q, k, v, mask, span, 0.1))

    return run


def linear(
    dtype: torch.dtype, packed: bool, least: float | None = None, gated: bool = False, D: int = 64, E: int = 64
) -> Run:
    torch.manual_seed(0)
    T = 700 // SHORT if packed else 300
    q, k, v = heads(T, 4, D, dtype), heads(T, 2, D, dtype), heads(T, 2, E, dtype)
    if least is not None:
        q, k = (t.detach().abs().requires_grad_() for t in (q, k))
    start = torch.zeros(2, 2, D, E + (least is not None), device=DEVICE).requires_grad_()
    decay = -0.1 * torch.rand(1, 2, T, device=DEVICE) if gated else None
    n = torch.arange(T, device=DEVICE)
    rows = Rows.of((n // (T // 3) - (n % 70 == 69).long() * 9).expand(2, -1) if packed else None)
    return lambda: differentiated(list(linear_operator.causal(q, k, v, decay, rows, start, least)), [q, k, v, start])


def gated(dtype: torch.dtype, D: int = 128, E: int = 128) -> Run:
    from dovetail.kernels.gated_linear import triton

    torch.manual_seed(0)
    T = 300 // SHORT
    q, k, v = (heads(T, 2, d, dtype) for d in (D, D, E))
    decay = F.logsigmoid(torch.randn(2, 2, T, D, device=DEVICE)).requires_grad_()
    start = torch.randn(2, 2, D, E, device=DEVICE).requires_grad_()
    reset = torch.rand(2, T, device=DEVICE) < 0.02
    leaves = [q, k, v, decay, start]
    return lambda: differentiated(list(triton.gated_linear(q, k, v, decay, start, reset, 0.1)), leaves)


def projected(dtype: torch.dtype) -> Run:
    from dovetail.kernels.gate import operator

    wide, weight = (torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_() for shape in ((120, 272), (24, 136)))
    return lambda: differentiated([operator.projected(wide, "silu", weight)], [wide, weight])


def gate(dtype: torch.dtype, width: int) -> Run:
    """Every activation, in rows that are a slice of wider ones."""
    from dovetail.kernels.gate import ACTIVATIONS, operator

    torch.manual_seed(0)
    wide = torch.randn(200 // SHORT, 2 * width + 8, device=DEVICE).to(dtype).requires_grad_()
    return lambda: [t for a in ACTIVATIONS for t in differentiated([operator.gated(wide[:, : 2 * width], a)], [wide])]


def delta(dtype: torch.dtype, decays: bool, D: int = 64, E: int = 64) -> Run:
    from dovetail.kernels.delta_rule import triton

    torch.manual_seed(0)
    T = 200 // SHORT
    q, v = heads(T, 2, D, dtype), heads(T, 2, E, dtype)
    k = F.normalize(heads(T, 2, D, FP32).detach(), dim=-1).to(dtype).requires_grad_()
    beta, decay = (torch.rand(2, 2, T, device=DEVICE).mul(s).requires_grad_() for s in (1.0, -1.0))
    start = torch.randn(2, 2, D, E, device=DEVICE).requires_grad_()
    reset = torch.rand(2, T, device=DEVICE) < 0.02
    leaves = [q, k, v, beta, start, *([decay] if decays else [])]
    return lambda: differentiated(
        list(triton.delta_rule(q, k, v, beta, decay if decays else None, start, reset, 0.1)), leaves
    )


def mixed(dtype: torch.dtype, packed: bool, causal: bool, D: int = 64, E: int = 128, chunk: int = 256) -> Run:
    from dovetail.kernels.mixed_chunk import triton

    torch.manual_seed(0)
    T = 600 // SHORT
    ctx = context(T, packed)
    views = [torch.randn(2, T, D, device=DEVICE).to(dtype).requires_grad_() for _ in range(4)]
    v = torch.randn(2, T, E, device=DEVICE).to(dtype).requires_grad_()
    where = (ctx.order, ctx.segments, ctx.aligned, dtype)
    return lambda: differentiated([triton.mixed_chunk(Heads(*views), v, chunk, causal, 0.1, *where)], [*views, v])


def scan(packed: bool) -> Run:
    from dovetail.kernels.ssm_scan import triton

    torch.manual_seed(0)
    B, T, D, N = (2, 500, 40, 16) if GPU else (1, 260, 8, 4)
    sizes = ((B, T, D), (B, T, D), (D, N), (B, T, N), (B, T, N), (B, D, N))
    x, dt, a, b, c, start = (torch.randn(n, device=DEVICE) for n in sizes)
    given = [t.requires_grad_() for t in (x, F.softplus(dt), -a.abs(), b, c, start)]
    first = torch.rand(B, T, device=DEVICE) < 0.01 if packed else None
    return lambda: differentiated(list(triton.selective_scan(*given, first)), given)


def legs_walk() -> Run:
    from dovetail.kernels.legs_recurrence import triton

    torch.manual_seed(0)
    made = [
        (s * torch.randn(n, device=DEVICE)).requires_grad_()
        for n, s in (((4, 60 // SHORT + 20, 129), 1.0), ((1, 64), 0.1), ((128, 64), 0.1))
    ]

    def run() -> list[Tensor]:
        before, legs._walk = legs._walk, lambda x: triton  # type: ignore[assignment]
        try:
            return differentiated([legs.recurrence(*made)], made)
        finally:
            legs._walk = before

    return run


def contrastive(dtype: torch.dtype, form: str) -> Run:
    from dovetail.kernels.contrastive import triton, walk

    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(300 // SHORT, 96, device=DEVICE), dim=-1).to(dtype) for _ in range(2))
    scale, bias = torch.tensor(5.0, device=DEVICE), torch.tensor(-2.0, device=DEVICE)

    def run() -> list[Tensor]:
        with torch.no_grad():
            found = walk(triton, a, b, scale, bias, form, 0, 200 // SHORT, (True, True, True))  # type: ignore[arg-type]
        return [t for t in found if isinstance(t, Tensor)]

    assert form in losses.FORMS
    return run


def softmax(dtype: torch.dtype, vocab: int) -> Run:
    """Several steps of a reading; ragged unless vocab is a multiple of 16."""
    from dovetail.kernels.cross_entropy import scaled, softmax_loss_, triton

    torch.manual_seed(0)
    logits = torch.randn(6, vocab, device=DEVICE).to(dtype)
    labels = torch.tensor([0, vocab - 1, -100, 5, vocab // 2, 7], device=DEVICE)

    def run() -> list[Tensor]:
        x = logits.clone()
        sums = softmax_loss_(x, labels, 0.1, 1e-3, True)
        return [sums, x, triton.scaled(logits.float(), sums[0], dtype), scaled(logits.float(), sums[0], dtype)]

    return run


def vector_product(width: int) -> Run:
    from dovetail.kernels.linear import vector

    torch.manual_seed(0)
    x, scale, weight = (torch.randn(n, width, device=DEVICE).to(NARROW).squeeze(0) for n in (1, 1, 100))
    residual = torch.randn(100, device=DEVICE).to(NARROW)

    def run() -> list[Tensor]:
        added = vector.step(x, weight, None, 0.0, None, residual, False)
        return [vector.product(x, weight), added, vector.step(x, weight, scale, 1e-5, "silu", None, True)]

    return run


def rotary(layout: str, dim: int) -> Run:
    from dovetail.kernels.rotary import Heads, Turning, operator

    torch.manual_seed(0)
    heads, angle = Heads(6, 2, 64, 64), torch.randn(1, 100 // SHORT, 1, dim // 2, device=DEVICE)
    x = torch.randn(2, 100 // SHORT, 640, device=DEVICE).to(NARROW).requires_grad_()
    turning = Turning(angle.cos().to(NARROW), angle.sin().to(NARROW), layout)
    return lambda: differentiated(list(operator.turned(x, heads, turning)), [x])


def adamw(dtype: torch.dtype, stored: bool) -> Run:
    """Some tiles and a part of one. stored: the rate lies in memory, and gradients are divided by what does."""
    from dovetail.kernels.adamw import Row, triton

    torch.manual_seed(0)
    weight, gradient, m, v = (torch.rand(5 * 1024 // SHORT + 48, device=DEVICE).to(dtype) for _ in range(4))
    one = torch.ones((), device=DEVICE)

    def run() -> list[Tensor]:
        row = Row(weight.clone(), gradient, m.clone(), v.clone(), 3 * one)
        triton.step_(row, one * 0.1 if stored else 0.1, (0.9, 0.95), 1e-8, 0.1, 2 * one if stored else None)
        return list(row)

    return run


def codes(dtype: torch.dtype) -> Run:
    from dovetail.kernels.quantise import NF4, triton, triton_linear

    torch.manual_seed(0)
    weight = torch.randn(300 // SHORT, 512, device=DEVICE)
    stored = [spec.store(weight) for spec in (Int8(), Int8(block=64), Int4(block=64), Nf4(block=64))]
    vectors = [torch.randn(n, 512, device=DEVICE).to(dtype) for n in (1, 7, 32)]
    packed = torch.randint(0, 256, (6400,), dtype=torch.uint8, device=DEVICE)
    absmax, levels = torch.rand(200, device=DEVICE), torch.tensor(NF4, device=DEVICE)

    def run() -> list[Tensor]:
        with torch.no_grad():
            found = [triton_linear.linear(x, s.rows()) for s in stored for x in vectors]  # type: ignore[attr-defined]
        return [*found, triton.dequantise_packed(packed, absmax, levels, 64, dtype)]

    return run


SINKS = Causal() & (Window(size=150) | Prefix(length=4))
CASES: dict[str, Callable[[], Run]] = {
    "attention causal": lambda: attention(NARROW, Causal(), D=128),
    "attention causal fp32": lambda: attention(FP32, Causal()),
    "attention window": lambda: attention(NARROW, SINKS, D=128, T=600),
    "attention dilated": lambda: attention(NARROW, Causal() & Window(size=300) & Dilated(step=2), D=128, T=600),
    "attention table": lambda: attention(NARROW, Full(), "table"),
    "attention function": lambda: attention(NARROW, Causal(), "function"),
    "attention documents": lambda: attention(NARROW, Causal(), "table", packed=True),
    "attention rows": lambda: by_row(Full()),
    "attention rows wide": lambda: by_row(SINKS, ahead=0, D=128),
    "attention rows documents": lambda: by_row(Causal(), packed=True, back=100),
    "attention rows of keys": lambda: by_row(Full(), keyed=True),
    "attention rows of keys documents": lambda: by_row(Causal(), packed=True, back=100, D=128, keyed=True),
    "attention two forms": lambda: two_forms(NARROW, False),
    "attention two forms packed": lambda: two_forms(NARROW, True),
    "attention few queries": lambda: few_queries(NARROW),
    "attention decoding": lambda: few_queries(NARROW, 2000 // SHORT),
    "linear": lambda: linear(NARROW, False),
    "linear packed": lambda: linear(NARROW, True, least=1.0),
    "linear gated": lambda: linear(FP32 if GPU else NARROW, False, gated=True),
    "gated linear": lambda: gated(NARROW),
    "gated linear fp32": lambda: gated(FP32),
    "gate": lambda: gate(NARROW, 1536),
    "gate fp32": lambda: gate(FP32, 37),
    "gate projected": lambda: projected(NARROW),
    "delta rule": lambda: delta(FP32, False),
    "delta rule gated": lambda: delta(NARROW, True),
    "mixed chunks": lambda: mixed(NARROW, False, True),
    "mixed chunks packed": lambda: mixed(NARROW, True, False),
    "scan": lambda: scan(False),
    "scan packed": lambda: scan(True),
    "legs": legs_walk,
    "contrastive softmax": lambda: contrastive(NARROW, "softmax"),
    "contrastive sigmoid": lambda: contrastive(NARROW, "sigmoid"),
    "softmax": lambda: softmax(NARROW, 40_000),
    "softmax ragged": lambda: softmax(NARROW, 33_333),
    "softmax fp32": lambda: softmax(FP32, 20_000),
    "rotary": lambda: rotary("half", 64),
    "rotary of a part": lambda: rotary("interleaved", 32),
    "vector product": lambda: vector_product(2048),
    "vector product ragged": lambda: vector_product(1000),
    "adamw": lambda: adamw(NARROW, True),
    "adamw fp32": lambda: adamw(FP32, False),
    "codes": lambda: codes(NARROW),
}

# By widths of keys and of values.
WIDTHS: dict[str, Callable[[int, int], Run]] = {
    "attention window": lambda D, E: attention(NARROW, Causal() & Window(size=100), D=D, E=E),
    "linear gated": lambda D, E: linear(NARROW, False, gated=True, D=D, E=E),
    "gated linear": lambda D, E: gated(NARROW, D=D, E=E),
    "delta rule gated": lambda D, E: delta(NARROW, True, D=D, E=E),
    "mixed chunks": lambda D, E: mixed(NARROW, False, True, D=D, E=E),
    "mixed chunks of 64": lambda D, E: mixed(NARROW, False, True, D=D, E=E, chunk=64),
    "mixed chunks packed": lambda D, E: mixed(NARROW, True, True, D=D, E=E),
}
