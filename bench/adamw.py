"""AdamW's step on CUDA, for every parameter of Llama-3.2-1B's shape, against torch's fused and foreach forms.

First one step from random states against torch's in fp64, in every type, with and without clipping, and of more than
2^31 entries at once. Then, in bf16 and in fp32, ms on the device: the step alone, and with the clip to a joint norm.
Floor: what must be read and written at the measured copy rate, seven numbers a parameter; two more gradients for the
clip's norm. The peers' clip: fused divides as it reads, as ours does, and writes the gradients back; foreach goes over
them once more. Last, ms of the host, which starts the kernels of a step and waits for none: eager, as outside a graph.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from common import ceilings, interleaved, main, replayed, row
from torch import Tensor, nn

import dovetail as dt
from dovetail.kernels.adamw import LEAST, Row, plan, step_
from dovetail.training.optim import AdamW, adamw, joint_norm, update

BENCHMARK = {"device": "cuda", "packages": {"triton": "triton"}, "minutes": 3}
DEVICE, REPEAT, ROUNDS, LIMIT = "cuda", 3, 9, 1.0
HOW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
UNITS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 0.0}  # one rounding of a number
SPEC = {
    "kind": "decoder", "vocab": 128_256, "dim": 2048, "depth": 16, "head": {"kind": "ref", "path": "embedding"},
    "blocks": {
        "mixer": {"kind": "attention", "heads": 32, "kv_heads": 8, "head_dim": 64},
        "feedforward": {"kind": "glu", "hidden": 8192},
    },
}  # fmt: skip


def made(size: int, dtype: torch.dtype, count: float) -> Row:
    weight, gradient, m, v = (torch.randn(size, device=DEVICE, dtype=dtype) for _ in range(4))
    return Row(weight, gradient, m, v.abs_().add_(0.1), torch.tensor(count, device=DEVICE))


def truth(given: Row, divisor: float) -> list[Tensor]:
    """Weight and moments after torch's step in fp64."""
    weight = nn.Parameter(given.weight.double())
    weight.grad = given.gradient.double() / divisor
    theirs = torch.optim.AdamW([weight], foreach=False, fused=False, **HOW)
    theirs.state[weight] = {
        "step": given.count.double().cpu(), "exp_avg": given.exp_avg.double(), "exp_avg_sq": given.exp_avg_sq.double(),
    }  # fmt: skip
    theirs.step()
    return [weight.detach(), theirs.state[weight]["exp_avg"], theirs.state[weight]["exp_avg_sq"]]


def far(found: list[Tensor], exact: list[Tensor], unit: float) -> float:
    """The largest distance, by one rounding and some of fp32's."""
    each = zip(found, exact, strict=True)
    return max(
        ((a.double() - b).abs() / (unit * b.abs() + 1e-6 * b.abs().clamp_min(1.0))).max().item() for a, b in each
    )


def check() -> None:
    torch.manual_seed(0)
    for dtype, unit in UNITS.items():
        assert plan(DEVICE, dtype).path == "triton"
        worst = 0.0
        for size in (LEAST, LEAST + 48, 3_000_000 - 3_000_000 % 16):
            for count, divisor in ((0.0, None), (1.0, 3.0), (998.0, None), (1e6, 1.5)):
                given = made(size, dtype, count)
                exact = truth(given, divisor or 1.0)
                by = None if divisor is None else torch.tensor(divisor, device=DEVICE)
                rate = HOW["lr"] if divisor is None else torch.tensor(HOW["lr"], device=DEVICE)
                assert step_([given], divisor=by, **(HOW | {"lr": rate})) == []
                worst = max(worst, far([given.weight, given.exp_avg, given.exp_avg_sq], exact, unit))
        print(f"{dtype}: at most {worst:.2f} roundings from fp64", flush=True)
        assert worst < 1.05, (dtype, worst)
    ends = [slice(0, LEAST), slice(-LEAST, None)]
    given = made(2**31 + LEAST, torch.bfloat16, 5.0)
    exact = [truth(Row(*(t[end] for t in given[:4]), given.count), 1.0) for end in ends]
    assert step_([given], **HOW) == []
    found = [far([t[end] for t in (given.weight, given.exp_avg, given.exp_avg_sq)], e, UNITS[torch.bfloat16]) for end, e in zip(ends, exact, strict=True)]  # fmt: skip
    print(f"{given.weight.numel():,} entries: at most {max(found):.2f} roundings from fp64", flush=True)
    assert max(found) < 1.05, found


