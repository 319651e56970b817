"""The own attention kernels on CUDA: scores from a table of distances, causal, windows; TFLOP/s and memory beside torch.

First all results are compared with the fp64 twin. Which tiles are best bench/attention_sweep.py finds out. Peers: SDPA (cuDNN, flash), SDPA with the scores' terms as a dense mask, and FlexAttention; what they need
beforehand (dense terms, block masks) is made outside of the clock, and so is our table's tabulation inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from common import ceilings, interleaved, main, replayed, row
from torch import Tensor
from torch._inductor import config as inductor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tuning import workers

from dovetail.kernels.attention import (
    Both,
    BoundMask,
    Distance,
    Region,
    RelativeLogits,
    Score,
    Toeplitz,
    plan,
    reference,
    regions,
    triton,
)
from dovetail.parts.context import Context
from dovetail.parts.mask import Band, Beyond, Causal, Full, Mask, Prefix, Window

BENCHMARK = {"device": "cuda", "packages": {"triton": "triton"}, "minutes": 2.5}
REPEAT = 10  # calls in a graph, between two synchronisations
REACH = 128  # of a table like T5's: 32 buckets, all alike from this distance on
SINKS = Causal() & (Window(size=300) | Prefix(length=4))
BF16, FP32 = torch.bfloat16, torch.float32
NAMES = ("out", "dq", "dk", "dv", "dtable", "dkeyed")
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}

# dtype, T, heads, key heads, D, E, mask, score
Check = tuple[torch.dtype, int, int, int, int, int, Mask, str]
CHECKS: list[Check] = [
    (BF16, 1024, 4, 4, 128, 128, Full(), ""), (BF16, 1000, 4, 4, 128, 128, Causal(), ""),
    (BF16, 1000, 4, 4, 64, 64, Full(), ""), (BF16, 1000, 4, 2, 64, 64, Causal(), ""),
    (BF16, 700, 4, 1, 96, 96, Causal(), ""), (BF16, 333, 4, 4, 32, 64, Causal(), ""), (BF16, 100, 2, 2, 20, 12, Full(), ""),
    (BF16, 1500, 4, 2, 64, 64, Causal() & Window(size=300), ""), (BF16, 1500, 4, 4, 128, 128, SINKS, ""),
    (BF16, 1500, 4, 4, 64, 64, Band(before=200, after=90), ""), (BF16, 1500, 4, 4, 64, 64, Beyond(size=400), ""),
    (BF16, 1024, 4, 4, 64, 64, Full(), "t5"), (BF16, 1000, 4, 4, 64, 64, Causal(), "t5"),
    (BF16, 1000, 4, 2, 128, 128, Full(), "t5"), (BF16, 1000, 4, 4, 128, 128, Causal(), "t5"),
    (BF16, 1024, 4, 4, 64, 64, Full(), "kerple"), (BF16, 1000, 4, 2, 64, 64, Causal(), "kerple"),
    (BF16, 1000, 4, 4, 128, 128, Causal(), "kerple"), (BF16, 1500, 4, 4, 64, 64, Causal() & Window(size=300), "t5"),
    (BF16, 1500, 4, 4, 64, 64, SINKS, "kerple"), (torch.float16, 1000, 4, 4, 64, 64, Causal(), "t5"),
    (FP32, 500, 4, 2, 64, 64, Causal(), "t5"), (FP32, 500, 4, 4, 64, 64, Full(), "kerple"),
    (FP32, 500, 4, 4, 128, 128, Causal() & Window(size=100), ""),
    (BF16, 1024, 4, 4, 64, 64, Full(), "rows 16"), (BF16, 1000, 4, 2, 64, 64, Causal(), "rows 512"),
    (BF16, 1000, 4, 2, 128, 128, Full(), "rows 100"), (BF16, 1500, 4, 4, 128, 128, SINKS, "rows 16"),
    (torch.float16, 1000, 4, 4, 64, 64, Causal(), "rows 16"), (FP32, 500, 4, 2, 64, 64, Full(), "rows 40"),
    (BF16, 1000, 4, 2, 64, 64, Full(), "deberta 100"), (FP32, 500, 4, 2, 64, 64, Full(), "deberta 40"), (BF16, 1000, 4, 2, 64, 64, Causal(), "xl 999"),
]  # fmt: skip
PLACED: list[Check] = [  # padded, and in documents
    (BF16, 1500, 4, 2, 64, 64, Causal(), ""), (BF16, 1500, 4, 4, 128, 128, Causal() & Window(size=300), ""),
    (BF16, 1500, 4, 4, 64, 64, Full(), "t5"), (BF16, 1500, 4, 4, 64, 64, Causal(), "kerple"),
    (FP32, 500, 4, 4, 64, 64, Causal(), "t5"), (BF16, 1500, 4, 2, 64, 64, Full(), "rows 16"),
    (BF16, 1500, 4, 4, 128, 128, Causal(), "rows 300"), (BF16, 1500, 4, 2, 64, 64, Full(), "deberta 64"), (BF16, 1500, 4, 2, 64, 64, Causal(), "xl 1499"),
]  # fmt: skip


class Case(NamedTuple):
    """One shape that is timed. score: "", "t5", "alibi", "rows N", "deberta N", "xl N"; window: 0 for none; causal or full; documents: packed in a row."""

    B: int
    H: int
    T: int
    D: int
    causal: bool = True
    score: str = ""
    window: int = 0
    target: float | None = None  # TFLOP/s forward
    documents: int = 1

    @property
    def name(self) -> str:
        what = "causal" if self.causal else "full"
        more = f" window {self.window}" if self.window else f" {self.score}" if self.score else ""
        more += f" {self.documents} documents" if self.documents > 1 else ""
        return f"{what}{more} B{self.B} H{self.H} T{self.T} D{self.D}"

    @property
    def rule(self) -> Mask:
        rule: Mask = Causal() if self.causal else Full()
        return rule & Window(size=self.window) if self.window else rule

    @property
    def mask(self) -> BoundMask:
        if self.documents == 1:
            return bound(self.rule, self.B, self.T)
        number = torch.arange(self.T, device="cuda") * self.documents // self.T
        return Context.of(self.B, self.T, number.device, segments=number.expand(self.B, -1)).bind(self.rule)

    @property
    def operations(self) -> float:
        """Of the forward: two products of the pairs that are seen."""
        T, W = self.T, self.window or self.T
        pairs = W * T - W * W / 2 if self.causal else T * T
        pairs /= self.documents
        return 4 * self.B * self.H * self.D * pairs


CASES = [
    Case(4, 16, 4096, 64, False, "t5", target=250), Case(4, 16, 4096, 64, False, "alibi", target=250),
    Case(4, 16, 4096, 64, True, "t5"), Case(4, 16, 4096, 64, True, "alibi"), Case(4, 16, 4096, 128, True, "t5"),
    Case(4, 16, 4096, 64, False, "rows 16", target=150), Case(4, 16, 4096, 64, False, "rows 512", target=150),
    Case(4, 16, 4096, 64, True, "rows 16"), Case(4, 16, 4096, 64, False, "deberta 512", target=150), Case(4, 16, 4096, 64, True, "xl 4095", target=150), Case(1, 16, 16384, 128, target=380), Case(4, 16, 4096, 128), Case(4, 32, 4096, 64),
    Case(1, 16, 16384, 128, window=1024), Case(1, 16, 16384, 128, documents=8),
]  # fmt: skip


def inputs(B: int, T: int, heads: tuple[int, int, int], widths: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as models have them: (B,T,heads,width) seen as (B,heads,T,width)."""
    D, E = widths
    made = [torch.randn(B, T, n, d, device="cuda") for n, d in zip(heads, (D, D, E), strict=True)]
    return [t.to(dtype).transpose(1, 2).requires_grad_() for t in made]


