"""Attention of one decoding step over a state that is partly filled, bf16, GB/s of the keys and values that are filled.

First all results are compared with the fp64 twin, and a CUDA graph is replayed as the state fills. What is timed is one
step of many layers, each with a state of its own so that none lies in the cache, as a CUDA graph: whatever is asked once
a step (which keys are seen, a dense mask) is in it once. Peers: SDPA with the mask over the whole capacity, as the plan
has it without own kernels, and with the heads of a group as rows; FlexAttention with a block mask made beforehand; SDPA
over the filled part alone, where the host knows it, which no graph of all steps does. Which tiles are best
bench/decode_attention_sweep.py finds out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from common import captured, ceilings, interleaved, main, row
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tuning import workers

import dovetail as dt
from dovetail.kernels.attention import BoundMask, Coords, Score, Side, plan, reference, sdpa, triton
from dovetail.kernels.attention.triton import few_queries
from dovetail.parts.mask import Causal, Document, Mask, Prefix, Window
from dovetail.parts.state import FAR

BENCHMARK = {"device": "cuda", "packages": {"triton": "triton"}, "minutes": 3}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the latter to try the script out, tiny
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {BF16: 1e-2, FP16: 2e-3, FP32: 2e-5}
CAPACITY, SPAN, CAUSAL = 32768, 400, Causal()
LATENT = 576, 512  # widths of a latent with its turned part, of which the first part is the value (DeepSeek-V2)
CACHED = 3e8  # bytes that a step reads at least, several times what the cache of an H200 holds, so that all are read from memory
SINKS = CAUSAL & (Window(size=100) | Prefix(length=4))


class Check(NamedTuple):
    """sort: "filled" to several lengths; "ring"; "left": padded there; "packed"."""

    dtype: torch.dtype = BF16
    T: int = 1
    heads: tuple[int, int] = (8, 2)
    widths: tuple[int, int] = (128, 128)
    rule: Mask = CAUSAL
    sort: str = "filled"
    B: int = 3
    cap: float | None = None


CHECKS = [
    Check(), Check(FP16), Check(FP32), Check(T=4), Check(T=16), Check(B=1), Check(B=40),
    Check(widths=(64, 64)), Check(widths=(64, 64), dtype=FP32, T=5), Check(widths=(256, 256)), Check(widths=(96, 80)),
    Check(widths=(20, 12)), Check(heads=(4, 4)), Check(heads=(71, 1), widths=(64, 64)), Check(heads=(8, 1), T=16),
    Check(rule=CAUSAL & Window(size=100)), Check(rule=SINKS, T=3), Check(rule=CAUSAL & Window(size=SPAN), sort="ring"),
    Check(heads=(16, 1), widths=LATENT), Check(heads=(128, 1), widths=LATENT), Check(widths=(512, 512)), Check(sort="left", T=2), Check(cap=3.0), Check(sort="packed", rule=CAUSAL & Document(), T=3),
]  # fmt: skip


class Case(NamedTuple):
    """One shape that is timed. ragged: rows filled from an eighth to the whole of `filled`."""

    B: int
    filled: int
    D: int = 128
    H: int = 32
    G: int = 8
    ragged: bool = False

    @property
    def name(self) -> str:
        rows = " ragged" if self.ragged else ""
        return f"B{self.B} H{self.H} G{self.G} D{self.D} {self.filled}{rows} of {CAPACITY}"

    def lengths(self) -> Tensor:
        whole = torch.full((self.B,), self.filled, device=DEVICE)
        return whole * torch.linspace(0.125, 1, self.B, device=DEVICE) if self.ragged else whole

    def size(self) -> float:
        """Bytes of the keys and values that a layer has filled."""
        return self.lengths().long().sum().item() * self.G * (self.D + self.E * (self.widths != LATENT)) * 2

    @property
    def E(self) -> int:
        return LATENT[1] if LATENT[0] == self.D else self.D

    @property
    def widths(self) -> tuple[int, int]:
        return self.D, self.E


CASES = [
    Case(1, 512), Case(1, 2048), Case(1, 8192), Case(1, 32768), Case(32, 512), Case(32, 2048), Case(32, 8192),
    Case(32, 32768), Case(32, 8192, ragged=True), Case(64, 512), Case(64, 8192), Case(64, 32768),
    Case(1, 2048, D=64), Case(32, 2048, D=64),
    Case(16, 16384, D=576, H=128, G=1),
]  # fmt: skip


def sides(check: Check, S: int) -> tuple[Side, Side]:
    """Queries' and keys', of rows that are alike in nothing."""
    B, T = check.B, check.T
    n, t = torch.arange(S, device=DEVICE), torch.arange(T, device=DEVICE)
    lengths = torch.linspace(S, T, B, device=DEVICE).long()[:, None]
    q = lengths - T + t
    if check.sort == "ring":  # slots of which each holds the newest token of its number, modulo their count
        last = lengths * 3 - 1
        order = last - (last - n) % S
        return Side(last - T + 1 + t), Side(torch.where(order < 0, FAR, order))
    if check.sort == "left":
        return Side(q), Side(torch.where(n >= S - lengths, n - (S - lengths), FAR))
    if check.sort == "packed":
        number = n * 3 // S
        segments = torch.where(n < lengths, number, -1)
        order = (n - number * S // 3).expand(B, -1)
        at = lengths - T + t
        return Side(order.gather(1, at), segments.gather(1, at)), Side(order, segments)
    return Side(q), Side(torch.where(n < lengths, n, FAR))


def state(B: int, G: int, widths: tuple[int, int], S: int, dtype: torch.dtype) -> list[Tensor]:
    """k and v (B,G,S,...) as a state of S and a spare slot gives them, empty ones filled as well."""
    k, v = (torch.randn(B, S + 1, G, d, device=DEVICE, dtype=dtype)[:, :S].transpose(1, 2) for d in widths)
    return [k, k[..., : widths[1]] if widths == LATENT else v]


def queries(B: int, T: int, H: int, D: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(B, T, H, D, device=DEVICE, dtype=dtype).transpose(1, 2)


def check() -> None:
    """Each case in a process of its own, for most of the time is compiling, and then the graph and a whole model."""
    if DEVICE == "cuda":
        with workers() as pool:
            for line in pool.map(checked, CHECKS):
                print(line, flush=True)
    else:
        for one in CHECKS:
            print(checked(one), flush=True)
    with torch.no_grad():
        replayed()
        decoded()


@torch.no_grad()
def checked(check: Check) -> str:
    """One line of errors relative to the largest number, against fp64."""
    torch.manual_seed(0)
    (H, G), (D, E) = check.heads, check.widths
    q = queries(check.B, check.T, H, D, check.dtype)
    k, v = state(check.B, G, (D, E), SPAN, check.dtype)
    mask = BoundMask(check.rule, Coords(*sides(check, SPAN)))
    out, lse = few_queries.attend(q, k, v, mask, triton._span(mask) or _refused(check), D**-0.5, check.cap)
    score = Score(cap=check.cap)
    twin, level = reference.attend(q.double(), k.double(), v.double(), mask, score, D**-0.5)
    some = level.isfinite()
    assert torch.equal(lse.isfinite(), some) and (out[~some] == 0).all(), check
    errors = [_error(out, twin), (lse.double() - level)[some].abs().max().item()]
    full, _ = few_queries.attend(q, k, v, None, triton._span(None) or _refused(check), D**-0.5)
    errors.append(_error(full, reference.attend(q.double(), k.double(), v.double(), None, None, D**-0.5)[0]))
    what = f"{str(check.dtype)[6:]} B{check.B} T{check.T} H{H} G{G} D{D} E{E} {check.rule.kind} {check.sort}"
    line = f"{what}: out {errors[0]:.1e} lse {errors[1]:.1e} without a mask {errors[2]:.1e}"
    assert max(errors) < TOLERANCE[check.dtype], line
    return line


def _refused(check: Check) -> Any:
    raise AssertionError(f"no span: {check}")


def _error(a: Tensor, b: Tensor) -> float:
    assert a.isfinite().all()
    return ((a.double() - b).abs().max() / b.abs().max()).item()


def replayed() -> None:
    """One graph for all steps: the state fills, and the kernels see it on the device."""
    q, (k, v) = queries(2, 1, 8, 64, BF16), state(2, 2, (64, 64), SPAN, BF16)
    at, order = torch.zeros(2, 1, dtype=torch.long, device=DEVICE), torch.full((2, SPAN), FAR, device=DEVICE)
    errors = []

    def step() -> Tensor:
        return triton.decode(q, k, v, BoundMask(CAUSAL, Coords(Side(at), Side(order))), None, 0.125)

    found: list[Tensor] = []
    replay = captured(lambda: found.append(step()))
    for length in (1, 5, 130, SPAN):
        lengths = torch.tensor([[length], [max(1, length - 3)]], device=DEVICE)
        n = torch.arange(SPAN, device=DEVICE)
        at.copy_(lengths - 1)
        order.copy_(torch.where(n < lengths, n, FAR))
        replay()
        mask = BoundMask(CAUSAL, Coords(Side(at), Side(order)))
        errors.append(_error(found[-1], reference.attend(q.double(), k.double(), v.double(), mask, None, 0.125)[0]))
    print(f"a graph as the state fills: {' '.join(f'{e:.1e}' for e in errors)}", flush=True)
    assert max(errors) < TOLERANCE[BF16] or DEVICE == "cpu", errors  # the interpreter multiplies bf16 wrongly


def decoded() -> None:
    """A model that decodes by these kernels, rows padded on the left, against the same without them."""
    blocks = {"mixer": {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 64}, "feedforward": {"kind": "glu", "hidden": 64}}  # fmt: skip
    spec = {"kind": "decoder", "vocab": 99, "dim": 64, "depth": 2, "context": 64, "blocks": blocks}
    model = dt.build(spec, device=DEVICE, dtype=FP32).eval()
    tokens, real = torch.randint(99, (2, 30), device=DEVICE), torch.ones(2, 30, dtype=torch.bool, device=DEVICE)
    real[1, :7] = False
    logits = []
    for own in ((), ("decode",)):
        triton.OWN, memory = own, model.new_state(2, 64)
        cuts = itertools.pairwise([0, 20, 24, *range(25, 31)])
        parts = [model(tokens[:, a:b], attention_mask=real[:, a:b], state=memory).logits for a, b in cuts]
        logits.append(torch.cat(parts, 1)[real])
    asked: dict[str, Any] = {"device": "cuda", "dtype": BF16, "queries": 1, "width": 128, "mask": None, "score": None}
    assert plan(**asked).path == "split keys"
    triton.OWN = ()
    error = _error(logits[1], logits[0].double())
    print(f"a model: {error:.1e}", flush=True)
    assert error < 1e-4, error


Way = Callable[[Tensor, Tensor, Tensor, BoundMask], Tensor]  # q, k, v (B,heads,N,D) -> (B,H,1,D)


def ways(case: Case) -> dict[str, Way]:
    """Peers by name."""
    B, H, G, D = case.B, case.H, case.G, case.D
    scale = D**-0.5
    lengths = case.lengths().long()

    def ours(q: Tensor, k: Tensor, v: Tensor, mask: BoundMask) -> Tensor:
        return triton.decode(q, k, v, mask, None, scale)

    def planned(q: Tensor, k: Tensor, v: Tensor, mask: BoundMask) -> Tensor:
        return sdpa.attend(q, k, v, mask, None, scale, 0.0)

    def folded(backend: SDPBackend) -> Way:
        def run(q: Tensor, k: Tensor, v: Tensor, mask: BoundMask) -> Tensor:
            rows = q.reshape(B, G, H // G, D)
            shown = mask.dense().expand(B, 1, H // G, CAPACITY)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(rows, k, v, shown, scale=scale).reshape(B, H, 1, -1)

        return run

    def part(q: Tensor, k: Tensor, v: Tensor, mask: BoundMask) -> Tensor:
        rows, n = q.reshape(B, G, H // G, D), case.filled
        return F.scaled_dot_product_attention(rows, k[:, :, :n], v[:, :, :n], scale=scale).reshape(B, H, 1, -1)

    block = create_block_mask(lambda b, h, i, j: j < lengths[b], B, None, 1, CAPACITY, device=DEVICE)
    torch._dynamo.reset()
    flex = torch.compile(flex_attention, dynamic=False) if DEVICE == "cuda" else flex_attention

    def blocks(q: Tensor, k: Tensor, v: Tensor, mask: BoundMask) -> Tensor:
        return flex(q, k, v, block_mask=block, scale=scale, enable_gqa=True)  # type: ignore[return-value]

    found: dict[str, Way] = {"ours": ours, "SDPA attn_mask": planned}
    found["SDPA attn_mask, cuDNN, heads as rows"] = folded(SDPBackend.CUDNN_ATTENTION)
    found["SDPA attn_mask, efficient, heads as rows"] = folded(SDPBackend.EFFICIENT_ATTENTION)
    found["FlexAttention"] = blocks
    if not case.ragged:
        found["SDPA of the filled part alone"] = part
    return found


class Made(NamedTuple):
    """What one case reads: queries, the state of every layer, coordinates."""

    q: Tensor
    layers: list[list[Tensor]]
    coords: Coords

    def step(self, way: Way) -> Tensor:
        """All layers; the last one's output."""
        mask, out = BoundMask(CAUSAL, self.coords), self.q
        for k, v in self.layers:
            out = way(self.q, k, v, mask)
        return out


