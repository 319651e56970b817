"""The selective scan and the delta rule on CUDA against what a user calls otherwise: first right, then tokens/s.

Peers, where they are installed: flash-linear-attention's delta rules, mamba_ssm's scan; on the shortest rows our own plain
torch, which takes up to a hundred times as long, and on longer ones ours on the shortest, whose rate they should keep.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from common import interleaved, main, often, row
from torch import Tensor
from torch.nn import functional as F
from tuning import compiled_at_once

from dovetail.kernels import delta_rule, ssm_scan

BENCHMARK = {"device": "cuda", "packages": {"triton": "triton"}, "minutes": 3}
LENGTHS = (2048, 8192, 32768, 131072)
TOKENS = 65536  # of a batch; a row of 128k is one alone
REPEAT = 10  # calls queued between two synchronisations, as in a real step
PLAIN = "our plain torch"
Ways = dict[str, tuple[Callable[[], Tensor], list[Tensor]]]


def delta_inputs(B: int, H: int, T: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v (B,T,H,D), β and log α (B,T,H)."""
    q, k, v = (torch.randn(B, T, H, D, device="cuda", dtype=dtype) for _ in range(3))
    beta, decay = torch.rand(B, T, H, device="cuda"), F.logsigmoid(torch.randn(B, T, H, device="cuda") + 3)
    return [t.requires_grad_() for t in (q, F.normalize(k.float(), dim=-1).to(dtype), v, beta, decay)]


def by_head(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.transpose(1, 2) for t in (q, k, v, beta, decay)]


def ours_delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, **more: Any
) -> tuple[Tensor, Tensor]:
    """(o (B,T,H,D), S_T) by the public function."""
    q, k, v, beta, decay = by_head(q, k, v, beta, decay)  # type: ignore[assignment]
    o, end = delta_rule.delta_rule(q, k, v, beta, log_decay=decay, **more)
    return o.transpose(1, 2), end


def plain_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None) -> Tensor:
    start = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    wide = [None if t is None else t.float() for t in by_head(q * q.shape[-1] ** -0.5, k, v, beta, decay)]
    return delta_rule.chunked.delta_rule(*wide, start, None)[0].transpose(1, 2).to(q.dtype)  # type: ignore[arg-type]


def scan_inputs(B: int, T: int, D: int, N: int) -> list[Tensor]:
    """x, dt, a, b, c and start, as Mamba starts: dt log-uniform in 0.001..0.1, a = -(1..N)."""
    make = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
    dt = torch.empty(B, T, D, device="cuda").uniform_(-6.9, -2.3).exp()
    a = -torch.arange(1.0, N + 1, device="cuda").expand(D, N).contiguous()
    return [t.requires_grad_() for t in (make(B, T, D), dt, a, make(B, T, N), make(B, T, N), make(B, D, N))]


def close(what: str, ours: Sequence[Tensor], theirs: Sequence[Tensor], names: Sequence[str], most: float) -> None:
    for name, one, other in zip(names, ours, theirs, strict=True):
        error = ((one.double() - other).abs().max() / other.abs().max()).item()
        print(f"{what:44} {name:6} relative error {error:.1e}", flush=True)
        assert error < most, (what, name, error)


def check() -> None:
    """The kernels that the plans choose on this device against the plain twins in fp64: outputs and every gradient."""
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        for B, H, T, D, gated, packed in ((2, 3, 300, 64, True, True), (1, 16, 1024, 128, True, False), (1, 2, 200, 128, False, True)):  # fmt: skip
            assert delta_rule.plan(T, device="cuda", dtype=dtype, width=D).path == "triton"
            inputs = delta_inputs(B, H, T, D, dtype)
            inputs += [torch.randn(B, H, D, D, device="cuda", requires_grad=True)]
            wide = [t.detach().double().requires_grad_() for t in inputs]
            reset = torch.rand(B, T, device="cuda") < 0.01 if packed else None
            ours = ours_delta(*inputs[:4], inputs[4] if gated else None, start=inputs[5], reset=reset)
            q, k, v, beta, decay = by_head(*wide[:5])
            twin = delta_rule.reference.delta_rule(q * D**-0.5, k, v, beta, decay if gated else None, wide[5], reset)  # type: ignore[operator, arg-type]
            theirs = (twin[0].transpose(1, 2), twin[1])
            ups = [torch.randn_like(t) for t in ours]
            leaves = [0, 1, 2, 3, *([4] if gated else []), 5]
            grads = torch.autograd.grad(ours, [inputs[i] for i in leaves], ups)
            expected = torch.autograd.grad(theirs, [wide[i] for i in leaves], [u.double() for u in ups])
            names = ["o", "S", *(["dq", "dk", "dv", "dbeta", "dlog", "dstart"][i] for i in leaves)]
            case = f"delta rule {str(dtype)[6:]} T{T} D{D} gated={gated} packed={packed}"
            close(case, [*ours, *grads], [*theirs, *expected], names, most)
    for B, T, D, N, packed in ((2, 300, 70, 16, True), (1, 1500, 64, 16, False), (1, 1500, 33, 5, True)):
        assert ssm_scan.plan(T, N, device="cuda").path == "triton"
        inputs = scan_inputs(B, T, D, N)
        wide = [t.detach().double().requires_grad_() for t in inputs]
        first = torch.rand(B, T, device="cuda") < 0.005 if packed else None
        ours, theirs = ssm_scan.selective_scan(*inputs, first), ssm_scan.reference.selective_scan(*wide, first)
        ups = [torch.randn_like(t) for t in ours]
        grads = torch.autograd.grad(ours, inputs, ups)
        expected = torch.autograd.grad(theirs, wide, [u.double() for u in ups])
        names = ["y", "h", "dx", "ddt", "da", "db", "dc", "dstart"]
        close(f"scan T{T} D{D} N{N} packed={packed}", [*ours, *grads], [*theirs, *expected], names, 1e-4)