def learned(score: str, H: int, B: int = 1, T: int = 1, dtype: torch.dtype = BF16) -> list[Tensor]:
    """What a score learns: 32 buckets a head, two numbers a head, nothing. "rows N": what was made of the queries for each
    distance up to N either way, as Shaw's keys have it; "deberta N": and of the keys; "xl N": behind alone."""
    if " " in score:
        shape = 1 + score.startswith("deberta"), B, H, T, 1 + sum(ends(score))
        return [t.requires_grad_() for t in torch.randn(shape, device="cuda").to(dtype)]
    return [torch.randn(H, n, device="cuda").requires_grad_() for n in {"t5": [32], "kerple": [2]}.get(score, [])]


def ends(score: str) -> tuple[int, int]:
    """How far behind and ahead a term by query and distance goes. Transformer-XL's: a causal row's length."""
    reach = int(score.split()[1])
    return reach, 0 if score.startswith("xl") else reach


def scored(score: str, known: list[Tensor], H: int) -> Score | None:
    if score == "t5":
        return Score((Toeplitz(known[0], bucket, reach=REACH),))
    if score == "kerple":
        numbers = known[0].exp()[:, :, None, None]
        return Score((Distance(lambda d: -numbers[:, 0] * torch.log1p(numbers[:, 1] * d.abs().to(known[0].dtype))),))
    if " " in score:
        return Score(tuple(RelativeLogits(t, ends(score)[0], 0, False, n > 0) for n, t in enumerate(known)))
    return Score((Distance(lambda d: -slopes(H)[:, None, None] * d.abs()),)) if score == "alibi" else None