def made(case: Case) -> Made:
    """As many layers as read CACHED bytes, so far as 40 GB hold their states."""
    n = torch.arange(CAPACITY, device=DEVICE)
    lengths = case.lengths().long()[:, None]
    whole = case.B * CAPACITY * case.G * sum(case.widths) * 2
    count = max(2, min(int(CACHED // case.size()) + 1, int(40e9 // whole), 64))
    layers = [state(case.B, case.G, case.widths, CAPACITY, BF16) for _ in range(count)]
    coords = Coords(Side(lengths - 1), Side(torch.where(n < lengths, n, FAR)))
    return Made(queries(case.B, 1, case.H, case.D, BF16), layers, coords)


class Timed(NamedTuple):
    """microseconds: of a layer, by way, median and spread. layers: that took turns in one graph."""

    microseconds: dict[str, tuple[float, float]]
    layers: int


def timed(case: Case) -> Timed:
    """Every way that runs, after its output has been compared with ours."""
    work, graphs, first = made(case), {}, None
    for name, way in ways(case).items():
        try:
            out = work.step(way)
            graphs[name] = captured(partial(work.step, way))
        except Exception as error:
            assert name != "ours", error
            print(f"{case.name}: {name} does not run: {type(error).__name__}: {str(error)[:120]}", flush=True)
            continue
        first = out if first is None else first
        gap = _error(out, first.double())
        assert gap < 3e-2 or DEVICE == "cpu", (case, name, gap)
    count = len(work.layers)
    times = interleaved(graphs, rounds=9, warmup=2)
    return Timed({name: (1e6 * a / count, 1e6 * b / count) for name, (a, b) in times.items()}, count)


@torch.no_grad()
def measure() -> Iterator[dict[str, Any]]:
    """Floor: what is filled, read once at the rate of a copy."""
    rate = ceilings(DEVICE).copy_tbs * 1e3
    for case in CASES:
        found = timed(case).microseconds
        speed = {name: case.size() / median / 1e3 for name, (median, _) in found.items()}
        median, spread = found["ours"]
        more = {
            "floor": round(rate),
            "spread": round(speed["ours"] * spread / median, 1),
            "us_a_layer": round(median, 2),
        }
        for peer in [name for name in speed if name != "ours"]:
            goal = 1.0 if peer == "SDPA attn_mask" else None
            yield row(case.name, "GB/s", speed["ours"], speed[peer], peer, target_ratio=goal, **more)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(__file__)