def delta_ways(B: int, T: int, gated: bool) -> Ways:
    *inputs, decay = delta_inputs(B, 16, T, 128, torch.bfloat16)
    q, k, v, beta = inputs
    leaves, g = [*inputs, *([decay] if gated else [])], decay if gated else None
    ways: Ways = {"ours": (lambda: ours_delta(q, k, v, beta, g)[0], leaves)}
    try:
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        if gated:
            ways["flash-linear-attention"] = (lambda: chunk_gated_delta_rule(q, k, v, g=decay, beta=beta)[0], leaves)
        else:
            ways["flash-linear-attention"] = (lambda: chunk_delta_rule(q, k, v, beta)[0], leaves)
    except ImportError as missing:
        print(f"without flash-linear-attention: {missing}")
    if why := "flash-linear-attention" in ways and refused(*ways["flash-linear-attention"]):
        print(f"without flash-linear-attention: {why}")
        del ways["flash-linear-attention"]
    if T <= 2048:
        ways[PLAIN] = (lambda: plain_delta(q, k, v, beta, g), leaves)
    return ways


def first_call() -> None:
    """The peer's delta rules, forward and backward, on little: its kernels are chosen by widths and types alone."""
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v, beta, decay = given = delta_inputs(1, 16, 2048, 128, torch.bfloat16)
    torch.autograd.grad(chunk_delta_rule(q, k, v, beta)[0], given[:4], torch.randn_like(v))
    torch.autograd.grad(chunk_gated_delta_rule(q, k, v, g=decay, beta=beta)[0], given, torch.randn_like(v))


def refused(run: Callable[[], Tensor], leaves: list[Tensor]) -> str:
    """Why a peer does not run here, forward and backward; empty where it does."""
    try:
        out = run()
        torch.autograd.grad(out, leaves, torch.randn_like(out))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def scan_ways(B: int, T: int) -> Ways:
    inputs = scan_inputs(B, T, 2048, 16)
    inputs[5] = torch.zeros_like(inputs[5])
    x, dt, a, b, c, start = inputs
    ways: Ways = {"ours": (lambda: ssm_scan.selective_scan(x, dt, a, b, c, start)[0], inputs[:5])}
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        u, step, before, after = (t.detach().transpose(1, 2).contiguous().requires_grad_() for t in (x, dt, b, c))
        ways["mamba_ssm"] = (lambda: selective_scan_fn(u, step, a, before, after), [u, step, a, before, after])
    except ImportError as missing:
        print(f"without mamba_ssm: {missing}")
    if T <= 2048:
        ways[PLAIN] = (lambda: ssm_scan.chunked.selective_scan(x, dt, a, b, c, start, None)[0], inputs[:5])
    return ways


def agree(case: str, ways: Ways) -> None:
    """Peers compute the same: their outputs within bf16's error of ours, or the comparison means nothing."""
    with torch.no_grad():
        ours = ways["ours"][0]().float()
        for name, (run, _) in ways.items():
            other = run().float()
            other = other if other.shape == ours.shape else other.transpose(1, 2)
            error = ((ours - other).norm() / other.norm()).item()
            assert error < 5e-2, (case, name, error)


def measured(kind: str, B: int, T: int, ways: Ways, shortest: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of ours against each other way, forward and forward + backward. Plain torch is called once a turn."""
    case = f"{kind} B{B} T{T}"
    agree(case, ways)
    up = {name: torch.randn_like(run()) for name, (run, _) in ways.items()}
    calls = {name: 1 if name == PLAIN else REPEAT for name in ways}

    def many(name: str, backward: bool) -> Callable[[], None]:
        run, leaves = ways[name]
        if backward:
            return often(lambda: torch.autograd.grad(run(), leaves, up[name]), calls[name])
        return often(torch.no_grad()(run), calls[name])

    rows = []
    for what, backward in (("fwd", False), ("fwd+bwd", True)):
        times = interleaved({name: many(name, backward) for name in ways}, rounds=5, warmup=1)
        rate = {name: calls[name] * B * T / t[0] for name, t in times.items()}
        ours = rate.pop("ours")
        spread = ours * times["ours"][1] / times["ours"][0]
        first = shortest.setdefault(f"{kind} {what}", ours)
        rate |= {} if LENGTHS[0] == T else {f"itself at T{LENGTHS[0]}": first}
        rows += [row(f"{case} {what}", "tokens/s", ours, rate[name], name, spread=round(spread)) for name in rate]
    return rows


def measure() -> Iterator[dict[str, Any]]:
    if importlib.util.find_spec("fla"):
        compiled_at_once(first_call)
    shortest: dict[str, float] = {}
    for T in LENGTHS:
        B = max(1, TOKENS // T)
        for gated in (False, True):
            kind = f"{'gated ' if gated else ''}delta rule H16 D128 bf16"
            yield from measured(kind, B, T, delta_ways(B, T, gated), shortest)
        yield from measured("selective scan C2048 N16 fp32", B, T, scan_ways(B, T), shortest)


if __name__ == "__main__":
    main(__file__)