def bucket(distance: Tensor) -> Tensor:
    """Sixteen on a side, for near distances one each, all alike from REACH on."""
    back = distance.abs()
    far = (8 + torch.log(back.clamp_min(1) / 8) / torch.log(torch.tensor(REACH / 8)).item() * 8).long().clamp_max(15)
    return (distance > 0).long() * 16 + torch.where(back < 8, back, far)


def slopes(H: int) -> Tensor:
    return torch.exp2(-8 * torch.arange(1, H + 1, device="cuda") / H)


def bound(rule: Mask, B: int, T: int, sort: str = "plain") -> BoundMask:
    """sort: "plain"; "padded" on the right; "packed": documents, with padding at the end of one and inside another."""
    device = torch.device("cuda")
    n = torch.arange(T, device=device)
    if sort == "plain":
        return Context.of(B, T, device).bind(rule)
    real = n < torch.tensor([[T], [T * 2 // 3]], device=device)
    if sort == "padded":
        return Context.of(B, T, device, attention_mask=real).bind(rule)
    number = (n > T // 5).long() + (n > T // 2)
    real[1, T // 3 : T // 3 + 5] = False
    return Context.of(B, T, device, attention_mask=real, segments=number.expand(B, -1)).bind(rule)


def checked(job: tuple[Check, str]) -> str:
    """One line of errors relative to the largest number, against fp64."""
    (dtype, T, H, G, D, E, rule, score), sort = job
    torch.manual_seed(0)
    qkv, known = inputs(2, T, (H, G, G), (D, E), dtype), learned(score, H, 2, T, dtype)
    mask = bound(rule, 2, T, sort)
    out = triton.attend(*qkv, mask, scored(score, known, H), D**-0.5)
    up = torch.randn_like(out)
    found = (out, *torch.autograd.grad(out, [*qkv, *known], up))
    wide, also = ([t.detach().double().requires_grad_() for t in tensors] for tensors in (qkv, known))
    twin = reference.attend(*wide, mask, scored(score, also, H), D**-0.5)[0]
    expected = (twin, *torch.autograd.grad(twin, [*wide, *also], up.double()))
    errors = {n: _error(a, b) for n, a, b in zip(NAMES, found, expected, strict=False)}
    line = " ".join(f"{name} {error:.1e}" for name, error in errors.items())
    line = f"{str(dtype)[6:]:8} T{T} H{H} G{G} D{D} E{E} {tuple(rule.span() or ())} {score or '-':6} {sort} {line}"
    assert max(errors.values()) < TOLERANCE[dtype], line
    return line


def _error(a: Tensor, b: Tensor) -> float:
    assert a.isfinite().all()
    return ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-6)).item()


def check() -> None:
    """Each case in a process of its own: most of the time is compiling. What is timed is compiled on the way."""
    jobs = [(c, "plain") for c in CHECKS] + [(c, sort) for c in PLACED for sort in ("padded", "packed")]
    with workers() as pool:
        made, lines, more = pool.map(warmed, CASES), pool.map(checked, jobs), pool.map(checked_regions, REGIONS)
        for line in (*lines, *more):
            print(line, flush=True)
        for line in made:
            print(line, flush=True)
    triton.OWN = ("table", "rows", "window", "plain", "documents", "regions")
    for case in CASES:
        mask, score = case.mask, scored(case.score, learned(case.score, case.H, case.B, case.T), case.H)
        asked: dict[str, Any] = {"device": "cuda", "dtype": BF16, "queries": case.T, "width": case.D}
        assert plan(**asked, mask=mask, score=score).path == "triton", case


REGIONS = [
    (dtype, sort, ahead) for dtype in (BF16, FP32) for sort in ("plain", "padded", "packed") for ahead in (False, True)
]


def nearby(mask: BoundMask, size: int) -> list[BoundMask]:
    """What of it is nearer than `size`, and what is not, as ReRoPE splits it."""
    return [BoundMask(Both(mask.rule, rule), mask.at) for rule in (Window(size=size), Beyond(size=size))]


def checked_regions(job: tuple[torch.dtype, str, bool]) -> str:
    """Near and far keys with queries and keys of their own, as ReRoPE has them, in one kernel, against the same in fp64;
    `ahead`: a prefix before them, with which that kernel's results are merged."""
    dtype, sort, ahead = job
    triton.OWN = ("regions",)
    torch.manual_seed(0)
    T, H, D = (1500, 4, 128) if dtype == BF16 else (500, 4, 64)
    tensors = [*inputs(2, T, (H, 2, 2), (D, D), dtype), *inputs(2, T, (H, 2, 2), (D, D), dtype)[:2]]
    tensors += inputs(2, 20, (2, 2, 2), (D, D), dtype)[1:] if ahead else []
    masks = nearby(bound(Causal(), 2, T, sort), 60)
    up, found = torch.randn_like(tensors[0]), []
    for given in (tensors, [t.detach().double().requires_grad_() for t in tensors]):
        q, k, v, other, turned, *first = given
        parts = [*([Region(*first)] if first else []), Region(k, v, masks[0]), Region(turned, v, masks[1], q=other)]
        assert regions._own([(q, k, v)] * 2, masks) == (given is tensors)
        assert regions._together([0, 1, 2, 3, 4, 2], masks) == [(0, 1)]
        out = regions.attend_regions(parts, q, D**-0.5)
        found.append((out, *torch.autograd.grad(out, given, up.to(out.dtype))))
    errors = [_error(a, b) for a, b in zip(*found, strict=True)]
    prefix, told = " behind a prefix" if ahead else "", " ".join(f"{e:.1e}" for e in errors)
    line = f"regions {str(dtype)[6:]} {sort}{prefix}: {told}"
    assert max(errors) < TOLERANCE[dtype], line
    return line


Way = tuple[Callable[[], Tensor], list[Tensor]]


def ways(case: Case) -> dict[str, Way]:
    """By name: what gives the output, and what has gradients."""
    B, H, T, D = case[:4]
    q, k, v = qkv = inputs(B, T, (H, H, H), (D, D), BF16)
    mask, known = case.mask, learned(case.score, H, B, T)
    found: dict[str, Way] = {
        "ours": (lambda: triton.attend(q, k, v, mask, scored(case.score, known, H), D**-0.5), [*qkv, *known])
    }
    torch._dynamo.reset()  # beyond a few graphs of one function it would go on with the form that builds all scores
    flex = torch.compile(flex_attention, dynamic=False)
    block = None
    if case.causal:
        block = create_block_mask(mask.mod(), None, None, T, T)
    if case.score:
        score = scored(case.score, [t.detach() for t in known], H)
        assert score is not None
        dense = score.bias(mask.at, 1.0)
        assert dense is not None
        dense = dense.to(BF16)
        if case.causal:
            dense = dense.masked_fill(~mask.dense(), float("-inf"))
        dense = dense.expand(B, -1, -1, -1)
        found["SDPA attn_mask"] = (lambda: F.scaled_dot_product_attention(q, k, v, dense), qkv)
        rows, each, values = " " in case.score, slopes(H), [t.detach() for t in known]
        line = values[0] if rows else score.along(T, 1.0, q.device)
        reach, onward = ends(case.score) if rows else (REACH, REACH)

        def added(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if case.score == "alibi":
                return s - each[h] * (i - j).abs()
            entry = (j - i).clamp(-reach, onward) + reach
            more = s + (line[b, h, i, entry] if rows else line[h, entry])
            return more + values[1][b, h, j, entry] if len(values) == 2 else more

        found["Flex score_mod"] = (lambda: flex(q, k, v, score_mod=added, block_mask=block), qkv)  # type: ignore[return-value]
        return found

    def fused(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    if case.window or case.documents > 1:
        found["Flex"] = (lambda: flex(q, k, v, block_mask=block), qkv)  # type: ignore[return-value]
    else:
        found["SDPA cuDNN"] = (lambda: fused(SDPBackend.CUDNN_ATTENTION), qkv)
        found["SDPA flash"] = (lambda: fused(SDPBackend.FLASH_ATTENTION), qkv)
    return found


def warmed(case: Case) -> str:
    """Compiles what is timed into the caches on disk; peers beside ours, relative to the largest number."""
    inductor.compile_threads = 1  # each would start as many of its own
    torch.manual_seed(0)
    outs, refused = {}, []
    for name, (run, leaves) in ways(case).items():
        try:
            out = run()
            torch.autograd.grad(out.sum(), leaves)
            outs[name] = out
        except Exception as error:
            refused.append(f"{name} does not run: {type(error).__name__}: {str(error)[:300]}")
    if "ours" not in outs:  # not the error itself: what holds a module cannot come back from this process
        raise RuntimeError(f"{case.name}: {refused}")
    gaps = {n: _error(out.detach(), outs["ours"].detach().double()) for n, out in outs.items() if n != "ours"}
    assert max(gaps.values(), default=0) < 6e-2, (case, gaps)  # a dense mask is rounded to bf16
    return f"{case.name}: " + ", ".join([f"{name} {gap:.1e} from ours" for name, gap in gaps.items()] + refused)


def runs(way: Way) -> bool:
    try:
        torch.autograd.grad(way[0]().sum(), way[1])
    except Exception:  # `warmed` has told why
        return False
    return True


def measure() -> Iterator[dict[str, Any]]:
    """TFLOP/s of the products that the mask leaves: 2 forward, 7 forward and backward. Gradients of a table: ours alone."""
    limit = ceilings().bf16_matmul_tflops
    for case in CASES:
        made = {name: way for name, way in ways(case).items() if runs(way)}
        up = torch.randn_like(next(iter(made.values()))[0]())
        times = {"fwd": interleaved(replayed({n: run for n, (run, _) in made.items()}, REPEAT), rounds=9, warmup=2)}
        steps = {n: (lambda w=way: torch.autograd.grad(w[0](), w[1], up)) for n, way in made.items()}  # noqa: B023
        times["fwd+bwd"] = interleaved(replayed(steps, REPEAT), rounds=9, warmup=2)
        for what, found in times.items():
            work = case.operations * (1 if what == "fwd" else 3.5) * REPEAT / 1e12
            rate, spread = {n: work / t[0] for n, t in found.items()}, work / found["ours"][0] ** 2 * found["ours"][1]
            for peer in [n for n in rate if n != "ours"]:
                target = case.target if what == "fwd" else None
                more = {"target": target, "spread": round(spread, 1), "floor": round(limit)}
                yield row(f"{case.name} {what}", "TFLOP/s", rate["ours"], rate[peer], peer, **more)  # type: ignore[arg-type]
        del made, steps
        torch.cuda.empty_cache()
    yield from two_regions()
    yield from memory()


def two_regions() -> Iterator[dict[str, Any]]:
    """Near and far keys of ReRoPE, whose queries differ, against one causal attention by the same kernels."""
    B, H, T, D = 4, 16, 4096, 128
    q, k, v = inputs(B, T, (H, H, H), (D, D), BF16)
    other, turned = inputs(B, T, (H, H, H), (D, D), BF16)[:2]
    whole = bound(Causal(), B, T)
    near, far = nearby(whole, 512)
    up = torch.randn_like(q)
    two = [Region(k, v, near), Region(turned, v, far, q=other)]
    made: dict[str, Way] = {
        "two": (lambda: regions.attend_regions(two, q, D**-0.5), [q, k, v, other, turned]),
        "one": (lambda: triton.attend(q, k, v, whole, None, D**-0.5), [q, k, v]),
    }
    times = {"fwd": interleaved(replayed({n: run for n, (run, _) in made.items()}, REPEAT), rounds=9, warmup=2)}
    steps = {n: (lambda w=way: torch.autograd.grad(w[0](), w[1], up)) for n, way in made.items()}
    times["fwd+bwd"] = interleaved(replayed(steps, REPEAT), rounds=9, warmup=2)
    for what, found in times.items():
        ours, theirs = (1e3 * found[n][0] / REPEAT for n in ("two", "one"))
        case, peer = f"near 512 and far B{B} H{H} T{T} D{D} {what}", "one causal attention, ours"
        yield row(case, "ms", ours, theirs, peer, smaller=True, target_ratio=0.8)


def memory() -> Iterator[dict[str, Any]]:
    """Peak memory of a forward and a backward with a table, beyond the inputs; the plain form as far as it fits."""
    for T in (1024, 4096, 16384, 131072):
        H, D = 4, 64
        peaks = {}
        for name in ("ours", "plain") if T <= 16384 else ("ours",):
            qkv, known, mask = inputs(1, T, (H, H, H), (D, D), BF16), learned("t5", H), bound(Causal(), 1, T)
            attend = triton.attend if name == "ours" else lambda *a: reference.attend(*a)[0]
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            out = attend(*qkv, mask, scored("t5", known, H), D**-0.5)
            torch.autograd.grad(out, [*qkv, *known], torch.ones_like(out))
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
            del out, mask
        case, ours = f"causal t5 B1 H{H} T{T} D{D} fwd+bwd", peaks["ours"]
        peer = "plain form, measured" if "plain" in peaks else "one fp32 matrix of scores, computed"
        yield row(case, "peak MB", ours, peaks.get("plain", H * T * T * 4 / 1e6), peer, smaller=True)


if __name__ == "__main__":
    main(__file__)