def optimisers(dtype: torch.dtype) -> tuple[dict[str, torch.optim.AdamW], list[nn.Parameter]]:
    """Ours and torch's, each over weights of its own, which share their gradients; as a graph has them."""
    model = dt.build(SPEC, device=DEVICE, dtype=dtype)
    ours = adamw(model, **HOW)
    assert isinstance(ours, AdamW)
    held = [p for group in ours.param_groups for p in group["params"]]
    for p in held:
        p.grad = (1e-6 * torch.randn(p.shape, device=DEVICE)).to(dtype)  # so small that a clip leaves them as they are
    found: dict[str, torch.optim.AdamW] = {"ours": ours}
    for name, more in (("torch fused", {"fused": True}), ("torch foreach", {"foreach": True})):
        groups = []
        for group in ours.param_groups:
            own = [nn.Parameter(p.detach().clone()) for p in group["params"]]
            for p, mine in zip(own, group["params"], strict=True):
                p.grad = mine.grad
            groups.append({"params": own, "weight_decay": group["weight_decay"]})
        found[name] = torch.optim.AdamW(groups, **(HOW | more))  # type: ignore[arg-type]
    for each in found.values():
        for group in each.param_groups:
            group["lr"], group["capturable"] = torch.tensor(HOW["lr"], device=DEVICE), True
    return found, held


def agree(found: dict[str, torch.optim.AdamW], dtype: torch.dtype) -> None:
    """Three steps of each: weights no further apart than their roundings, and no nearer to where they began."""
    before = [p.detach().clone() for p in listed(found["ours"])[:4]]
    for _ in range(3):
        for each in found.values():
            update(each, listed(each), LIMIT)
    moved = max((a - b).abs().max().item() for a, b in zip(listed(found["ours"]), before, strict=False))
    assert moved > HOW["lr"], moved
    for name, each in found.items():
        apart = max((a.float() - b.float()).abs().max().item() for a, b in zip(listed(found["ours"]), listed(each), strict=True))  # fmt: skip
        print(f"{dtype}, {name}: after three steps {apart:.1e} from ours", flush=True)
        assert apart < (1e-5 if dtype == torch.float32 else 2e-2), (name, apart)


def listed(optimiser: torch.optim.AdamW) -> list[nn.Parameter]:
    return [p for group in optimiser.param_groups for p in group["params"]]


def host_ms(run: Callable[[], Any]) -> float:
    """Until `run` returns, nothing being queued before it."""
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e3 * statistics.median(times)


def measure() -> Iterator[dict[str, Any]]:
    rate = 1e12 * ceilings().copy_tbs
    for dtype in (torch.bfloat16, torch.float32):
        found, held = optimisers(dtype)
        size, what = sum(p.numel() for p in held), str(dtype).removeprefix("torch.")
        print(f"{what}: {size:,} parameters in {len(held)} tensors, joint norm {joint_norm([p.grad for p in held]).item():.3f}")  # type: ignore[misc] # fmt: skip
        agree(found, dtype)
        cases = {
            "step": {name: each.step for name, each in found.items()},
            "clip and step": {name: partial(update, each, listed(each), LIMIT) for name, each in found.items()},
        }  # fmt: skip
        for case, runs in cases.items():
            times = interleaved(replayed(runs, REPEAT), rounds=ROUNDS, warmup=2)
            ms = {name: 1e3 * median / REPEAT for name, (median, _) in times.items()}
            moved = (7 if case == "step" else 8) * dtype.itemsize * size
            for name, each in ms.items():
                print(f"{what} {case}, {name}: {each:.3f} ms, {moved / each / 1e6:.0f} GB/s of what must be moved", flush=True)  # fmt: skip
            more = {"spread": round(1e3 * times["ours"][1] / REPEAT, 4), "floor": round(1e3 * moved / rate, 4)}
            for peer in list(ms)[1:]:
                yield row(f"{case}, {what}", "ms", round(ms["ours"], 4), round(ms[peer], 4), peer, smaller=True, **more)
        host = {name: host_ms(run) for name, run in cases["clip and step"].items()}
        for peer in list(host)[1:]:
            yield row(f"host of clip and step, {what}", "ms", round(host["ours"], 4), round(host[peer], 4), peer, smaller=True)  # fmt: skip
        del found, held, cases, runs, times  # type: ignore[possibly-undefined]
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(__file__)
